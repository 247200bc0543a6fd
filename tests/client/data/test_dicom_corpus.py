"""Every file that pydicom, pydicom-data and highdicom bring: an image or a counted reason."""

from __future__ import annotations

import socket
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import data_store
import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.pixels.utils import pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian

from fedward.errors import DataError
from fedward.rule_codes import REASONS
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom import sniff
from fedward_client.data.readers.dicom.headers import read_headers
from fedward_client.data.readers.dicom.pixels import read_frame
from fedward_client.data.readers.dicom.sniff import is_dicom

# Walked on disk: pydicom's own list of its files may ask the internet for more.
ROOTS = {
    "pydicom": Path(pydicom.__file__).parent / "data",
    "pydicom-data": Path(data_store.__file__).parent,
    "highdicom": Path(highdicom.__file__).parent,
}
FRAMES, SECONDS = 3, 20
# What a plain reading by slope and intercept does not cover.
ELSEWHERE = (
    "ModalityLUTSequence",
    "PixelPaddingValue",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise OSError("this test needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def files(root):
    return [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix not in (".py", ".pyc")]


def ends_of(path, frames):
    ends = Counter()
    for frame in range(min(frames, FRAMES)):
        try:
            image = read_frame(path, frame).image
        except DataError as error:
            assert error.rule in REASONS
            ends[error.rule] += 1
        else:
            assert image.pixels.dtype == np.float32
            assert image.pixels.ndim == 3
            assert image.pixels.shape[0] in (1, 3)
            ends["image"] += 1
    return ends


@pytest.mark.integration
@pytest.mark.parametrize("origin", ROOTS)
def test_each_file_ends_as_an_image_or_a_reason(origin, make_plan):
    task = make_plan().task.model_copy(update={"modality": ("any",)})
    ends = Counter()
    for path in files(ROOTS[origin]):
        began = time.monotonic()
        headers, _, left_out = read_headers([path], path.parent, task)
        assert len(headers) + len(left_out) == 1
        assert {item.reason for item in left_out} <= REASONS
        ends += ends_of(path, headers[0].frames if headers else 1)
        assert time.monotonic() - began < SECONDS
    least = {"pydicom": 80, "pydicom-data": 40, "highdicom": 0}
    assert ends["image"] >= least[origin]


def plain(path):
    """Stored values by slope and intercept; None where the file asks for more than that."""
    header = pydicom.dcmread(path, force=True)
    known = "TransferSyntaxUID" in header.file_meta
    grey = header.get("PhotometricInterpretation") == "MONOCHROME2"
    if not (known and grey) or any(name in header for name in ELSEWHERE):
        return None
    slope, intercept = header.get("RescaleSlope") or 1, header.get("RescaleIntercept") or 0
    try:
        stored = np.asarray(pixel_array(header, index=0), np.float64)
    except RuntimeError:  # a stream that only we mend
        return None
    return str(header.file_meta.TransferSyntaxUID), stored * float(slope) + float(intercept)


@pytest.mark.integration
def test_values_are_those_of_a_plain_reading():
    compared = Counter()
    for path in [p for root in ROOTS.values() for p in files(root) if is_dicom(p)]:
        try:
            pixels = read_frame(path).image.pixels
            with quiet():
                expected = plain(path)
        except DataError:
            continue
        if expected is not None:
            np.testing.assert_allclose(pixels[0], expected[1], rtol=1e-6)
            compared[expected[0]] += 1
    assert len(compared) >= 10  # transfer syntaxes
    assert compared.total() >= 60


def test_a_deflate_bomb_is_refused_within_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sniff, "_INFLATED", 64 << 20)  # the real limit takes half a minute
    file = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    file.add_new((0x0009, 0x0010), "LO", "PRIVATE")
    file.add_new((0x0009, 0x1001), "OB", bytes(80 << 20))
    path = tmp_path / "x.dcm"
    file.save_as(path)
    del file
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    with pytest.raises(DataError, match="too large"):
        read_frame(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_a_deflated_file_gives_the_plain_pixels(tmp_path):
    plain_path = Path(get_testdata_file("CT_small.dcm", download=False))
    file = pydicom.dcmread(plain_path)
    file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    file.save_as(tmp_path / "x.dcm")
    deflated, expected = read_frame(tmp_path / "x.dcm").image, read_frame(plain_path).image
    np.testing.assert_array_equal(deflated.pixels, expected.pixels)
    assert read_frame(Path(get_testdata_file("image_dfl.dcm", download=False))).image.pixels.any()
