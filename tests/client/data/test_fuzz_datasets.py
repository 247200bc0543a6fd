"""Made-up DICOM datasets, right and wrong in any attribute: an image or a counted reason.

``FEDWARD_FUZZ`` multiplies the number of cases.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut

from fedward.errors import DataError
from fedward.rule_codes import REASONS
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.headers import read_headers
from fedward_client.data.readers.dicom.pixels import read_frame
from fedward_client.data.sample import Image
from fedward_client.index.extract import Extractor

TIMES = int(os.environ.get("FEDWARD_FUZZ", "1"))
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "PALETTE COLOR", "YBR_FULL_422", "NONE", "")
SYNTAXES = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.102",
    "1.2.3",
)
odd_numbers = st.sampled_from(["", "0", "-1", "1e300", "-1e300", "NaN", "x", "1\\2", "7"])
# Groups with what readers look at, and some with anything at all.
tags = st.one_of(
    st.sampled_from(
        [
            0x00080008,
            0x00080016,
            0x00080060,
            0x00100020,
            0x00100021,
            0x00180050,
            0x00180088,
            0x00200013,
            0x00200032,
            0x00200037,
            0x00280002,
            0x00280004,
            0x00280006,
            0x00280008,
            0x00280010,
            0x00280011,
            0x00280030,
            0x00280100,
            0x00280101,
            0x00280102,
            0x00280103,
            0x00280120,
            0x00280121,
            0x00281050,
            0x00281051,
            0x00281052,
            0x00281053,
            0x00281056,
            0x00281101,
            0x00281102,
            0x00281103,
            0x00281201,
            0x00283000,
            0x00283010,
            0x00400275,
            0x52009229,
            0x52009230,
            0x7FE00001,
            0x7FE00008,
            0x7FE00009,
        ]
    ),
    st.integers(0x00080000, 0x7FDFFFFF),
)
texts = st.sampled_from(["CS", "LO", "DS", "IS", "UI", "SH", "DA", "TM", "PN", "UN", "OB", "OW"])


@st.composite
def elements(draw: Any, depth: int = 0) -> tuple[int, str, bytes | list[Dataset]]:
    """A tag, a VR that may be wrong for it, and any bytes; or a sequence of more of these."""
    tag = draw(tags)
    if depth < 2 and draw(st.integers(0, 4)) == 0:
        inner = draw(st.lists(elements(depth + 1), max_size=3))
        item = Dataset()
        for one, vr, value in inner:
            with suppress(Exception):  # what pydicom refuses to hold, a file may hold all the same
                _put(item, one, vr, value)
        return tag, "SQ", [item] * draw(st.integers(0, 2))
    vr = draw(st.one_of(texts, st.sampled_from(["US", "SS", "FD", "FL", "UL", "AT"])))
    raw = draw(st.one_of(st.binary(max_size=24), odd_numbers.map(str.encode)))
    return tag, vr, raw


def _put(file: Dataset, tag: int, vr: str, value: bytes | list[Dataset]) -> None:
    """As the bytes of a raw element, so that nothing checks it before it is written."""
    if isinstance(value, list):
        file[tag] = pydicom.DataElement(tag, "SQ", pydicom.Sequence(value))
    else:
        value += b"\0" * (len(value) % 2)
        file[tag] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(tag), vr, len(value), value, 0, False, True, True
        )


@st.composite
def sound(draw: Any) -> FileDataset:
    """A dataset whose pixels are what its attributes say: bits 1 to 16, signed or not, frames."""
    bits = draw(st.integers(1, 16))
    allocated = 1 if bits == 1 and draw(st.booleans()) else 8 if bits <= 8 else 16
    signed = allocated > 1 and draw(st.booleans())
    frames, colour = draw(st.integers(1, 3)), allocated == 8 and draw(st.booleans())
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    signed = signed and not colour
    shape = (frames, rows, columns, *([3] if colour else []))
    low = -(1 << bits - 1) if signed else 0
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.integers(low, low + (1 << bits), shape)
    file = _file("1.2.840.10008.1.2.1")
    file.Rows, file.Columns, file.NumberOfFrames = rows, columns, frames
    file.SamplesPerPixel = 3 if colour else 1
    file.PhotometricInterpretation = "RGB" if colour else draw(st.sampled_from(GREY))
    if colour:
        file.PlanarConfiguration = 0
    file.BitsAllocated, file.BitsStored, file.HighBit = allocated, bits, bits - 1
    file.PixelRepresentation = int(signed)
    kind = f"<{'i' if signed else 'u'}{max(1, allocated // 8)}"
    raw = (
        np.packbits(values.ravel().astype(bool), bitorder="little").tobytes()
        if allocated == 1
        else values.astype(kind).tobytes()
    )
    file.PixelData = raw + b"\0" * (len(raw) % 2)
    file["PixelData"].VR = "OB" if allocated <= 8 else "OW"
    if not colour and draw(st.booleans()):
        file.RescaleSlope = draw(st.sampled_from(["1", "2", "0.5", "-1"]))
        file.RescaleIntercept = draw(st.sampled_from(["0", "-1024", "7.5"]))
    file.info = values  # what the pixels are, for the test
    return file


def _file(syntax: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3.4"
    file.SeriesInstanceUID, file.PatientID, file.Modality = "1.2.3", "P1", "OT"
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all cases: nothing but the file may ever be in it."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def task(make_plan: Any) -> Any:
    """A task that takes every modality."""
    return make_plan().task.model_copy(update={"modality": ("any",)})


def many(count: int) -> Any:
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        database=None,
        derandomize=TIMES == 1,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )


def image_or_reason(path: Path, task: Any, frame: int = 0) -> Image | str:
    """What becomes of a file, in the reader, in the decoder and in the index."""
    began = time.monotonic()
    _, _, left_out = read_headers([path], path.parent, task)
    facts = Extractor(path.parent, "dicom", b"k" * 32)(path)
    assert {item.reason for item in left_out} | {facts.reason} <= REASONS | {""}
    try:
        found: Image | str = read_frame(path, frame).image
    except DataError as error:
        assert error.rule in REASONS
        found = error.rule
    assert time.monotonic() - began < 20
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return found


@pytest.mark.integration
@many(300)
@given(file=sound(), data=st.data())
def test_sound_pixels_are_read_as_they_are(file: Any, data: Any, place: Path, task: Any) -> None:
    values, path = file.info, place / "x.dcm"
    del file.info
    with quiet():
        file.save_as(path, enforce_file_format=True)
    frame = data.draw(st.integers(0, len(values) - 1))
    image = image_or_reason(path, task, frame)
    assert isinstance(image, Image)
    expected = values[frame]
    if file.SamplesPerPixel == 3:
        np.testing.assert_array_equal(image.pixels, np.moveaxis(expected, -1, 0))
        return
    expected = np.asarray(apply_modality_lut(expected, file), float)
    if file.PhotometricInterpretation == "MONOCHROME1":
        low = -(1 << file.BitsStored - 1) if file.PixelRepresentation else 0
        ends = apply_modality_lut(np.array([low, low + (1 << file.BitsStored) - 1]), file)
        expected = float(np.sum(ends)) - expected
    np.testing.assert_allclose(image.pixels[0], expected, rtol=1e-6)


@pytest.mark.integration
@many(900)
@given(
    file=sound(),
    more=st.lists(elements(), max_size=6),
    syntax=st.sampled_from(SYNTAXES),
    photometric=st.sampled_from((*GREY, *COLOUR, "keep", "keep", "keep")),
    cut=st.integers(0, 40),
    relabel=st.booleans(),
)
def test_wrong_datasets_end_in_an_image_or_a_reason(
    file: Any,
    more: Any,
    syntax: str,
    photometric: str,
    cut: int,
    relabel: bool,
    place: Path,
    task: Any,
) -> None:
    path = place / "x.dcm"
    del file.info
    if photometric != "keep":
        file.PhotometricInterpretation = photometric
    try:
        with quiet():
            for tag, vr, value in more:
                _put(file, tag, vr, value)
            pydicom.dcmwrite(path, file, enforce_file_format=False)
    except Exception:  # pydicom itself refuses to write some of it: the plain bytes then
        rest = b"".join(value for _, _, value in more if isinstance(value, bytes))
        path.write_bytes(b"\0" * 128 + b"DICM" + rest)
    content = path.read_bytes()
    if relabel:  # the file says that it is stored in another way
        content = content.replace(b"1.2.840.10008.1.2.1\0", _padded(syntax), 1)
    path.write_bytes(content[: len(content) - cut] if cut < 20 else content)
    found = image_or_reason(path, task)
    if isinstance(found, Image):
        assert found.pixels.dtype == np.float32 and found.pixels.ndim == 3
        assert len(found.pixels) in (1, 3)


def _padded(syntax: str) -> bytes:
    """As long as the UID that it replaces."""
    return syntax.encode()[:20].ljust(20, b"\0")
