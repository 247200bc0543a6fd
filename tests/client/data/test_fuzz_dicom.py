"""Broken and odd DICOM: an image or a counted reason, whatever the bytes.

``FEDWARD_FUZZ`` multiplies the number of cases.
"""

from __future__ import annotations

import io
import os
import random
import re
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from fedward.errors import DataError
from fedward.rule_codes import REASONS
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.headers import read_headers
from fedward_client.data.readers.dicom.pixels import read_frame
from fedward_client.data.readers.dicom.sniff import check_mask

TIMES = int(os.environ.get("FEDWARD_FUZZ", "1"))
# One of each way to store pixels; small, so that thousands of cases take seconds.
SEEDS = (
    "CT_small.dcm",
    "MR_small_RLE.dcm",
    "MR_small_bigendian.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "JPEG2000.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "examples_palette.dcm",
    "image_dfl.dcm",
    "liver_1frame.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "emri_small.dcm",
)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bytes changed, or a piece cut, doubled, moved or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        # Most of what matters is in the header; the pixels get their share.
        top = min(len(data), 2500) if rng.random() < 0.7 else len(data)
        at, length = rng.randrange(max(1, top)), rng.choice((1, 2, 4, 32, 400))
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at : at + length] = rng.choice((b"\xff", b"\x00")) * length
            case _:
                del data[at:]
        if not data:
            return b""
    return bytes(data)


def any_task(make_plan: Any) -> Any:
    """A task that takes every modality."""
    return make_plan().task.model_copy(update={"modality": ("any",)})


def outcome(path: Path, task: object) -> str:
    """What becomes of a file; raises only what no file may cause."""
    headers, _, left_out = read_headers([path], path.parent, task)  # type: ignore[arg-type]
    for item in left_out:
        assert item.reason in REASONS
    try:  # also what the reader leaves out for its header, such as a missing patient
        image = read_frame(path, 0).image
    except DataError as error:
        assert error.rule in REASONS
        return "reason"
    assert image.pixels.ndim == 3 and image.pixels.dtype == np.float32
    assert len(image.spacing) == 2 and all(header.frames >= 1 for header in headers)
    return "image" if headers else "reason"


@pytest.mark.integration
@pytest.mark.parametrize("name", SEEDS)
def test_changed_bytes_end_in_an_image_or_a_reason(tmp_path, make_plan, name):
    content = Path(get_testdata_file(name)).read_bytes()[:400_000]
    task = any_task(make_plan)
    rng, path, ends = random.Random(name), tmp_path / "x.dcm", {"image": 0, "reason": 0}
    for _ in range(100 * TIMES):
        path.write_bytes(mutated(content, rng))
        began = time.monotonic()
        ends[outcome(path, task)] += 1
        assert time.monotonic() - began < 20
    assert ends["image"] + ends["reason"] == 100 * TIMES
    assert [file.name for file in tmp_path.iterdir()] == ["x.dcm"]


ODD = {
    "Rows": (0, 1, 65535, 60000, ""),
    "Columns": (0, 1, 65535, 60000),
    "BitsAllocated": (1, 8, 16, 32, 7, 0),
    "BitsStored": (0, 1, 12, 16, 40),
    "HighBit": (0, 15, 99),
    "PixelRepresentation": (0, 1, 7),
    "SamplesPerPixel": (0, 1, 3, 4, 200),
    "NumberOfFrames": (0, -3, 1, 2, 1_000_000, "x"),
    "PhotometricInterpretation": ("MONOCHROME1", "PALETTE COLOR", "RGB", "YBR_FULL", "NONE", ""),
    "RescaleSlope": (0, 1e300, -1),
    "RescaleIntercept": (1e300, -1024),
    "WindowWidth": (0, -5, 1),
    "WindowCenter": (0, 1e300),
    "PixelSpacing": ([0, 0], [1, 2], [-1, 1]),
    "ImageOrientationPatient": ([0] * 6, [1, 0, 0, 1, 0, 0], [1e300] * 6),
    "ImagePositionPatient": ([1e300] * 3, [0, 0, 0]),
    "PixelPaddingValue": (0, 65535),
    "ImageType": ("", ["A", "B", "LOCALIZER"]),
    "PatientID": ("", "x" * 64),
    "Modality": ("", "CT"),
}


