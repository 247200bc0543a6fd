"""Models and DICOM series to predict on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from fedward.integrity import about_model
from fedward.models import build_model, save_model, to_arrays
from fedward.plan.load import plan_from
from fedward.plan.schema import Plan

SPACING = (0.7, 0.9)
GAP = 2.5


def build_plan(kind: str, size: tuple[int, ...], modality: str, **preprocessing: Any) -> Plan:
    masks = kind == "segmentation"
    return plan_from(
        {
            "version": 1,
            "study": {"name": "lungs", "intended_use": "Research."},
            "task": {
                "kind": kind,
                "dimensions": len(size),
                "classes": ["lung", "heart"] if masks else ["well", "sick"],
                "modality": [modality],
            },
            "preprocessing": {"size": list(size), **preprocessing},
            "model": {"name": "unet" if masks else "cnn"},
            "training": {
                "rounds": 1,
                "learning_rate": 0.1,
                "local_epochs": 1,
                "loss": "dice_ce" if masks else "cross_entropy",
            },
            "privacy": {"mechanism": "none"},
            "metrics": {
                "report": ["dice" if masks else "auc"],
                "primary": "dice" if masks else "auc",
            },
        }
    )


def build_file(path: Path, plan: Plan, seed: int = 1) -> Path:
    arrays = to_arrays(build_model(plan, seed))
    save_model(path, arrays, about_model("study-1", plan, "shared"))
    return path


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    return build_plan


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """Writes the file of a model with random weights."""
    return build_file


@pytest.fixture
def chest(tmp_path: Path) -> Path:
    """A classifier of radiographs."""
    return build_file(tmp_path / "model.safetensors", build_plan("classification", (16, 16), "DX"))


def write_ct(
    folder: Path,
    values: np.ndarray,
    along: Any = (1, 0, 0),
    down: Any = (0, 1, 0),
    aside: Any = (0, 0, 0),
    **tags: Any,
) -> Path:
    """A CT series ``(D, H, W)`` whose file names say nothing of the order; with ``frames`` one
    enhanced file."""
    frames = tags.pop("frames", False)
    normal = np.cross(along, down)
    corners = [
        np.round(np.array([-20.0, 15.0, 40.0]) + normal * GAP * k + np.array(aside) * k, 6)
        for k in range(len(values))
    ]
    folder.mkdir(parents=True)
    series = generate_uid()
    if frames:
        file = _file(folder / "all.dcm", values, series, EnhancedCTImageStorage, tags)
        file.NumberOfFrames = len(values)
        shared, plane, sizes = Dataset(), Dataset(), Dataset()
        plane.ImageOrientationPatient = [*along, *down]
        sizes.PixelSpacing, sizes.SliceThickness = list(SPACING), GAP
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [plane], [sizes]
        file.SharedFunctionalGroupsSequence = [shared]
        file.PerFrameFunctionalGroupsSequence = []
        for corner in corners:
            own, place = Dataset(), Dataset()
            place.ImagePositionPatient = list(corner)
            own.PlanePositionSequence = [place]
            file.PerFrameFunctionalGroupsSequence.append(own)
        pydicom.dcmwrite(file.filename, file, enforce_file_format=True)
        return folder
    for name, k in enumerate(np.random.default_rng(3).permutation(len(values))):
        file = _file(folder / f"{name:03d}.dcm", values[k], series, CTImageStorage, tags)
        file.ImageOrientationPatient = [*along, *down]
        file.PixelSpacing = list(SPACING)
        file.ImagePositionPatient = list(corners[k])
        file.InstanceNumber = name + 1
        pydicom.dcmwrite(file.filename, file, enforce_file_format=True)
    return folder


def _file(path: Path, values: np.ndarray, series: str, kind: str, tags: Any) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    facts = {
        "SOPClassUID": kind,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": "1.2.76",
        "SeriesInstanceUID": series,
        "FrameOfReferenceUID": "1.2.78",
        "PatientID": "MRN4711",
        "PatientName": "DOE^JANE",
        "PatientSex": "F",
        "PatientBirthDate": "19550712",
        "StudyDate": "20200101",
        "StudyTime": "101010",
        "StudyID": "7",
        "Modality": "CT",
        "Rows": values.shape[-2],
        "Columns": values.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelData": values.astype(np.int16).tobytes(),
        **tags,
    }
    for name, value in facts.items():
        setattr(file, name, value)
    return file


@pytest.fixture(scope="session")
def ct() -> Callable[..., Path]:
    return write_ct
