"""What a report says of trees whose contents are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from fedward.errors import DataError
from fedward_client.cohort.freeze import make_cohort, usable
from fedward_client.cohort.report import DatasetReport, make_report

RNG = np.random.default_rng(5)
SITE = """
version = 1
[site]
name = "st-mary"
[datasets.chest]
root = "export"
format = "dicom"
task = "classification"
classes = ["well", "sick"]
minimum_patients = 1
"""


def grey(*shape: int) -> np.ndarray:
    return RNG.integers(0, 255, shape).astype(np.uint8)


def risks_of(found: DatasetReport) -> dict[str, int]:
    return {risk.rule: risk.count for risk in found.risks}


def shot(dx: Any, path: Path, patient: str, study: str, **tags: Any) -> None:
    tags = {"PatientName": "", "PatientBirthDate": "", "AccessionNumber": f"A{study}"} | tags
    dx(
        path,
        RNG.integers(0, 4096, (8, 9)),
        PatientID=patient,
        StudyInstanceUID=f"1.2.{study}",
        SeriesInstanceUID=f"1.2.{study}.1",
        **tags,
    )


@pytest.fixture
def people(tmp_path: Path, dx: Any) -> Path:
    """Two patients, three studies under a shared id, and two without any id."""
    root = tmp_path / "export"
    for k, (patient, study) in enumerate(
        [
            ("P1", "1"),
            ("P2", "2"),
            ("ANON", "3"),
            ("anon ", "4"),
            ("Anon", "5"),
            ("", "6"),
            (" ", "6"),
            ("", "7"),
        ]
    ):
        shot(dx, root / f"{k}.dcm", patient, study)
    rows = [f"A{k},{'sick' if k % 2 else 'well'}" for k in range(1, 8)]
    (root / "labels.csv").write_text("AccessionNumber,label\n" + "\n".join(rows) + "\n")
    return tmp_path / "site.toml"


RULES = {
    ("leave-out", "leave-out"): (2, 2, {"no patient id": 3, "shared patient id": 3}),
    ("study", "leave-out"): (5, 4, {"shared patient id": 3}),
    ("leave-out", "study"): (5, 5, {"no patient id": 3}),
    ("series", "series"): (8, 7, {}),
    ("leave-out", "keep"): (5, 5, {"no patient id": 3}),
}


@pytest.mark.integration
def test_ids_that_stand_for_nobody_go_by_the_sites_rule(people, reading):
    for (missing, shared), (samples, patients, left_out) in RULES.items():
        people.write_text(
            f'{SITE}[datasets.chest.patients]\nmissing = "{missing}"\nshared = "{shared}"\n'
        )
        with reading(people) as work:
            found = make_report("chest", work.dataset, work.index, work.extract)
            usable_ones = usable(work.dataset, work.index, work.extract)
            frozen = make_cohort("chest", work.dataset, usable_ones, work.index, work.extract)
        assert (found.samples, found.sample_patients) == (samples, patients), (missing, shared)
        assert found.left_out == left_out
        assert frozen.patients == patients
        risks = risks_of(found)
        assert risks["a patient id stands for one patient"] == 3
        assert risks["every image names its patient"] == 3


@pytest.mark.integration
@pytest.mark.parametrize("key", ["missing", "shared"])
def test_a_site_may_refuse_them(people, reading, key):
    people.write_text(f'{SITE}[datasets.chest.patients]\n{key} = "refuse"\n')
    with reading(people) as work:
        found = usable(work.dataset, work.index, work.extract)
        make_report("chest", work.dataset, work.index, work.extract)
        with pytest.raises(DataError, match="refuses") as caught:
            make_cohort("chest", work.dataset, found, work.index, work.extract)
        with pytest.raises(DataError, match="refuses"):
            work.samples(None, strict=True)
    assert caught.value.value == f"{'no' if key == 'missing' else 'shared'} patient id: 3"


@pytest.mark.integration
def test_the_rules_hold_for_pictures_whose_patients_a_table_names(tmp_path, reading):
    root, site = tmp_path / "export", tmp_path / "site.toml"
    root.mkdir()
    rows = ["image,label,patient"]
    for k, patient in enumerate(("P1", "P2", "ANON", "Anon", "")):
        Pillow.fromarray(RNG.integers(0, 255, (8, 8)).astype(np.uint8)).save(root / f"{k}.png")
        rows.append(f"{k}.png,{'sick' if k % 2 else 'well'},{patient}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    text = SITE.replace('"dicom"', '"folders"') + "[datasets.chest.patients]\n"
    site.write_text(text + 'missing = "study"\n')
    with reading(site) as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
        assert (found.samples, found.sample_patients) == (3, 3)
        assert found.left_out == {"shared patient id": 2}
        assert risks_of(found)["a patient id stands for one patient"] == 2
    site.write_text(text + 'shared = "refuse"\n')
    with reading(site) as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
        assert risks_of(found)["every image names its patient"] == 1
        with pytest.raises(DataError, match="refuses"):
            work.samples(None, strict=True)


@pytest.mark.integration
def test_a_row_of_a_shared_id_labels_nobody(people, reading):
    (people.parent / "export" / "labels.csv").write_text("PatientID,label\nP1,well\nANON,sick\n")
    people.write_text(f'{SITE}[datasets.chest.patients]\nshared = "study"\n')
    with reading(people) as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
    assert found.images_by_class == {"well": 1, "sick": 0}
    assert found.left_out == {"no label": 4, "no patient id": 3}
    assert risks_of(found)["every image has a label"] == 4


@pytest.mark.integration
def test_people_who_are_not_told_apart(tmp_path, reading, dx):
    root = tmp_path / "export"
    one = {"PatientName": "DOE^JANE", "PatientBirthDate": "19550712"}
    shot(dx, root / "a.dcm", "MRN0815", "1", **one)
    shot(dx, root / "b.dcm", "mrn 815", "2", **one)  # a person under two ids, misspelt
    shot(dx, root / "c.dcm", "MRN0815", "3", PatientBirthDate="20010101")  # two births
    shot(dx, root / "d.dcm", "X1", "4")
    shot(dx, root / "e.dcm", "X2", "4")  # a study of two patients
    shot(dx, root / "f.dcm", "007", "5", IssuerOfPatientID="east")
    shot(dx, root / "g.dcm", "7", "6", IssuerOfPatientID="west")
    anonymous = {"PatientName": "Anonymous", "PatientBirthDate": "19000101"}
    shot(dx, root / "h.dcm", "H1", "7", **anonymous)
    shot(dx, root / "i.dcm", "H2", "8", **anonymous)  # that name is nobody's
    rows = ["AccessionNumber,label,split"]
    rows += [
        f"A{k},{'sick' if k % 2 else 'well'},{'test' if k == 3 else 'train'}" for k in range(1, 9)
    ]
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "site.toml").write_text(SITE)
    with reading(tmp_path / "site.toml") as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
        text = found.model_dump_json()
    assert risks_of(found) == {
        "one name and birth date has one patient id": 1,
        "a patient has one birth date": 1,
        "a study is of one patient": 1,
        "ids differ by more than case, blanks, marks, leading zeros and issuer": 1,
        "no patient is in two parts of the division that the data brings": 1,
    }
    stored = b"".join(p.read_bytes() for p in (tmp_path / "state" / "index").iterdir())
    # Whole dates: keyed hashes are random digits, and four in a row come by chance.
    for planted in ("DOE", "MRN", "19550712", "20010101", "Anonym", "19000101"):
        assert planted not in text
        assert planted.encode() not in stored and planted.lower().encode() not in stored


@pytest.mark.integration
def test_ids_that_differ_by_zeros_and_case_alone(tmp_path, reading, dx):
    root = tmp_path / "export"
    for k, patient in enumerate(["0042", "42", "A-1", "a1", "b1"]):
        shot(dx, root / f"{k}.dcm", patient, str(k))
    rows = [f"A{k},{'sick' if k % 2 else 'well'}" for k in range(5)]
    (root / "labels.csv").write_text("AccessionNumber,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "site.toml").write_text(SITE)
    with reading(tmp_path / "site.toml") as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
    assert risks_of(found) == {
        "ids differ by more than case, blanks, marks, leading zeros and issuer": 2
    }


@pytest.mark.integration
def test_a_slice_that_cannot_be_read_costs_its_volume_and_is_told(tmp_path, reading, dx):
    root = tmp_path / "export"
    for patient in ("P1", "P2", "P3"):
        for k in range(4):
            shot(
                dx,
                root / patient / f"{k}.dcm",
                patient,
                patient[1],
                Modality="CT",
                ImagePositionPatient=[0, 0, 2.0 * k + (patient == "P3") * 10 * (k == 3)],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            )
    cut = root / "P2" / "1.dcm"
    cut.write_bytes(cut.read_bytes()[:-30])
    (root / "labels.csv").write_text("PatientID,label\nP1,well\nP2,sick\nP3,sick\n")
    (tmp_path / "site.toml").write_text(
        SITE.replace('task = "classification"', 'task = "classification"\ndimensions = 3')
    )
    with reading(tmp_path / "site.toml") as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
    assert found.samples == 1
    # The cut file, its volume, and the volume with a gap.
    assert found.left_out == {"not readable": 1, "slices missing": 2}


@pytest.mark.integration
def test_one_patient_with_two_labels_and_too_few_patients(tmp_path, reading, dx):
    root = tmp_path / "export"
    for k, patient in enumerate(["P1", "P1", "P2", "P2"]):
        shot(dx, root / f"{k}.dcm", patient, str(k))
    (root / "labels.csv").write_text("AccessionNumber,label\nA0,well\nA1,sick\nA2,sick\nA3,sick\n")
    (tmp_path / "site.toml").write_text(
        SITE.replace("minimum_patients = 1", "minimum_patients = 5")
    )
    with reading(tmp_path / "site.toml") as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
    assert (found.images_by_class, found.patients_by_class) == (
        {"well": 1, "sick": 3},
        {"well": 1, "sick": 2},
    )
    assert risks_of(found) == {
        "all images of a patient have the same label": 1,
        "there are at least 5 patients": 3,
        "every class has at least 5 patients": 2,
    }


@pytest.mark.integration
def test_a_table_elsewhere_with_its_own_words(tmp_path, reading, dx):
    root = tmp_path / "export"
    for k in range(4):
        shot(dx, root / f"{k}.dcm", f"P{k}", str(k))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "chest.csv").write_text(
        "Chest 2024\nStudy no.;Diagnosis\nA0;o.B.\nA1;PNA\nA2;?\nA9;PNA\n"
    )
    (tmp_path / "site.toml").write_text(
        SITE
        + """
