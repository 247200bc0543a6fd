"""Pixels as writers in the field store them, against the values that were written."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image as Pillow
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from fedward_client.data.readers.dicom.pixels import read_frame
from fedward_client.data.sample import Image
from fedward_client.data.transforms import prepare_image

RNG = np.random.default_rng(8)
COLOURS = ("Red", "Green", "Blue")


def pixels(path: Path, frame: int = 0) -> np.ndarray:
    return read_frame(path, frame).image.pixels


def in_big_endian(path: Path) -> Path:
    file, other = pydicom.dcmread(path), pydicom.Dataset()
    for element in file:
        if element.VR == "OW":  # words, which pydicom writes as they are
            element.value = np.frombuffer(element.value, "<u2").astype(">u2").tobytes()
        other.add(element)
    other.file_meta = file.file_meta
    other.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    other.save_as(path, enforce_file_format=True)
    return path


def with_palette(
    make_dicom: Any, path: Path, stored: np.ndarray, tables: Any, bits: int, first: int = 0
) -> Path:
    make_dicom(path, stored, PhotometricInterpretation="PALETTE COLOR")
    file = pydicom.dcmread(path)
    for colour, table in zip(COLOURS, tables, strict=True):
        name = f"{colour}PaletteColorLookupTable"
        kind = "SS" if stored.dtype.kind == "i" else "US"
        file.add_new(f"{name}Descriptor", kind, [len(table) % 65536, first, bits])
        file.add_new(f"{name}Data", "OW", table.tobytes())
    file.save_as(path)
    return path


@pytest.mark.parametrize("big", [False, True], ids=["little", "big"])
@pytest.mark.parametrize(
    ("kind", "count", "bits", "top"),
    [
        ("<u2", 256, 16, 65535),
        ("<u2", 900, 16, 65535),
        ("u1", 256, 8, 255),
        ("u1", 900, 8, 255),
        ("<u2", 256, 8, 255),  # of one byte each in two
        ("<u2", 300, 16, 255),  # says 16 bits, has 8
    ],
)
def test_palettes(tmp_path, make_dicom, kind, count, bits, top, big):
    tables = RNG.integers(0, top + 1, (3, count)).astype(kind)
    stored = RNG.integers(0, count, (6, 8)).astype(np.uint16)
    path = with_palette(make_dicom, tmp_path / "a.dcm", stored, tables, bits)
    image = read_frame(in_big_endian(path) if big else path).image
    np.testing.assert_array_equal(image.pixels, tables[:, stored])
    assert image.window == (0.0, top)


def test_a_palette_whose_first_entry_is_for_a_negative_value(tmp_path, make_dicom):
    tables = RNG.integers(0, 65536, (3, 64)).astype("<u2")
    stored = RNG.integers(-40, 40, (6, 8)).astype(np.int16)
    path = with_palette(make_dicom, tmp_path / "a.dcm", stored, tables, 16, first=-32)
    np.testing.assert_array_equal(pixels(path), tables[:, np.clip(stored + 32, 0, 63)])


@pytest.mark.parametrize(
    ("slope", "intercept"), [(None, None), (None, -1024), (2, None), (0, 5), (0, 0)]
)
def test_a_rescale_that_says_nothing_changes_nothing(tmp_path, make_dicom, slope, intercept):
    stored = RNG.integers(0, 4000, (5, 7)).astype(np.int16)
    path = make_dicom(
        tmp_path / "a.dcm", stored, RescaleSlope=slope, RescaleIntercept=intercept, Modality="CR"
    )
    np.testing.assert_array_equal(pixels(path)[0], stored)


@pytest.mark.parametrize("syntax", [None, JPEG2000Lossless, JPEGLSLossless, RLELossless])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_bits_above_the_values_are_no_part_of_them(tmp_path, make_dicom, syntax, signed):
    values = RNG.integers(-2048 * signed, 4096 - 2048 * signed, (32, 32))
    stored = ((values & 0x0FFF) | (RNG.integers(0, 16, (32, 32)) << 12)).astype(np.uint16)
    path = make_dicom(tmp_path / "a.dcm", stored)
    file = pydicom.dcmread(path)
    if syntax is not None:
        file.compress(syntax, generate_instance_uid=False)
    file.BitsStored, file.HighBit, file.PixelRepresentation = 12, 11, int(signed)
    file.save_as(path)
    np.testing.assert_array_equal(pixels(path)[0], values)


@pytest.mark.parametrize("syntax", [None, JPEG2000Lossless, RLELossless])
def test_values_that_begin_above_the_lowest_bit(tmp_path, make_dicom, syntax):
    values = RNG.integers(0, 1024, (32, 32))
    path = make_dicom(tmp_path / "a.dcm", (values << 6).astype(np.uint16))
    file = pydicom.dcmread(path)
    if syntax is not None:
        file.compress(syntax, generate_instance_uid=False)
    file.BitsStored, file.HighBit = 10, 15
    file.save_as(path)
    np.testing.assert_array_equal(pixels(path)[0], values)


def test_a_high_bit_that_is_wrong_shifts_nothing(tmp_path, make_dicom):
    values = RNG.integers(0, 4096, (32, 32)).astype(np.uint16)
    path = make_dicom(tmp_path / "a.dcm", values)
    file = pydicom.dcmread(path)
    file.BitsStored, file.HighBit = 12, 15
    file.save_as(path)
    np.testing.assert_array_equal(pixels(path)[0], values)


def picture() -> np.ndarray:
    """A dark picture with a green disc and an orange stripe, smooth enough for JPEG."""
    y, x = np.mgrid[:48, :64]
    rgb = np.full((48, 64, 3), (6, 4, 8), np.uint8)
    rgb[(y - 24) ** 2 + (x - 20) ** 2 < 150] = (20, 200, 60)
    rgb[:, 44:56] = (230, 120, 10)
    return rgb


def unmarked(stream: bytes) -> bytes:
    """A JPEG stream without its application segments."""
    kept, place = stream[:2], 2
    while stream[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(stream[place + 2 : place + 4])
        kept += b"" if 0xE0 <= stream[place + 1] <= 0xEF else stream[place:end]
        place = end
    return kept + stream[place:]


def in_colour(make_dicom: Any, path: Path, stream: bytes, said: str, syntax: str) -> Path:
    make_dicom(path, picture())
    file = pydicom.dcmread(path)
    file.file_meta.TransferSyntaxUID = UID(syntax)
    file.PhotometricInterpretation = said
    file.PixelData = encapsulate([stream])
    file["PixelData"].VR = "OB"
    file.save_as(path)
    return path


def jpeg(ycc: bool, **options: Any) -> bytes:
    stream = BytesIO()
    Pillow.fromarray(picture()).save(stream, "JPEG", quality=95, keep_rgb=not ycc, **options)
    return stream.getvalue()


def renamed(stream: bytes) -> bytes:
    """The components of an RGB stream numbered, as some writers do."""
    return stream.replace(b"R\x11\x00G\x11\x00B\x11", b"\x01\x11\x00\x02\x11\x00\x03\x11").replace(
        b"R\x00G\x00B\x00", b"\x01\x00\x02\x00\x03\x00"
    )


@pytest.mark.parametrize("said", ["RGB", "YBR_FULL_422"])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_ycbcr_in_jpeg_without_a_marker(tmp_path, make_dicom, said, subsampling):
    stream = unmarked(jpeg(ycc=True, subsampling=subsampling))
    path = in_colour(make_dicom, tmp_path / "a.dcm", stream, said, JPEGBaseline8Bit)
    off = np.abs(pixels(path) - np.moveaxis(picture(), -1, 0))
    assert np.median(off) <= 3 and np.mean(off > 40) < 0.05


@pytest.mark.parametrize("numbered", [False, True])
def test_rgb_in_jpeg_without_a_marker(tmp_path, make_dicom, numbered):
    stream = unmarked(jpeg(ycc=False))
    stream = renamed(stream) if numbered else stream
    assert not numbered or b"\x01\x00\x02\x00\x03\x00" in stream
    path = in_colour(make_dicom, tmp_path / "a.dcm", stream, "RGB", JPEGBaseline8Bit)
    off = np.abs(pixels(path) - np.moveaxis(picture(), -1, 0))
    assert np.median(off) <= 3 and np.mean(off > 40) < 0.05


@pytest.mark.parametrize("said", ["RGB", "YBR_RCT", "YBR_ICT", "YBR_FULL"])
@pytest.mark.parametrize("transformed", [False, True])
def test_jpeg_2000_tells_its_colours_itself(tmp_path, make_dicom, said, transformed):
    stream = BytesIO()
    mct = {"mct": int(transformed), "irreversible": False, "no_jp2": True}
    Pillow.fromarray(picture()).save(stream, "JPEG2000", **mct)
    path = in_colour(make_dicom, tmp_path / "a.dcm", stream.getvalue(), said, JPEG2000Lossless)
    np.testing.assert_array_equal(pixels(path), np.moveaxis(picture(), -1, 0))


@pytest.mark.parametrize("number", [53, 55])
def test_retired_processes_of_jpeg(tmp_path, make_dicom, number):
    grey = picture()[..., 0]
    stream = BytesIO()
    Pillow.fromarray(grey).save(stream, "JPEG", quality=95, progressive=True)
    path = make_dicom(tmp_path / "a.dcm", grey)
    file = pydicom.dcmread(path)
    file.file_meta.TransferSyntaxUID = UID(f"1.2.840.10008.1.2.4.{number}")
    file.PixelData = encapsulate([stream.getvalue()])
    file["PixelData"].VR = "OB"
    file.save_as(path)
    assert np.abs(pixels(path)[0] - grey).mean() < 2


def test_12_bit_jpeg_whose_scan_ends_too_early():
    path = Path(get_testdata_file("JPEG-lossy.dcm", download=False))
    values = pixels(path)[0]
    # As GDCM decodes them (the values of pydicom's own test).
    assert values.shape == (1024, 256)
    assert (values[420, 140], values[230, 120]) == (244, 95)


def test_frames_of_a_long_file_are_found_without_a_table(tmp_path, make_dicom):
    stored = RNG.integers(0, 255, (40, 6, 7)).astype(np.uint8)
    path = make_dicom(tmp_path / "a.dcm", stored, frames=40)
    file = pydicom.dcmread(path)
    file.compress(RLELossless, generate_instance_uid=False)
    plain = pydicom.encaps.generate_frames(file.PixelData, number_of_frames=40)
    file.PixelData = encapsulate(list(plain), has_bot=False)
    file.save_as(path)
    for k in (39, 0, 17):
        np.testing.assert_array_equal(pixels(path, k)[0], stored[k])


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_zscore_whatever_the_unit(make_plan, unit):
    values = (RNG.uniform(1, 3, (1, 16, 16)) * unit).astype(np.float32)
    plan = make_plan(intensity="zscore")
    made = prepare_image(Image(values, (1.0, 1.0)), None, plan.task, plan.preprocessing).pixels
    assert (made.mean(), made.std()) == pytest.approx((0, 1), abs=1e-3)
    flat = np.full((1, 16, 16), 2.7 * unit, np.float32)
    made = prepare_image(Image(flat, (1.0, 1.0)), None, plan.task, plan.preprocessing).pixels
    assert np.abs(made).max() < 1e-6 * max(unit, 1)


def region(box: tuple[int, int, int, int], kind: int = 1, **more: Any) -> pydicom.Dataset:
    """An ultrasound region, left, top, right, bottom."""
    item = pydicom.Dataset()
    item.RegionSpatialFormat, item.RegionDataType = kind, 1
    names = ("MinX0", "MinY0", "MaxX1", "MaxY1")
    for name, end in zip(names, box, strict=True):
        setattr(item, f"RegionLocation{name}", end)
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX, item.PhysicalDeltaY = 0.02, 0.03
    for name, value in more.items():
        setattr(item, name, value)
    return item


def test_ultrasound_is_cut_to_its_regions(tmp_path, make_dicom, make_plan):
    stored = np.full((40, 50), 255, np.uint8)  # text and scales
    stored[10:34, 5:45] = RNG.integers(0, 100, (24, 40))
    items = [region((5, 10, 24, 33)), region((20, 12, 44, 25)), region((0, 0, 49, 8), kind=5)]
    path = make_dicom(tmp_path / "a.dcm", stored, Modality="US", SequenceOfUltrasoundRegions=items)
    image = read_frame(path).image
    assert image.pixels.shape == (1, 40, 50)
    assert (image.spacing, image.measured) == ((0.3, 0.2), True)
    mask = np.zeros((40, 50), np.uint8)
    mask[10:12, 5:9] = 1
    plan = make_plan("segmentation", size=(24, 40), intensity="unit")
    made = prepare_image(image, mask, plan.task, plan.preprocessing)
    inside = stored[10:34, 5:45].astype(np.float32)
    expected = (inside - inside.min()) / np.ptp(inside)
    np.testing.assert_allclose(made.pixels[0], expected, atol=1e-6)
    np.testing.assert_array_equal(made.mask, mask[10:34, 5:45])


@pytest.mark.parametrize(
    "items",
    [
        [],
        [region((0, 0, 49, 39))],  # the whole frame
        [region((3, 3, 5, 5))],  # no picture
        [region((30, 30, 10, 10))],  # the wrong way round
        [region((0, 0, 9, 9), RegionLocationMaxX1=None)],
    ],
)
def test_regions_that_say_nothing_cut_nothing(tmp_path, make_dicom, items):
    stored = RNG.integers(0, 200, (40, 50)).astype(np.uint8)
    path = make_dicom(tmp_path / "a.dcm", stored, SequenceOfUltrasoundRegions=items)
    assert read_frame(path).image.region is None


@pytest.mark.parametrize(
    ("tags", "spacing", "measured"),
    [
        ({}, (1.0, 1.0), False),
        ({"PixelSpacing": [0.5, 0.4], "ImagerPixelSpacing": [0.2, 0.2]}, (0.5, 0.4), True),
        ({"ImagerPixelSpacing": [0.2, 0.3]}, (0.2, 0.3), True),
        (
            {"ImagerPixelSpacing": [0.2, 0.3], "EstimatedRadiographicMagnificationFactor": 1.25},
            (0.16, 0.24),
            True,
        ),
        (
            {"ImagerPixelSpacing": [0.2, 0.3], "EstimatedRadiographicMagnificationFactor": 0},
            (0.2, 0.3),
            True,
        ),
        ({"PixelAspectRatio": [4, 3]}, (4 / 3, 1.0), False),
        ({"SequenceOfUltrasoundRegions": [region((0, 0, 9, 9))]}, (0.3, 0.2), True),
        (  # seconds along a trace
            {"SequenceOfUltrasoundRegions": [region((0, 0, 9, 9), PhysicalUnitsXDirection=4)]},
            (1.0, 1.0),
            False,
        ),
        (
            {
                "SequenceOfUltrasoundRegions": [
                    region((0, 0, 9, 9)),
                    region((10, 0, 19, 9), PhysicalDeltaX=0.01),
                ]
            },
            (1.0, 1.0),
            False,
        ),
    ],
)
def test_what_stands_for_the_spacing(tmp_path, make_dicom, tags, spacing, measured):
    path = make_dicom(tmp_path / "a.dcm", RNG.integers(0, 200, (20, 20)).astype(np.uint8), **tags)
    image = read_frame(path).image
    assert (image.spacing, image.measured) == (pytest.approx(spacing), measured)
