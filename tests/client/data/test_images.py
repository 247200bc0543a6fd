"""Patients that a table names: odd ids go by the site's rule, whatever the format."""

from __future__ import annotations

from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from fedward.errors import DataError
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.options import LabelOptions, PatientOptions

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
    assert not any(sample.patient_known for sample in found.samples)
    assert not found.left_out


def labelled(root, header, *rows):
    for k in range(len(rows)):
        Pillow.fromarray(np.full((4, 4), k, np.uint8)).save(root / f"{k}.png")
    lines = [f"image,label,{header}", *(f"{k}.png,{k % 2},{row}" for k, row in enumerate(rows))]
    (root / "labels.csv").write_text("\n".join(lines) + "\n", "utf-8")


def sizes_of(found):
    return sorted(Counter(sample.patient for sample in found.samples).values())


@pytest.mark.parametrize(
    "column",
    [
        "patient",
        "patient_id",
        "PatientID",
        "Patient ID",
        "patient-id",
        "subject",
        "Subject_ID",
        "case",
        "CaseID",
        "PID",
        "participant_id",
    ],
)
def test_usual_names_of_the_patient_column(tmp_path, make_plan, column):
    labelled(tmp_path, column, "p1", "p1", "p2")
    found = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert sizes_of(found) == [1, 2]
    assert all(sample.patient_known for sample in found.samples)


def test_usual_names_in_a_table_of_patients(tmp_path, make_plan):
    kind = pairs(tmp_path)
    text = (tmp_path / "patients.csv").read_text("utf-8")
    (tmp_path / "patients.csv").write_text(text.replace("image,patient", "file,Subject ID"))
    found = read_dataset(DatasetSpec(tmp_path), make_plan(kind).task)
    assert sizes_of(found)[-1] == 2


def test_a_class_or_key_of_such_a_name_names_no_patient(tmp_path, make_plan):
    labelled(tmp_path, "case,control", "1,0", "0,1", "1,0")
    text = (tmp_path / "labels.csv").read_text().replace(",label", "").replace(".png,0", ".png")
    (tmp_path / "labels.csv").write_text(text.replace(".png,1", ".png"))
    task = make_plan(classes=["control", "case"]).task
    found = read_dataset(DatasetSpec(tmp_path), task)
    assert len({sample.patient for sample in found.samples}) == len(found.samples) > 0
    assert not any(sample.patient_known for sample in found.samples)


def test_columns_that_contradict_are_both_named(tmp_path, make_plan):
    labelled(tmp_path, "patient_id,case", "p1,c1", "p1,c2", "p2,c3")
    with pytest.raises(DataError, match="must agree") as caught:
        read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert "patient_id" in str(caught.value) and "case" in str(caught.value)
    chosen = LabelOptions(patient_column="Case")
    found = read_dataset(DatasetSpec(tmp_path, labels=chosen), make_plan().task)
    assert sizes_of(found) == [1, 1, 1]


def test_columns_that_say_the_same_in_other_words(tmp_path, make_plan):
    labelled(tmp_path, "pid,subject", "1,anna", "1,anna", "2,bea")
    assert sizes_of(read_dataset(DatasetSpec(tmp_path), make_plan().task)) == [1, 2]


def test_the_column_that_the_site_names(tmp_path, make_plan):
    labelled(tmp_path, "lesion,patient_id", "l1,", "l1,", "l2,")
    options = LabelOptions(patient_column="Lesion")
    assert sizes_of(read_dataset(DatasetSpec(tmp_path, labels=options), make_plan().task)) == [1, 2]
    missing = LabelOptions(patient_column="lession")
    with pytest.raises(DataError, match="lession"):
        read_dataset(DatasetSpec(tmp_path, labels=missing), make_plan().task)


def test_the_column_that_the_site_names_in_a_table_of_patients(tmp_path, make_plan):
    kind = pairs(tmp_path)
    text = (tmp_path / "patients.csv").read_text("utf-8")
    (tmp_path / "patients.csv").write_text(text.replace("image,patient", "image,lesion"), "utf-8")
    options = LabelOptions(patient_column="lesion")
    spec = DatasetSpec(tmp_path, labels=options)
    assert sizes_of(read_dataset(spec, make_plan(kind).task))[-1] == 2
    (tmp_path / "patients.csv").unlink()
    with pytest.raises(DataError, match="lesion"):
        read_dataset(spec, make_plan(kind).task)


@pytest.mark.parametrize("build", [pairs, volumes])
def test_a_folder_for_each_patient_below_that_of_the_images(tmp_path, make_plan, build):
    """An image outside of them has no patient, and the site's folder leads a table's word."""
    kind = build(tmp_path)
    for folder in [one for one in tmp_path.iterdir() if one.is_dir()]:
        for k, file in enumerate(sorted(folder.iterdir())):
            if k:
                (folder / f"p{k // 3}").mkdir(exist_ok=True)
                file.rename(folder / f"p{k // 3}" / file.name)
    task = make_plan(kind).task
    found = read_dataset(DatasetSpec(tmp_path, patients=PatientOptions(folder=1)), task)
    assert Counter(one.patient for one in found.samples) == {"p0": 2, "p1": 3, "p2": 1}
    assert all(one.patient_known for one in found.samples)
    assert [one.reason for one in found.left_out] == ["no patient id"]
    assert found.notes == ("the patient of an image is folder 1 below images/",)
    found = read_dataset(DatasetSpec(tmp_path), task)
    assert found.notes == ('the patient of an image is in the column "patient"',)


def test_files_that_name_their_patients_have_no_folder_of_patients(npz_data, make_plan):
    spec = DatasetSpec(npz_data, patients=PatientOptions(folder=1))
    with pytest.raises(DataError, match="belongs to pictures or NIfTI"):
        read_dataset(spec, make_plan().task)