@pytest.mark.integration
def test_odd_attributes_end_in_an_image_or_a_reason(tmp_path, make_plan):
    base, task = get_testdata_file("CT_small.dcm"), any_task(make_plan)
    rng, path, ends = random.Random(3), tmp_path / "x.dcm", set()
    for _ in range(600 * TIMES):
        with quiet():
            file = pydicom.dcmread(base)
            for name in rng.sample(sorted(ODD), rng.choice((1, 2, 3, 6))):
                try:
                    setattr(file, name, rng.choice(ODD[name]))
                    if rng.random() < 0.1:
                        delattr(file, name)
                except (ValueError, TypeError):
                    continue  # pydicom itself refuses to write this value
            try:
                file.save_as(path)
            except Exception:
                continue
        ends.add(outcome(path, task))
    assert ends == {"image", "reason"}


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    file = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    file.Rows = file.Columns = 60_000
    file.save_as(tmp_path / "x.dcm")
    began = time.monotonic()
    with pytest.raises(DataError, match="too large"):
        read_frame(tmp_path / "x.dcm")
    assert time.monotonic() - began < 2


def test_a_panic_of_a_decoder_is_a_reason(tmp_path):
    # One more byte than the rows and columns have room for: the RLE decoder panics over it.
    file = pydicom.dcmread(get_testdata_file("MR_small_RLE.dcm"))
    file.Rows -= 1
    file.save_as(tmp_path / "x.dcm")
    with pytest.raises(DataError, match="not readable"):
        read_frame(tmp_path / "x.dcm")


@pytest.mark.parametrize(("levels", "end"), [(50, "image"), (300, "reason"), (3000, "reason")])
def test_a_deep_nest_is_bounded(tmp_path, make_plan, levels, end):
    raw = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    at = raw.index(struct.pack("<HH", 0x0010, 0x0010))  # before PatientName
    start = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    start += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    stop = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    path = tmp_path / "x.dcm"
    path.write_bytes(raw[:at] + start * levels + stop * levels + raw[at:])
    began = time.monotonic()
    assert outcome(path, any_task(make_plan)) == end
    assert time.monotonic() - began < 10


# --- masks --------------------------------------------------------------------------------------


def mask_outcome(root: Path, task: Any) -> str:
    """What becomes of a series with one file of masks; raises only what no file may cause."""
    try:
        dataset = read_dataset(DatasetSpec(root, "dicom"), task)
    except DataError as error:
        assert "must hold images" in error.rule or "need masks" in error.rule
        assert set(re.findall(r"([a-z][a-z -]+): \d", str(error.value))) <= {
            reason.lower() for reason in REASONS
        }
        return "reason"
    ends = set()
    for sample in dataset.samples:
        try:
            mask = sample.mask()
        except DataError as error:
            assert error.rule in REASONS
            ends.add("reason")
        else:
            assert mask.dtype == np.uint8
            assert mask.max(initial=0) <= len(task.classes)
            ends.add("mask")
    return "mask" if "mask" in ends else "reason"


def write_masks(kind: str, path: Path, images: list[Any], make_seg: Any, make_structures: Any):
    masks = np.zeros((3, 10, 12), np.uint8)
    masks[:, 2:6, 3:8] = 1
    if kind == "contours":
        corners = np.array([[-18.0, 17], [-12, 17], [-12, 20], [-18, 20]])
        points = [np.column_stack([corners, np.full(4, 40 + 2.5 * k)]) for k in range(3)]
        make_structures(path, images, {"lung": list(zip(points, images, strict=True))})
    else:
        make_seg(path, images, masks, ["lung"], kind=kind)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["contours", "BINARY", "LABELMAP"])
def test_changed_masks_end_in_a_mask_or_a_reason(
    tmp_path, make_plan, make_ct, make_seg, make_structures, kind
):
    path, rng, ends = tmp_path / "m.dcm", random.Random(kind), {"mask": 0, "reason": 0}
    write_masks(kind, path, make_ct(tmp_path / "ct", 3), make_seg, make_structures)
    content = path.read_bytes()
    task = make_plan("segmentation", size=(8, 8, 8)).task
    for _ in range(150 * TIMES):
        path.write_bytes(mutated(content, rng))
        began = time.monotonic()
        ends[mask_outcome(tmp_path, task)] += 1
        assert time.monotonic() - began < 20
    assert min(ends.values()) > 0


