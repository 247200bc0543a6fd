"""A hospital's export whose contents are known, file by file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset

from fedward_client.data.quiet import quiet

PLANTED = ("DOE^JANE", "MRN4711", "1.2.826.0.99.4711", "19550712", "ward-7-doe", "ACC99123")


def write_dx(path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    """A small radiograph with someone's name, birth date and numbers in it."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = tags.get("SOPInstanceUID", pydicom.uid.generate_uid())
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    values = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "Modality": "DX",
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "PatientName": "DOE^JANE",
        "PatientID": "MRN4711",
        "PatientBirthDate": "19550712",
        "AccessionNumber": "ACC99123",
        "StudyInstanceUID": "1.2.826.0.99.4711.1",
        "SeriesInstanceUID": "1.2.826.0.99.4711.2",
        "StudyDate": "19550712",
        "Manufacturer": "ACME",
        "BodyPartExamined": "CHEST",
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PixelSpacing": [0.5, 0.5],
        "PixelData": pixels.astype(np.uint16).tobytes(),
        **tags,
    }
    if pixels.ndim == 3:
        values["NumberOfFrames"] = len(pixels)
    for name, value in values.items():
        setattr(file, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def write_structures(
    path: Path, images: list[Any], regions: dict[str, list[Any]], **tags: Any
) -> Path:
    """A structure set: of each region by name its contours, as points ``(N, 3)`` or (points, image)
    or (points, image, type)."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = tags.pop("syntax", pydicom.uid.ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = pydicom.uid.RTStructureSetStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    first = images[0]
    series, study, space = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    study.RTReferencedSeriesSequence = [series]
    space.FrameOfReferenceUID = first.FrameOfReferenceUID
    space.RTReferencedStudySequence = [study]
    values = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "Modality": "RTSTRUCT",
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "PatientID": first.PatientID,
        "PatientName": "DOE^JANE",
        "StudyInstanceUID": first.StudyInstanceUID,
        "SeriesInstanceUID": pydicom.uid.generate_uid(),
        "StructureSetLabel": "DOE^JANE",
        "ReferencedFrameOfReferenceSequence": [space],
        "StructureSetROISequence": [],
        "ROIContourSequence": [],
        **tags,
    }
    for name, value in values.items():
        if value is not None:
            setattr(file, name, value)
    for number, (name, contours) in enumerate(regions.items(), start=1):
        region, drawn = Dataset(), Dataset()
        region.ROINumber, region.ROIName = number, name
        region.ReferencedFrameOfReferenceUID = first.FrameOfReferenceUID
        drawn.ReferencedROINumber = number
        drawn.ContourSequence = [_contour(one) for one in contours]
        file.StructureSetROISequence.append(region)
        file.ROIContourSequence.append(drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def _contour(one: Any) -> Dataset:
    points, image, kind = (*one, None, None)[:3] if isinstance(one, tuple) else (one, None, None)
    item = Dataset()
    item.ContourGeometricType = kind or "CLOSED_PLANAR"
    item.NumberOfContourPoints = len(points)
    with quiet():  # pydicom warns of numbers that are none
        item.ContourData = [f"{value:.8g}" for value in np.asarray(points, float).ravel()]
    if image is not None:
        source = Dataset()
        source.ReferencedSOPClassUID = image.SOPClassUID
        source.ReferencedSOPInstanceUID = image.SOPInstanceUID
        item.ContourImageSequence = [source]
    return item


@pytest.fixture(scope="session")
def make_structures() -> Callable[..., Path]:
    """Writes a structure set."""
    return write_structures


@pytest.fixture
def dx() -> Callable[..., Path]:
    """Writes a radiograph."""
    return write_dx


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Twelve radiographs of six patients, and all that an export has beside them."""
    root = tmp_path / "ward-7-doe"
    rng = np.random.default_rng(0)
    rows = ["PatientID,label"]
    for patient in range(6):
        name = f"MRN4711{patient}"
        rows.append(f"{name},{'sick' if patient % 2 else 'well'}")
        for shot in range(2):
            write_dx(
                root / name / f"DOE^JANE-{shot}.dcm",
                rng.integers(0, 4096, (12, 10)),
                PatientID=name,
                PatientName=f"DOE^JANE^{patient}",
                SeriesInstanceUID=f"1.2.826.0.99.4711.{patient}",
                StudyInstanceUID=f"1.2.826.0.99.4711.9.{patient}",
            )
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    first = root / "MRN47110" / "DOE^JANE-0.dcm"
    (root / "odd").mkdir()
    (root / "odd" / "empty.dcm").write_bytes(b"")
    (root / "odd" / "letter.txt").write_text("Dear DOE^JANE")
    (root / "odd" / "cut.dcm").write_bytes(first.read_bytes()[:-40])
    shutil.copy(get_testdata_file("rtplan.dcm"), root / "odd" / "plan.dcm")
    huge = pydicom.dcmread(first)
    huge.Rows = huge.Columns = 60_000
    huge.save_as(root / "odd" / "huge.dcm")
    os.mkfifo(root / "odd" / "pipe")
    (root / "odd" / "loop").symlink_to(root)
    (root / "odd" / "away.dcm").symlink_to(get_testdata_file("CT_small.dcm"))
    return root


@pytest.fixture
def site(tmp_path: Path, export: Path) -> Path:
    """The configuration of a hospital with that export."""
    path = tmp_path / "site.toml"
    path.write_text(
        f"""
version = 1
[site]
name = "st-mary"
[datasets.chest]
root = "{export.name}"
format = "dicom"
task = "classification"
classes = ["well", "sick"]
modality = ["DX"]
minimum_patients = 4
""",
        "utf-8",
    )
    return path
