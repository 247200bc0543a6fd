"""Stored pixels read at once: what pydicom reads, and frames that begin within a byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import ImplicitVRLittleEndian

from fedward.errors import DataError
from fedward_client.data.readers.dicom.pixels import open_dicom, read_frame, stored_values


def bits(path, make_dicom, frames, syntax=None):
    file = make_dicom(path, np.zeros((1, 1), np.uint8))
    file = pydicom.dcmread(file)
    file.NumberOfFrames, file.Rows, file.Columns = frames.shape
    file.BitsAllocated = file.BitsStored = 1
    file.HighBit = 0
    raw = np.packbits(frames.ravel(), bitorder="little").tobytes()
    file.PixelData = raw + b"\0" * (len(raw) % 2)
    if syntax is not None:
        file.file_meta.TransferSyntaxUID = syntax
    file.save_as(path)
    return path


@pytest.mark.parametrize("shape", [(3, 5, 5), (4, 7, 3), (2, 131, 131), (5, 1, 1), (2, 8, 8)])
@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian])
def test_frames_of_one_bit_may_begin_within_a_byte(tmp_path, make_dicom, shape, syntax):
    frames = np.random.default_rng(0).integers(0, 2, shape).astype(np.uint8)
    opened = open_dicom(bits(tmp_path / "x.dcm", make_dicom, frames, syntax))
    for k, frame in enumerate(frames):
        np.testing.assert_array_equal(stored_values(opened, k), frame)


def test_one_bit_in_big_endian():
    little, big = (
        stored_values(open_dicom(Path(get_testdata_file(name, download=False))), 0)
        for name in ("liver_1frame.dcm", "liver_expb_1frame.dcm")
    )
    assert little.any()
    np.testing.assert_array_equal(little, big)


def test_one_bit_that_is_cut_off_is_refused(tmp_path, make_dicom):
    path = bits(tmp_path / "x.dcm", make_dicom, np.ones((4, 20, 20), np.uint8))
    whole = path.read_bytes()
    for left in (whole[:-20], whole[: len(whole) - 190]):
        path.write_bytes(left)
        with pytest.raises(DataError, match="not readable"):
            read_frame(path, 3)
    with pytest.raises(DataError, match="not readable"):
        read_frame(path, 4)
    path.write_bytes(whole)
    assert read_frame(path, 3).image.pixels.all()


def test_samples_and_colours_that_disagree_are_a_reason(tmp_path, make_dicom):
    path = make_dicom(tmp_path / "x.dcm", np.zeros((4, 4, 3), np.uint8))
    file = pydicom.dcmread(path)
    file.PhotometricInterpretation = "MONOCHROME1"
    file.save_as(path)
    with pytest.raises(DataError, match="not readable"):
        read_frame(path)


def test_an_image_type_that_is_no_text_is_a_reason(tmp_path, make_dicom, make_plan):
    from fedward_client.data.readers.dicom.headers import read_headers

    path = make_dicom(tmp_path / "x.dcm", np.zeros((4, 4), np.uint8))
    file = pydicom.dcmread(path)
    file.add_new("ImageType", "AT", 0x00080008)
    file.save_as(path)
    headers, _, left_out = read_headers([path], tmp_path, make_plan().task)
    assert len(headers) + len(left_out) == 1


def test_lossless_jpeg_of_any_predictor_is_read(tmp_path):
    # No package has a file of process 14 as such; that of its first selection value is one too.
    file = pydicom.dcmread(get_testdata_file("JPEG-LL.dcm"))
    before = read_frame(Path(get_testdata_file("JPEG-LL.dcm"))).image.pixels
    file.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLossless
    file.save_as(tmp_path / "x.dcm")
    np.testing.assert_array_equal(read_frame(tmp_path / "x.dcm").image.pixels, before)
