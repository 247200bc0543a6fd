"""DICOM trees: finding, labelling, masks, volumes, and silence about patients."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import openpyxl
import pydicom
import pytest
from PIL import Image as Pillow
from pydicom.data import get_testdata_file

from fedward.errors import DataError
from fedward_client.data.dataset import DatasetSpec, read_dataset

ROOT = str(Path(__file__).parents[3])
STORED = np.arange(48, dtype=np.uint16).reshape(6, 8) * 50


def reasons(dataset):
    return Counter(item.reason for item in dataset.left_out)


def labels(root, text):
    (root / "labels.csv").write_text(text)


def test_files_are_found_by_what_they_are(tmp_path, make_dicom, make_plan):
    make_dicom(tmp_path / "a" / "IM0001", STORED)
    make_dicom(tmp_path / "a" / "IM0002.jpg", STORED)
    make_dicom(tmp_path / "b" / "x.dcm", STORED, Modality="PT")
    make_dicom(tmp_path / "b" / "y.dcm", STORED, PatientID="")
    (tmp_path / "b" / "notes.txt").write_text("hello")
    (tmp_path / "b" / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\x00garbage")
    (tmp_path / "b" / "empty.dcm").write_bytes(b"")
    shutil.copy(get_testdata_file("rtplan.dcm"), tmp_path / "b" / "plan")
    labels(tmp_path, "PatientID,label\nP1,sick\n")
    plan = make_plan(task={"modality": ["CT"]})
    dataset = read_dataset(DatasetSpec(tmp_path, "dicom"), plan.task)
    assert len(dataset.samples) == 2
    assert reasons(dataset) == {
        "other modality": 1,
        "no patient id": 1,
        "not DICOM": 2,
        "no pixel data": 2,
    }


KEYED = [
    ("PatientID", "P1"),
    ("StudyInstanceUID", "1.2.1"),
    ("SeriesInstanceUID", "1.2.2"),
    ("SOPInstanceUID", "1.2.3"),
    ("AccessionNumber", "A7"),
    ("file", "s/one"),
    ("FILE", "one"),
]


@pytest.mark.parametrize(("column", "value"), KEYED)
def test_labels_by_each_key(tmp_path, make_dicom, make_plan, column, value):
    make_dicom(
        tmp_path / "s" / "one",
        STORED,
        StudyInstanceUID="1.2.1",
        SeriesInstanceUID="1.2.2",
        SOPInstanceUID="1.2.3",
        AccessionNumber="A7",
    )
    make_dicom(tmp_path / "s" / "two", STORED, PatientID="P2")
    labels(tmp_path, f"{column},label,Ward\n{value},sick,W3\n")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert [(s.label, s.columns) for s in dataset.samples] == [((1,), {"Ward": "W3"})]
    assert reasons(dataset) == {"no label": 1}


@pytest.mark.parametrize(("key", "value"), [("PatientID", 4711), ("AccessionNumber", "A 7")])
def test_labels_from_a_workbook(tmp_path, make_dicom, make_plan, key, value):
    make_dicom(tmp_path / "x.dcm", STORED, PatientID="4711", AccessionNumber="A 7")
    book = openpyxl.Workbook()
    for row in ((key, "note", "label"), (value, None, "sick"), (None, None, None)):
        book.active.append(row)
    book.save(tmp_path / "labels.xlsx")
    (sample,) = read_dataset(DatasetSpec(tmp_path), make_plan().task).samples
    assert sample.label == (make_plan().task.classes.index("sick"),)


def test_rows_of_a_workbook_that_disagree_and_a_broken_one(tmp_path, make_dicom, make_plan):
    make_dicom(tmp_path / "x.dcm", STORED, PatientID="4711")
    make_dicom(tmp_path / "y.dcm", STORED, PatientID="4712")
    book = openpyxl.Workbook()
    rows = (("PatientID", "label"), (4711, "sick"), (4711.0, "healthy"), (4712, "sick"))
    for row in rows:
        book.active.append(row)
    book.save(tmp_path / "labels.xlsx")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert reasons(dataset) == {"conflicting labels": 1}
    (tmp_path / "labels.xlsx").write_bytes(b"PK no workbook 4711")
    with pytest.raises(DataError, match="readable XLSX") as caught:
        read_dataset(DatasetSpec(tmp_path, "dicom"), make_plan().task)
    assert "4711" not in str(caught.value)


def test_labels_with_a_column_per_class_and_conflicts(tmp_path, make_dicom, make_plan):
    for name in ("A", "B", "C"):
        make_dicom(tmp_path / name, STORED, PatientID=name)
    labels(tmp_path, "PatientID,normal,sick\nA,0,1\nB,1,0\nB,0,1\nC,1,1\n")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert [s.label for s in dataset.samples] == [(1,)]
    assert reasons(dataset) == {"conflicting labels": 2}


def test_the_issuer_belongs_to_the_patient(tmp_path, make_dicom, make_plan):
    for k, issuer in enumerate(["X", "Y", "X"]):
        make_dicom(tmp_path / str(k), STORED, IssuerOfPatientID=issuer)
    labels(tmp_path, "PatientID,label\nP1,sick\n")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert len({s.patient for s in dataset.samples}) == 2


def test_each_frame_is_an_image_of_the_same_patient(tmp_path, make_dicom, make_plan):
    frames = np.arange(72, dtype=np.uint8).reshape(3, 4, 6)
    make_dicom(tmp_path / "a", frames, frames=3)
    labels(tmp_path, "PatientID,label\nP1,sick\n")
    samples = read_dataset(DatasetSpec(tmp_path), make_plan().task).samples
    assert len(samples) == 3
    assert len({s.patient for s in samples}) == 1
    assert len({s.load.identity() for s in samples}) == 3
    for sample, frame in zip(samples, frames, strict=True):
        np.testing.assert_array_equal(sample.load().pixels[0], frame)


@pytest.mark.parametrize("kind", ["SegmentationStorage", "RTDoseStorage"])
def test_labels_and_doses_are_no_pictures(tmp_path, make_dicom, make_plan, kind):
    make_dicom(tmp_path / "x.dcm", STORED, PatientID="P1")
    make_dicom(tmp_path / "y.dcm", STORED, PatientID="P1", SOPClassUID=getattr(pydicom.uid, kind))
    labels(tmp_path, "PatientID,label\nP1,sick\n")
    task = make_plan().task.model_copy(update={"modality": ("any",)})
    dataset = read_dataset(DatasetSpec(tmp_path), task)
    assert len(dataset.samples) == 1
    assert reasons(dataset) == {"other modality": 1}


def test_a_pipe_among_the_files_stops_nothing(tmp_path, make_dicom, make_plan):
    make_dicom(tmp_path / "x.dcm", STORED, PatientID="P1")
    os.mkfifo(tmp_path / "pipe.dcm")
    labels(tmp_path, "PatientID,label\nP1,sick\n")
    assert len(read_dataset(DatasetSpec(tmp_path), make_plan().task).samples) == 1


def test_an_instance_exported_twice_counts_once(tmp_path, make_dicom, make_plan):
    for name in ("a", "b"):
        make_dicom(tmp_path / name, STORED, SOPInstanceUID="1.2.3")
    labels(tmp_path, "PatientID,label\nP1,sick\n")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert len(dataset.samples) == 1
    assert reasons(dataset) == {"duplicate": 1}


@pytest.mark.parametrize("folder", ["images", "."])
def test_masks_by_stem_or_by_uid(tmp_path, make_dicom, make_plan, folder):
    make_dicom(tmp_path / folder / "one.dcm", STORED)
    make_dicom(tmp_path / folder / "two", STORED, SOPInstanceUID="1.2.3")
    make_dicom(tmp_path / folder / "three", STORED)
    mask = (STORED > 500).astype(np.uint8) * 255
    (tmp_path / "masks").mkdir()
    Pillow.fromarray(mask).save(tmp_path / "masks" / "one.png")
    displayed_as_ras = mask[::-1, ::-1].T[..., None]
    nib.save(nib.Nifti1Image(displayed_as_ras, np.eye(4)), tmp_path / "masks" / "1.2.3.nii.gz")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan("segmentation").task)
    assert len(dataset.samples) == 2
    assert reasons(dataset) == {"no mask": 1}
    for sample in dataset.samples:
        np.testing.assert_array_equal(sample.mask(), mask)
        np.testing.assert_array_equal(sample.load().pixels[0], STORED)


def test_missing_tables_are_named(tmp_path, make_dicom, make_plan):
    make_dicom(tmp_path / "a", STORED)
    with pytest.raises(DataError, match=r"labels\.csv"):
        read_dataset(DatasetSpec(tmp_path), make_plan().task)
    with pytest.raises(DataError, match="masks"):
        read_dataset(DatasetSpec(tmp_path), make_plan("segmentation").task)


# --- volumes -----------------------------------------------------------------------------------

# Row and column directions of an oblique plane and one seen from behind.
PLANES = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "tilted": ((1, 0, 0), (0, np.cos(0.2), np.sin(0.2))),
}


def series(root, make_dicom, plane, count=5, skip=(), **tags):
    along, down = (np.array(v, float) for v in PLANES[plane])
    normal = np.cross(along, down)
    values = np.random.default_rng(0).integers(0, 1000, (count, 6, 8)).astype(np.int16)
    order = np.random.default_rng(1).permutation(count)  # file names say nothing of the place
    for name, k in enumerate(order):
        if k not in skip:
            make_dicom(
                root / "s" / f"{name}",
                values[k],
                PatientID="P1",
                SeriesInstanceUID="1.2.9",
                PixelSpacing=[0.5, 0.25],
                ImageOrientationPatient=[*along, *down],
                ImagePositionPatient=list(normal * 2.0 * k + [10, 20, 30]),
                **tags,
            )
    return values


@pytest.mark.parametrize("plane", PLANES)
def test_series_become_ras_volumes(tmp_path, make_dicom, make_plan, plane):
    values = series(tmp_path, make_dicom, plane)
    labels(tmp_path, "SeriesInstanceUID,label\n1.2.9,sick\n")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan(size=(8, 8, 8)).task)
    assert len(dataset.samples) == 1
    image = dataset.samples[0].load()
    # Independently: voxel (slice, row, column) in DICOM axes, whose left and back are negative.
    along, down = (np.array(v, float) for v in PLANES[plane])
    directions = np.stack([np.cross(along, down), down, along]) * [-1, -1, 1]
    spacing = np.array([2.0, 0.5, 0.25])
    target = [int(np.abs(directions[:, axis]).argmax()) for axis in range(3)]
    expected = values.transpose(target)
    for axis, source in enumerate(target):
        if directions[source, axis] < 0:
            expected = np.flip(expected, axis)
    np.testing.assert_array_equal(image.pixels[0], expected)
    assert image.spacing == pytest.approx(tuple(spacing[target]))


def test_series_with_missing_slices_or_without_places(tmp_path, make_dicom, make_plan):
    series(tmp_path, make_dicom, "axial", skip=(2, 3))
    labels(tmp_path, "PatientID,label\nP1,sick\nP2,sick\n")
    for k in range(2):
        make_dicom(tmp_path / f"n{k}", STORED, PatientID="P2", SeriesInstanceUID="1.2.8")
    with pytest.raises(DataError) as caught:
        read_dataset(DatasetSpec(tmp_path), make_plan(size=(8, 8, 8)).task)
    assert caught.value.value == "shape does not fit the task: 1, slices missing: 1"


def test_series_with_a_nifti_mask(tmp_path, make_dicom, make_plan):
    values = series(tmp_path, make_dicom, "axial")
    ras = values.transpose(2, 1, 0)[::-1, ::-1]
    affine = np.diag([0.25, 0.5, 2, 1])
    affine[:3, 3] = -10 - 7 * 0.25, -20 - 5 * 0.5, 30
    (tmp_path / "masks").mkdir()
    nib.save(
        nib.Nifti1Image((ras > 500).astype(np.uint8), affine), tmp_path / "masks" / "1.2.9.nii.gz"
    )
    plan = make_plan("segmentation", size=(8, 8, 8))
    sample = read_dataset(DatasetSpec(tmp_path), plan.task).samples[0]
    np.testing.assert_array_equal(sample.load().pixels[0], ras)
    np.testing.assert_array_equal(sample.mask(), ras > 500)


# --- silence -----------------------------------------------------------------------------------

SECRETS = ("DOE^JANE", "MRN4711", "1.2.826.99", "ward-secret", "19550712", "SECRETHOSP")


def plant(root, make_dicom):
    """Files of every bad kind, with identifiers in every place that a message could quote."""
    folder = root / "ward-secret" / "DOE^JANE"
    tags = {
        "PatientName": "DOE^JANE",
        "PatientID": "MRN4711",
        "PatientBirthDate": "19550712",
        "StudyInstanceUID": "1.2.826.99",
        "InstitutionName": "SECRETHOSP",
    }
    good = make_dicom(folder / "MRN4711.dcm", STORED, **tags)
    make_dicom(folder / "other", STORED, **tags, RescaleSlope="1", RescaleIntercept="0")
    raw = good.read_bytes()
    (folder / "MRN4711-short.dcm").write_bytes(raw[: len(raw) // 2])
    (folder / "MRN4711-pixels.dcm").write_bytes(raw[:-20])
    bad = pydicom.dcmread(good)
    bad.SOPInstanceUID = "1.2.826.99.5"
    raw = raw.replace(b"CT", b"C\xff").replace(b"MRN4711", b"MRN\xff711")
    (folder / "odd.dcm").write_bytes(raw)
    (folder / "1.2.826.99.txt").write_text("DOE^JANE")
    return folder


def test_no_message_and_no_reason_holds_an_identifier(tmp_path, make_dicom, make_plan):
    plant(tmp_path, make_dicom)
    texts = []
    labels(tmp_path, "PatientID,label\nMRN4711,sick\nDOE^JANE,nobody knows\n")
    for kind in ("classification", "segmentation"):
        for fmt in (None, "dicom", "folders", "nifti", "npz"):
            for sites in ("none", "folders"):
                spec = DatasetSpec(tmp_path, fmt, sites)
                try:
                    dataset = read_dataset(spec, make_plan(kind).task)
                except DataError as error:
                    texts.append(str(error))
                    continue
                texts += [item.reason for item in dataset.left_out]
                for sample in dataset.samples:
                    try:
                        sample.load()
                    except DataError as error:
                        texts.append(f"{error} {error.__cause__} {error.__suppress_context__}")
    assert len(texts) > 20
    for secret in (*SECRETS, str(tmp_path)):
        assert not any(secret in text for text in texts), secret


def test_nothing_is_printed_about_odd_files(tmp_path, make_dicom):
    plant(tmp_path, make_dicom)
    labels(tmp_path, "file,label\n" + "".join(f"{n},1\n" for n in ("odd", "MRN4711-pixels")))
    program = (
        "import sys; from pathlib import Path\n"
        "from fedward_client.data.dataset import DatasetSpec, read_dataset\n"
        "from fedward.plan.schema import Task\n"
        "task = Task(kind='classification', classes=('a', 'b'))\n"
        "for s in read_dataset(DatasetSpec(Path(sys.argv[1]), 'dicom'), task).samples:\n"
        "    try: s.load()\n"
        "    except Exception: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, str(tmp_path)],
        env={"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""
