"""Builders of plans and of DICOM files whose pixel values are known."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from fedward.plan.load import plan_from
from fedward.plan.schema import Plan
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.options import MaskOptions


def build_plan(
    kind: str = "classification",
    classes: list[str] | None = None,
    size: tuple[int, ...] = (16, 16),
    split: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    **preprocessing: Any,
) -> Plan:
    segmentation = kind == "segmentation"
    multi = bool(task and task.get("multi_label"))
    loss = "dice_ce" if segmentation else "bce" if multi else "cross_entropy"
    metric = "dice" if segmentation else "auc"
    return plan_from(
        {
            "version": 1,
            "study": {"name": "test"},
            "task": {
                "kind": kind,
                "dimensions": len(size),
                "classes": classes or (["lung"] if segmentation else ["normal", "sick"]),
                **(task or {}),
            },
            "preprocessing": {"size": list(size), **preprocessing},
            "split": split or {},
            "model": {"name": "unet" if segmentation else "cnn"},
            "training": {"rounds": 1, "learning_rate": 0.1, "local_epochs": 1, "loss": loss},
            "privacy": {"mechanism": "none"},
            "metrics": {"report": [metric], "primary": metric},
        }
    )


def build_dicom(path: Path, stored: np.ndarray, **tags: Any) -> Path:
    """A minimal secondary capture with the stored values as they are."""
    frames = tags.pop("frames", None)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = tags.get("SOPInstanceUID", generate_uid())
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    shape = stored.shape[1:] if frames else stored.shape
    ds.SOPClassUID, ds.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.PatientID, ds.Modality, ds.AccessionNumber = "P1", "CT", ""
    ds.Rows, ds.Columns = shape[:2]
    ds.SamplesPerPixel = shape[2] if len(shape) == 3 else 1
    ds.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    if len(shape) == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = 8 * stored.dtype.itemsize
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    if frames:
        ds.NumberOfFrames = frames
    ds.PixelData = stored.tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.HighBit = ds.BitsStored - 1
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


ROWS, COLUMNS = 10, 12


def build_ct(
    folder: Path, count: int = 5, rows: int = ROWS, columns: int = COLUMNS, **tags: Any
) -> list[Any]:
    """A CT series in order of position, 2.5 mm apart; its file names are in another order."""
    values = np.random.default_rng(0).integers(0, 900, (count, rows, columns)).astype(np.int16)
    names = np.random.default_rng(4).permutation(count)
    for k in range(count):
        facts = {
            "SOPClassUID": pydicom.uid.CTImageStorage,
            "SeriesInstanceUID": "1.2.77",
            "StudyInstanceUID": "1.2.76",
            "FrameOfReferenceUID": "1.2.78",
            "PixelSpacing": [0.7, 0.9],
            "SliceThickness": 2.5,
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [-20, 15, 40 + 2.5 * k],
            "PatientName": "",
            "PatientBirthDate": "",
            "PatientSex": "",
            "StudyID": "1",
            "StudyDate": "20200101",
            "StudyTime": "101010",
            "ReferringPhysicianName": "",
            "AccessionNumber": "",
            **tags,
        }
        build_dicom(folder / f"{names[k]:03d}.dcm", values[k], **facts)
    files = [pydicom.dcmread(path) for path in folder.glob("*.dcm")]
    return sorted(files, key=lambda file: float(file.ImagePositionPatient[2]))


def build_seg(
    path: Path, images: list[Any], masks: np.ndarray, names: list[str], **more: Any
) -> Any:
    """Masks ``(D, H, W, S)``, or ``(D, H, W)`` of numbers, as a segmentation of these segments."""
    kind = more.pop("kind", hd.seg.SegmentationTypeValues.BINARY)
    tool = hd.AlgorithmIdentificationSequence("t", codes.DCM.ArtificialIntelligence, "1")
    described = [
        hd.seg.SegmentDescription(
            number,
            name,
            codes.SCT.Tissue,
            codes.SCT.Tissue,
            hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            tool,
        )
        for number, name in enumerate(names, start=1)
    ]
    seg = hd.seg.Segmentation(
        images, masks, kind, described, hd.UID(), 2, hd.UID(), 1, "m", "m", "1", "1", **more
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)
    return seg


def in_ras(labels: np.ndarray) -> np.ndarray:
    """Independently: axial slices ``(D, H, W)`` to RAS; columns run left and rows to the back."""
    return labels.transpose(2, 1, 0)[::-1, ::-1]


def group(**items: dict[str, Any]) -> Dataset:
    """A functional group item: one sequence of one item per keyword."""
    out = Dataset()
    for name, values in items.items():
        inner = Dataset()
        for key, value in values.items():
            setattr(inner, key, value)
        setattr(out, name, [inner])
    return out


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    return build_plan


@pytest.fixture(scope="session")
def make_dicom() -> Callable[..., Path]:
    return build_dicom


@pytest.fixture(scope="session")
def make_ct() -> Callable[..., list[Any]]:
    return build_ct


@pytest.fixture(scope="session")
def make_seg() -> Callable[..., Any]:
    return build_seg


@pytest.fixture(scope="session")
def to_ras() -> Callable[[np.ndarray], np.ndarray]:
    return in_ras


@pytest.fixture
def read_masked() -> Callable[..., Any]:
    """Reads a DICOM tree for a segmentation task."""

    def read(root: Path, classes: tuple[str, ...], dimensions: int = 3, **options: Any) -> Any:
        plan = build_plan("segmentation", size=(8,) * dimensions)
        task = plan.task.model_copy(update={"classes": classes})
        return read_dataset(DatasetSpec(root, "dicom", masks=MaskOptions(**options)), task)

    return read


@pytest.fixture(scope="session")
def make_group() -> Callable[..., Dataset]:
    return group


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real development images; the test is skipped without it."""
    default = Path(__file__).parents[3] / ".." / "shared" / "data"
    path = Path(os.environ.get("FEDWARD_DATA", default)).resolve()
    if not path.is_dir():
        pytest.skip("no development images here")
    return path
