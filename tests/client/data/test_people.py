"""Patients that a table names: odd ids go by the site's rule, whatever the format."""

from __future__ import annotations

from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from client.data.patient_options import PatientOptions
from client.data.read import DatasetSpec, read_dataset

PATIENTS = ("p1", "p1", "ANON", "anon ", "", "É", "E\u0301")
SHARED = frozenset({"anon"})


def pictures(root):
    for k in range(len(PATIENTS)):
        Pillow.fromarray(np.full((4, 4), k, np.uint8)).save(root / f"{k}.png")
    rows = (f"{k}.png,{k % 2},{patient}" for k, patient in enumerate(PATIENTS))
    (root / "labels.csv").write_text("\n".join(["image,label,patient", *rows]) + "\n", "utf-8")
    return "classification"


def pairs(root):
    for folder in ("images", "masks"):
        (root / folder).mkdir()
        for k in range(len(PATIENTS)):
            Pillow.fromarray(np.full((4, 4), k, np.uint8)).save(root / folder / f"{k}.png")
    return listed(root)


def volumes(root):
    for folder in ("images", "labels"):
        (root / folder).mkdir()
        for k in range(len(PATIENTS)):
            image = nib.Nifti1Image(np.full((4, 4, 3), k, np.uint8), np.eye(4))
            nib.save(image, root / folder / f"{k}.nii.gz")
    return listed(root)


def listed(root):
    rows = (f"{k},{patient}" for k, patient in enumerate(PATIENTS))
    (root / "patients.csv").write_text("\n".join(["image,patient", *rows]) + "\n", "utf-8")
    return "segmentation"


@pytest.mark.parametrize("build", [pictures, pairs, volumes])
@pytest.mark.parametrize(
    ("missing", "shared", "sizes", "left_out"),
    [
        ("leave-out", "leave-out", [2, 2], {"no patient id": 1, "shared patient id": 2}),
        ("study", "leave-out", [1, 2, 2], {"shared patient id": 2}),
        ("refuse", "keep", [2, 2, 2], {"no patient id": 1}),
        ("series", "series", [1, 1, 1, 2, 2], {}),
    ],
)
def test_rules(tmp_path, make_plan, build, missing, shared, sizes, left_out):
    kind = build(tmp_path)
    plan = make_plan() if kind == "classification" else make_plan(kind)
    spec = DatasetSpec(tmp_path, patients=PatientOptions(SHARED, missing, shared))
    found = read_dataset(spec, plan.task)
    # "anon" and "ANON" are one word for nobody, but kept they are two ids as they are written.
    of = Counter(sample.patient.casefold() for sample in found.samples)
    assert sorted(of.values()) == sizes
    assert Counter(item.reason for item in found.left_out) == left_out


def test_without_a_column_of_patients_each_image_is_one(tmp_path, make_plan):
    pictures(tmp_path)
    rows = (f"{k}.png,{k % 2}" for k in range(len(PATIENTS)))
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    found = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert len({sample.patient for sample in found.samples}) == len(PATIENTS)
    assert not found.left_out
