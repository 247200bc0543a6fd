"""Every number of a report, of trees with several modalities, syntaxes, spacings, and masks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image as Pillow
from pydicom.data import get_testdata_file

from fedward_client.cohort.report import make_report
from fedward_client.commands.tables import report_tables
from fedward_client.commands.work import Work
from fedward_client.data.quiet import quiet

SITE = """
version = 1
[site]
name = "st-mary"
[datasets.chest]
root = "export"
format = "{format}"
task = "segmentation"
dimensions = {dimensions}
classes = ["lung", "heart"]
minimum_patients = 1
"""
Reading = Callable[[Path], AbstractContextManager[Work]]
RNG = np.random.default_rng(7)


def report_of(reading: Reading, tmp_path: Path, format: str, dimensions: int = 2) -> dict[str, Any]:
    site = tmp_path / "site.toml"
    site.write_text(SITE.format(format=format, dimensions=dimensions))
    with reading(site) as work:
        made = make_report("chest", work.dataset, work.index, work.extract)
    return made.model_dump(mode="json")


def write_mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(values.astype(np.uint8)).save(path)


def scans(root: Path, dx: Any) -> None:
    """Three CT slices and two MR slices, the latter compressed."""
    tags: dict[str, Any] = {"PatientName": "", "PatientBirthDate": ""}
    for k in range(3):
        dx(
            root / "ct" / f"ct{k}.dcm",
            np.full((8, 9), 100 + k),
            PatientID="P1",
            Modality="CT",
            StudyInstanceUID="1.2.1",
            SeriesInstanceUID="1.2.1.1",
            PixelSpacing=[0.7, 0.9],
            SOPClassUID=pydicom.uid.CTImageStorage,
            RescaleSlope=2,
            RescaleIntercept=-1000,
            Manufacturer="ACME",
            BodyPartExamined="CHEST",
            **tags,
        )
    for k in range(2):
        pixels = np.arange(60).reshape(6, 10) + 7 * k
        path = dx(
            root / "mr" / f"mr{k}.dcm",
            pixels,
            PatientID="P2",
            Modality="MR",
            StudyInstanceUID="1.2.2",
            SeriesInstanceUID=f"1.2.2.{k}",
            PixelSpacing=[1.25, 1.25],
            SOPClassUID=pydicom.uid.MRImageStorage,
            Manufacturer="Other Works",
            BodyPartExamined="HEAD",
            **tags,
        )
        with quiet():
            file = pydicom.dcmread(path)
            file.compress(pydicom.uid.RLELossless)
            file.save_as(path)


@pytest.mark.integration
def test_a_tree_of_two_modalities_with_masks_of_two_kinds(tmp_path, reading, dx):
    root = tmp_path / "export"
    scans(root, dx)
    one = np.zeros((8, 9))
    one[:2] = 1
    two = one.copy()
    two[5, :4] = 2
    nothing = np.zeros((6, 10))
    for name, mask in (("ct0", one), ("ct1", two), ("mr0", nothing), ("mr1", nothing)):
        write_mask(root / "masks" / f"{name}.png", mask)
    # A real segmentation, of other classes, whose images are not here.
    shutil.copy(get_testdata_file("liver_1frame.dcm"), root / "seg.dcm")
    made = report_of(reading, tmp_path, "dicom")
    assert sum(made.pop("split").values()) == 2
    assert made == {
        "dataset": "chest",
        "files": 10,
        "instances": 5,
        "patients": 2,
        "studies": 2,
        "series": 3,
        "modality": {"CT": 3, "MR": 2},
        "body_part": {"CHEST": 3, "HEAD": 2},
        "manufacturer": {"ACME": 3, "Other Works": 2},
        "intent": {"not stated": 5},
        "burned_in": {"not stated": 5},
        "identity_removed": {"not stated": 5},
        "visual_features": {"not stated": 5},
        "deidentification": {"not stated": 5},
        "object_type": {"CT Image Storage": 3, "MR Image Storage": 2},
        "transfer_syntax": {"Explicit VR Little Endian": 3, "RLE Lossless": 2},
        "size": {"8 x 9": 3, "6 x 10": 2},
        "spacing": {"0.7 x 0.9": 3, "1.25 x 1.25": 2},
        "slice_distance": {},
        "intensity": {
            "CT": {
                "lowest": -800,
                "highest": -796,
                "typical_lowest": -798,
                "typical_highest": -798,
            },
            "MR": {"lowest": 0, "highest": 66, "typical_lowest": 0, "typical_highest": 59},
        },
        "samples": 4,
        "sample_patients": 2,
        "images_are_patients": False,
        "images_by_class": {"lung": 2, "heart": 1},
        "patients_by_class": {"lung": 1, "heart": 1},
        "pixels_by_class": {"lung": 36, "heart": 4},
        "left_out": {"no mask": 1, "unknown class in mask": 1},
        "risks": [],
        "hints": [],
    }


@pytest.mark.integration
def test_masks_whose_names_tell_no_image(tmp_path, reading, dx):
    root = tmp_path / "export"
    for k, patient in enumerate("AB"):
        dx(root / patient / "IM0001.dcm", np.full((6, 5), k), PatientID=patient, Modality="CT")
    write_mask(root / "masks" / "IM0001.png", np.eye(6, 5))
    write_mask(root / "masks" / "IM0002.png", np.eye(6, 5))
    made = report_of(reading, tmp_path, "dicom")
    assert made["samples"] == 0
    assert made["left_out"] == {"ambiguous name of mask": 2, "no image": 1}
    counts = {risk["rule"]: (risk["count"], risk["severity"]) for risk in made["risks"]}
    assert counts["the name of a mask means one image, and that of an image one mask"] == (
        2,
        "medium",
    )
    assert counts["every label and every mask has an image"] == (1, "medium")
    assert "IM000" not in str(made)


@pytest.mark.integration
def test_pictures_with_masks(tmp_path, reading):
    root = tmp_path / "export"
    for k in range(4):
        write_mask(root / "images" / f"{k}.png", RNG.integers(1, 200, (7, 5)))
        write_mask(root / "masks" / f"{k}.png", np.eye(7, 5) * (k == 0))
    coloured = np.zeros((7, 5, 3))
    coloured[0, 0] = 1, 2, 3
    write_mask(root / "masks" / "3.png", coloured)  # no label map, and no image either
    rows = [f"images/{k}.png,P{k // 2}" for k in range(4)]
    (root / "patients.csv").write_text("image,patient\n" + "\n".join(rows) + "\n")
    made = report_of(reading, tmp_path, "folders")
    assert (made["files"], made["instances"], made["samples"]) == (9, 4, 4)
    assert (made["patients"], made["sample_patients"]) == (2, 2)
    assert made["modality"] == made["body_part"] == made["transfer_syntax"] == {"not stated": 4}
    assert (made["size"], made["spacing"]) == ({"7 x 5": 4}, {"1 x 1": 4})
    assert made["intensity"]["not stated"]["lowest"] >= 1
    assert made["pixels_by_class"] == {"lung": 5, "heart": 0}
    assert made["risks"] == []


@pytest.mark.integration
def test_volumes_with_masks(tmp_path, reading):
    root = tmp_path / "export"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for k in range(3):
        affine = np.diag([0.7, 0.8, 2.5, 1])
        values = RNG.integers(100, 200, (6, 5, 4)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, affine), root / "images" / f"{k}.nii.gz")
        mask = np.zeros((6, 5, 4), np.uint8)
        mask[0] = k == 0
        nib.save(nib.Nifti1Image(mask, affine), root / "labels" / f"{k}.nii.gz")
    (root / "patients.csv").write_text("image,patient_id\n0,P0\n1,P1\n2,P2\n")
    made = report_of(reading, tmp_path, "nifti", 3)
    assert (made["files"], made["instances"], made["patients"]) == (7, 3, 3)
    assert (made["size"], made["spacing"]) == ({"6 x 5": 3}, {"0.7 x 0.8 x 2.5": 3})
    assert 100 <= made["intensity"]["not stated"]["lowest"] < 200
    assert made["pixels_by_class"] == {"lung": 20, "heart": 0}
    assert made["risks"] == []


@pytest.mark.integration
def test_the_distance_of_slices(tmp_path, reading, dx):
    """What the slices say of their place counts, not the thickness that they state."""
    root = tmp_path / "export"
    for patient, step, count in (("P1", 2.5, 4), ("P2", 2.5, 3), ("P3", 0.7, 5)):
        for k in range(count):
            dx(
                root / patient / f"{k}.dcm",
                np.full((6, 5), k),
                PatientID=patient,
                Modality="CT",
                SOPClassUID=pydicom.uid.CTImageStorage,
                SeriesInstanceUID=f"1.2.{patient[1]}",
                ImagePositionPatient=[0, 0, -step * k],
                SliceThickness=9,
                PatientName="",
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                PatientBirthDate="",
                StudyInstanceUID=f"1.3.{patient[1]}",
            )
    (root / "labels.csv").write_text("PatientID,label\nP1,lung\nP2,heart\nP3,lung\n")
    site = tmp_path / "site.toml"
    text = SITE.format(format="dicom", dimensions=3).replace("segmentation", "classification")
    site.write_text(text)
    with reading(site) as work:
        made = make_report("chest", work.dataset, work.index, work.extract)
    assert made.samples == 3
    assert made.slice_distance == {"2.5": 2, "0.7": 1}
    assert made.spacing == {"0.5 x 0.5": 12}
    assert any(
        "between slices, mm" in str(cell) for cell in report_tables(made)[0].columns[0].cells
    )
