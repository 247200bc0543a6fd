"""Headers that would fill the memory of whoever only lists a dataset."""

from __future__ import annotations

import struct
import time
import tracemalloc

import numpy as np
import pydicom
import pytest

from fedward.errors import DataError
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.readers.dicom import sniff
from fedward_client.data.readers.dicom.pixels import open_dicom, read_frame
from fedward_client.index.extract import Extractor


def with_items(path, count, length):
    """Empty items in a sequence before the pixels; of unknown length where that is None."""
    raw = path.read_bytes()
    place = raw.rindex(b"\xe0\x7f\x10\x00")
    items = struct.pack("<HHI", 0xFFFE, 0xE000, 0) * count
    whole = 0xFFFFFFFF if length is None else len(items)
    start = struct.pack("<HH2sHI", 0x5400, 0x0100, b"SQ", 0, whole)
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0) if length is None else b""
    path.write_bytes(raw[:place] + start + items + end + raw[place:])


@pytest.mark.parametrize("length", [None, "known"])
def test_an_image_of_more_items_than_its_header_may_have(tmp_path, make_dicom, make_plan, length):
    """In an unknown length: 17 seconds and 1.5 GB of the process that only reads headers."""
    path = make_dicom(tmp_path / "x.dcm", np.ones((8, 8), np.uint16))
    make_dicom(tmp_path / "good.dcm", np.ones((8, 8), np.uint16))
    with_items(path, 1_000_000, length)
    (tmp_path / "labels.csv").write_text("PatientID,label\nP1,sick\n")
    began = time.process_time()
    dataset = read_dataset(DatasetSpec(tmp_path, "dicom"), make_plan().task)
    if length is None:  # else the sequence is passed over
        assert [(item.reason, item.name) for item in dataset.left_out] == [("too large", "x.dcm")]
    for open_it in (read_frame, open_dicom):
        with pytest.raises(DataError, match="too large"):
            open_it(path)
    facts = Extractor(tmp_path, "dicom", b"k" * 32)(path)
    assert facts.reason == "too large" and len(facts.digest) == 64
    assert time.process_time() - began < 8


def test_many_items_are_no_too_many(tmp_path, make_dicom):
    path = make_dicom(tmp_path / "x.dcm", np.ones((8, 8), np.uint16))
    with_items(path, 30_000, None)
    assert read_frame(path).image.pixels.max() == 1


def test_a_header_of_elements_without_end(tmp_path, make_dicom, make_plan, monkeypatch):
    monkeypatch.setattr(sniff, "_READS", 10_000)  # the real limit takes 20 seconds
    path = make_dicom(tmp_path / "x.dcm", np.ones((8, 8), np.uint16))
    raw = path.read_bytes()
    place = raw.rindex(b"\xe0\x7f\x10\x00")
    elements = b"".join(struct.pack("<HH2sH", 0x5401, 4096 + k, b"CS", 0) for k in range(20_000))
    path.write_bytes(raw[:place] + elements + raw[place:])
    (tmp_path / "labels.csv").write_text("PatientID,label\nP1,sick\n")
    dataset = read_dataset(DatasetSpec(tmp_path, "dicom"), make_plan().task, empty=True)
    assert [item.reason for item in dataset.left_out] == ["too large"]
    with pytest.raises(DataError, match="too large"):
        read_frame(path)


def test_who_lists_a_dataset_reads_no_pixels(tmp_path, make_dicom, make_plan, monkeypatch):
    make_dicom(tmp_path / "x.dcm", np.ones((3000, 3000), np.uint16))
    (tmp_path / "labels.csv").write_text("PatientID,label\nP1,sick\n")
    monkeypatch.setattr(sniff, "_plain", lambda *_: pytest.fail("the file was read"))
    assert len(read_dataset(DatasetSpec(tmp_path, "dicom"), make_plan().task).samples) == 1


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