[datasets.chest.labels]
file = "lists/chest.csv"
header = 2
key = "study no."
means = "AccessionNumber"
column = "diagnosis"
words = { "o.b." = "well", "pna" = "sick" }
unlabelled = ["?"]
"""
    )
    with reading(tmp_path / "site.toml") as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
    assert found.images_by_class == {"well": 1, "sick": 1}
    assert found.left_out == {"no image": 1, "no label": 2}


LEAK = "no two patients or parts share an image, or a test would leak"


def high(found: DatasetReport) -> dict[str, int]:
    return {risk.rule: risk.count for risk in found.risks if risk.severity == "high"}


@pytest.mark.integration
def test_one_picture_in_training_and_test_is_a_high_risk(tmp_path, reading):
    root = tmp_path / "export"
    for part in ("train", "test"):
        for kind in ("well", "sick"):
            (root / part / kind).mkdir(parents=True)
            Pillow.fromarray(grey(9, 8)).save(root / part / kind / f"{part}-{kind}.png")
    same = Pillow.open(root / "train" / "well" / "train-well.png")
    same.save(root / "test" / "well" / "again.tif")  # other bytes, the same pixels
    (tmp_path / "site.toml").write_text(SITE.replace('"dicom"', '"folders"'))
    with reading(tmp_path / "site.toml") as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
        assert high(found) == {LEAK: 1, "the data say whose each image is": 5}
        # Of one patient and in one part it leaks nothing.
        (root / "test" / "well" / "again.tif").rename(root / "train" / "well" / "again.tif")
        (root / "patients.csv").write_text(
            "image,patient\ntrain/well/train-well.png,P1\ntrain/well/again.tif,P1\n"
            "train/sick/train-sick.png,P2\ntest/well/test-well.png,P3\n"
            "test/sick/test-sick.png,P4\n"
        )
    with reading(tmp_path / "site.toml") as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
    assert found.samples == 5 and high(found) == {}
    assert risks_of(found)["no two files show the same pixels"] == 1


@pytest.mark.integration
def test_one_volume_of_two_patients_is_a_high_risk(tmp_path, reading):
    root = tmp_path / "export"
    root.mkdir()
    volume = grey(6, 5, 4).astype(np.int16)
    for name in ("a.nii", "b.nii.gz", "c.nii.gz"):
        values = volume + (name == "c.nii.gz")
        nib.save(nib.Nifti1Image(values, np.diag([1, 2, 3, 1])), root / name)
    (root / "labels.csv").write_text(
        "file,label,patient\na.nii,well,P1\nb.nii.gz,well,P2\nc.nii.gz,sick,P3\n"
    )
    text = SITE.replace('"dicom"', '"nifti"').replace("minimum_patients = 1", "dimensions = 3")
    (tmp_path / "site.toml").write_text(text + "minimum_patients = 1\n")
    with reading(tmp_path / "site.toml") as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
    assert found.samples == 3 and high(found) == {LEAK: 1}


@pytest.mark.integration
@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("format", ["dicom", "folders", "nifti"])
def test_what_is_there_is_told_before_anybody_has_labelled_it(tmp_path, reading, dx, format, task):
    root = tmp_path / "export"
    (root / "images").mkdir(parents=True)
    for k in range(3):
        if format == "dicom":
            shot(dx, root / "images" / f"{k}.dcm", "" if k == 2 else f"P{k}", str(k))
        elif format == "nifti":
            image = nib.Nifti1Image(grey(6, 5, 1).astype(np.int16), np.eye(4))
            nib.save(image, root / "images" / f"{k}.nii.gz")
        else:
            Pillow.fromarray(grey(6, 5)).save(root / "images" / f"{k}.png")
    (root / "images" / "empty.dcm").write_bytes(b"")
    text = SITE.replace('"dicom"', f'"{format}"').replace("classification", task)
    (tmp_path / "site.toml").write_text(text)
    with reading(tmp_path / "site.toml") as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
    assert (found.files, found.instances, found.samples) == (4, 3, 0)
    assert sum(found.left_out.values()) >= 1
    if (format, task) == ("folders", "classification"):
        return  # there the folders are the labels
    missing = "masks" if task == "segmentation" else "a table of labels"
    first = found.risks[0]
    assert (first.rule, first.severity) == (f"the dataset has {missing}", "high") and first.fix
    others = {"every image names its patient": 1} if format == "dicom" else {}
    assert risks_of(found) == {first.rule: 1} | others


@pytest.mark.integration
def test_a_broken_table_is_no_missing_one(people, reading):
    people.write_text(SITE)
    (people.parent / "export" / "labels.csv").write_text("no,columns\n1,2\n")
    with reading(people) as work, pytest.raises(DataError, match="needs a column"):
        make_report("chest", work.dataset, work.index, work.extract)


def test_masks_beside_their_images_are_no_images(tmp_path: Path, reading: Any) -> None:
    site = SITE.replace('"dicom"', '"folders"').replace('"classification"', '"segmentation"')
    (tmp_path / "site.toml").write_text(site.replace('"well", "sick"', '"lesion"'))
    (tmp_path / "export").mkdir()
    for k in range(3):
        mask = np.zeros((8, 9), np.uint8)
        mask.flat[: 5 + k] = 255
        Pillow.fromarray(grey(8, 9)).save(tmp_path / "export" / f"P{k}.png")
        Pillow.fromarray(mask).save(tmp_path / "export" / f"P{k}_mask.gif")
    (tmp_path / "export" / "P2.png").unlink()
    with reading(tmp_path / "site.toml") as work:
        found = make_report("chest", work.dataset, work.index, work.extract)
    assert (found.instances, found.samples, found.pixels_by_class) == (2, 2, {"lesion": 11})
    assert found.hints[0] == 'names of masks end in "_mask" (3); masks.suffix can say otherwise'
    (risk,) = [one for one in found.risks if one.rule == "every label and every mask has an image"]
    assert risk.count == 1 and "masks.suffix" in risk.fix and "left out itself" in risk.fix