ODD_ANYWHERE = (
    ("ContourData", ["1e300"] * 12),
    ("ContourData", ["1", "2"]),
    ("ContourData", []),
    ("ContourData", ["0"] * 12),
    ("ContourGeometricType", "POINT"),
    ("ContourGeometricType", ""),
    ("NumberOfContourPoints", 2_147_483_647),
    ("NumberOfContourPoints", -1),
    ("ContourImageSequence", []),
    ("ReferencedSOPInstanceUID", "1.2.3"),
    ("ROINumber", 99),
    ("ReferencedROINumber", -5),
    ("ROIName", ""),
    ("ROIName", "LUNG"),
    ("ContourSequence", []),
    ("ReferencedFrameNumber", 77),
    ("ReferencedFrameOfReferenceUID", "1.2.3"),
    ("FrameOfReferenceUID", ""),
    ("SeriesInstanceUID", "1.2.3"),
    ("ReferencedSeriesSequence", []),
    ("ImagePositionPatient", [1e300] * 3),
    ("ImagePositionPatient", [0, 0, 1e9]),
    ("ImageOrientationPatient", [0] * 6),
    ("ImageOrientationPatient", [0, 1, 0, 0, 0, -1]),
    ("PixelSpacing", [1e-9, 1e-9]),
    ("PixelSpacing", [0, -1]),
    ("PixelSpacing", [9, 9]),
    ("SpacingBetweenSlices", 1e-9),
    ("SpacingBetweenSlices", 1e300),
    ("SliceThickness", -1),
    ("SegmentNumber", 0),
    ("ReferencedSegmentNumber", 9),
    ("SegmentationType", "FRACTIONAL"),
    ("SegmentationType", "LABELMAP"),
    ("MaximumFractionalValue", 0),
    ("Rows", 65535),
    ("Rows", 3),
    ("NumberOfFrames", 2_147_483_647),
    ("BitsAllocated", 16),
    ("DerivationImageSequence", []),
)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["contours", "BINARY", "LABELMAP"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_odd_masks_end_in_a_mask_or_a_reason(
    tmp_path, make_plan, make_ct, make_seg, make_structures, kind, dimensions
):
    path, rng, ends = tmp_path / "m.dcm", random.Random(kind), {"mask": 0, "reason": 0}
    write_masks(kind, path, make_ct(tmp_path / "ct", 3), make_seg, make_structures)
    content = path.read_bytes()
    task = make_plan("segmentation", size=(8,) * dimensions).task
    for _ in range(100 * TIMES):
        with quiet():
            file = pydicom.dcmread(io.BytesIO(content))
            changes = dict(rng.sample(ODD_ANYWHERE, rng.choice((1, 2, 4))))
            often = rng.choice((0.3, 1.0))

            def change(item, element, changes=changes, often=often):
                if element.keyword in changes and rng.random() < often:
                    if rng.random() < 0.15:
                        del item[element.tag]
                    else:
                        element.value = changes[element.keyword]

            file.walk(change)
            for name in ("SpacingBetweenSlices", "ReferencedSeriesSequence"):
                if name in changes and rng.random() < 0.2:
                    setattr(file, name, changes[name])
            try:
                file.save_as(path)
            except Exception:
                continue
        began = time.monotonic()
        ends[mask_outcome(tmp_path, task)] += 1
        assert time.monotonic() - began < 20
    assert min(ends.values()) > 0


def test_a_file_of_more_items_than_memory_has_room_for(tmp_path, make_ct, make_structures):
    path = tmp_path / "m.dcm"
    make_structures(path, make_ct(tmp_path / "ct", 3), {"lung": [np.zeros((3, 3))]})
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    start = struct.pack("<HH2sHI", 0x3006, 0x0086, b"SQ", 0, len(item) * 2_100_000)
    path.write_bytes(path.read_bytes() + start + item * 2_100_000)
    began = time.monotonic()
    with pytest.raises(DataError, match="too large"):
        check_mask(path)
    assert time.monotonic() - began < 5
