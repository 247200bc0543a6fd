"""Headers that would fill the memory of whoever only lists a dataset."""

from __future__ import annotations

import struct
import time
import tracemalloc

import numpy as np
import pydicom
import pytest

from client.data.decode import read_frame
from client.data.read import DatasetSpec, read_dataset
from client.data.stored import open_dicom
from client.index.extract import Extractor
from fedward.errors import DataError


def test_an_image_of_more_items_than_its_header_may_have(tmp_path, make_dicom, make_plan):
    """In an undefined length: 17 seconds and 1.5 GB of the process that only reads headers."""
    path = make_dicom(tmp_path / "x.dcm", np.ones((8, 8), np.uint16))
    make_dicom(tmp_path / "good.dcm", np.ones((8, 8), np.uint16))
    raw = path.read_bytes()
    place = raw.rindex(b"\xe0\x7f\x10\x00")
    items = struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 1_000_000
    start = struct.pack("<HH2sHI", 0x5400, 0x0100, b"SQ", 0, 0xFFFFFFFF)
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    path.write_bytes(raw[:place] + start + items + end + raw[place:])
    (tmp_path / "labels.csv").write_text("PatientID,label\nP1,sick\n")
    began = time.monotonic()
    dataset = read_dataset(DatasetSpec(tmp_path, "dicom"), make_plan().task)
    assert len(dataset.samples) == 1
    assert [(item.reason, item.name) for item in dataset.left_out] == [("too large", "x.dcm")]
    for open_it in (read_frame, open_dicom):
        with pytest.raises(DataError, match="too large"):
            open_it(path)
    facts = Extractor(tmp_path, "dicom", b"k" * 32)(path)
    assert facts.reason == "too large" and len(facts.digest) == 64
    assert time.monotonic() - began < 5


def test_a_value_longer_than_a_header_needs(tmp_path, make_dicom, make_plan):
    path = make_dicom(tmp_path / "x.dcm", np.ones((8, 8), np.uint16))
    file = pydicom.dcmread(path)
    file.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    file.save_as(path, implicit_vr=True, enforce_file_format=True)
    raw, values = path.read_bytes(), b"A\\" * 2_000_000
    place = raw.index(struct.pack("<HH", 0x0008, 0x0016))
    path.write_bytes(raw[:place] + struct.pack("<HHI", 8, 8, len(values)) + values + raw[place:])
    (tmp_path / "labels.csv").write_text("PatientID,label\nP1,sick\n")
    tracemalloc.start()
    dataset = read_dataset(DatasetSpec(tmp_path, "dicom"), make_plan().task, empty=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.reason for item in dataset.left_out] == ["too large"]
    assert peak < 8 << 20
