"""A mask that is found by its name is that of one image, or of none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from fedward_client.data.dataset import DatasetSpec, read_dataset

AMBIGUOUS, NO_MASK, NO_IMAGE = "ambiguous name of mask", "no mask", "no image"


@pytest.fixture
def tree(tmp_path: Path, make_dicom: Any, make_plan: Any) -> Any:
    """Writes images and masks by path, reads them; patient to marked pixels, and what is left out.

    The patient of an image is the first letter of its path; a mask marks as many pixels as it says.
    """

    def read(
        images: list[str],
        masks: dict[str, int],
        base: str = "images",
        bad: str = "",
        uids: dict[str, str] | None = None,
    ) -> Any:
        for k, path in enumerate(images):
            tags = {"SOPInstanceUID": uids[path]} if uids and path in uids else {}
            values = np.full((8, 8), k, np.uint8)
            make_dicom(tmp_path / base / path, values, PatientID=path[0], **tags)
        if bad:
            (tmp_path / base / bad).write_bytes((tmp_path / base / bad).read_bytes()[:300])
        for path, count in masks.items():
            mask = np.zeros((8, 8), np.uint8)
            mask.flat[:count] = 1
            (tmp_path / "masks" / path).parent.mkdir(parents=True, exist_ok=True)
            if path.endswith(".png"):
                Pillow.fromarray(mask).save(tmp_path / "masks" / path)
            else:
                nib.save(nib.Nifti1Image(mask[..., None], np.eye(4)), tmp_path / "masks" / path)
        task = make_plan("segmentation").task
        found = read_dataset(DatasetSpec(tmp_path, "dicom"), task, empty=True)
        marked = {sample.patient.strip("\\"): int(sample.mask().sum()) for sample in found.samples}
        return marked, Counter(item.reason for item in found.left_out)

    return read


TWO = ["A/IM0001.dcm", "B/IM0001.dcm"]


@pytest.mark.parametrize("base", ["images", "."])
@pytest.mark.parametrize(
    ("masks", "marked", "left_out"),
    [
        ({"A/IM0001.png": 4, "B/IM0001.png": 9}, {"A": 4, "B": 9}, {}),
        ({"A/IM0001.nii.gz": 4, "B/IM0001.png": 9}, {"A": 4, "B": 9}, {}),
        ({"A/IM0001.png": 4}, {"A": 4}, {NO_MASK: 1}),
        ({"IM0001.png": 4}, {}, {AMBIGUOUS: 2}),
        ({"A/IM0001.png": 4, "A/IM0001.nii.gz": 9}, {}, {AMBIGUOUS: 1, NO_MASK: 1}),
        ({"C/IM0001.png": 4}, {}, {NO_MASK: 2, NO_IMAGE: 1}),
        ({"A/IM0001.png": 4, "IM0001.png": 9}, {"A": 4}, {AMBIGUOUS: 1}),
        ({"A/IM0001.png": 4, "B/IM0002.png": 9}, {"A": 4}, {NO_MASK: 1, NO_IMAGE: 1}),
    ],
)
def test_two_patients_with_files_of_one_name(tree, base, masks, marked, left_out):
    assert tree(TWO, masks, base) == (marked, left_out)


@pytest.mark.parametrize(
    ("images", "masks", "marked", "left_out"),
    [
        # One of the two trees is flat, or the deeper one ends alike: the name is enough.
        (["A/one.dcm", "B/two.dcm"], {"one.png": 4, "two.png": 9}, {"A": 4, "B": 9}, {}),
        (["A.dcm", "B.dcm"], {"x/A.png": 4, "y/B.png": 9}, {"A": 4, "B": 9}, {}),
        (["A/s/1.dcm", "B/t/1.dcm"], {"s/1.png": 4, "t/1.png": 9}, {"A": 4, "B": 9}, {}),
        # Of another folder, so perhaps of another patient.
        (["A/one.dcm"], {"B/one.png": 4}, {}, {NO_MASK: 1, NO_IMAGE: 1}),
        (["A/one.dcm", "A/one.ima"], {"A/one.png": 4}, {}, {AMBIGUOUS: 2}),
    ],
)
def test_names_in_trees_of_other_shapes(tree, images, masks, marked, left_out):
    assert tree(images, masks) == (marked, left_out)


def test_an_image_that_cannot_be_used_still_has_its_name(tree):
    marked, left_out = tree(TWO, {"IM0001.png": 4}, bad=TWO[1])
    assert marked == {} and left_out[AMBIGUOUS] == 1


def test_a_uid_leads_before_a_name_and_is_there_once(tree):
    uids = {"A/IM0001.dcm": "1.2.3", "B/IM0001.dcm": "1.2.4"}
    masks = {"1.2.3.png": 5, "x/1.2.4.png": 6, "y/1.2.4.png": 7, "B/IM0001.png": 9}
    marked, left_out = tree(TWO, masks, uids=uids)
    assert marked == {"A": 5}
    assert left_out == {AMBIGUOUS: 1, NO_IMAGE: 1}


# --- volumes -----------------------------------------------------------------------------------


def volume(folder: Path, make_dicom: Any, patient: str, uid: str, modality: str = "CT") -> None:
    for k in range(3):
        make_dicom(
            folder / f"{uid}-{k}.dcm",
            np.full((6, 5), k, np.uint8),
            PatientID=patient,
            SeriesInstanceUID=uid,
            PixelSpacing=[1, 1],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            ImagePositionPatient=[0, 0, k],
            Modality=modality,
        )


def volume_mask(path: Path, count: int) -> None:
    mask = np.zeros((5, 6, 3), np.uint8)
    mask.flat[:count] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(mask, np.diag([-1.0, -1, 1, 1])), path)


def read_volumes(root: Path, make_plan: Any, modality: str = "any") -> Any:
    task = make_plan("segmentation", size=(8, 8, 8), task={"modality": [modality]}).task
    found = read_dataset(DatasetSpec(root, "dicom"), task, empty=True)
    marked = {sample.patient.strip("\\"): int(sample.mask().sum()) for sample in found.samples}
    return marked, Counter(item.reason for item in found.left_out)


@pytest.mark.parametrize(
    ("masks", "marked", "left_out"),
    [
        ({"T1": 10}, {}, {AMBIGUOUS: 2}),
        ({"A/T1": 10, "B/T1": 30}, {"A": 10, "B": 30}, {}),
        ({"A/T1": 10}, {"A": 10}, {NO_MASK: 1}),
        ({"1.2.1": 10, "T2": 30}, {"A": 10}, {NO_MASK: 1, NO_IMAGE: 1}),
    ],
)
def test_two_patients_with_series_of_one_name(
    tmp_path, make_dicom, make_plan, masks, marked, left_out
):
    volume(tmp_path / "A" / "T1", make_dicom, "A", "1.2.1")
    volume(tmp_path / "B" / "T1", make_dicom, "B", "1.2.2")
    for name, count in masks.items():
        volume_mask(tmp_path / "masks" / f"{name}.nii.gz", count)
    assert read_volumes(tmp_path, make_plan) == (marked, left_out)


def test_a_folder_of_two_series_names_neither(tmp_path, make_dicom, make_plan):
    volume(tmp_path / "images" / "A", make_dicom, "A", "1.2.1")
    volume(tmp_path / "images" / "A", make_dicom, "A", "1.2.2")
    volume_mask(tmp_path / "masks" / "A.nii.gz", 10)
    assert read_volumes(tmp_path, make_plan) == ({}, {AMBIGUOUS: 2})


def test_a_series_that_is_left_out_still_has_its_name(tmp_path, make_dicom, make_plan):
    volume(tmp_path / "images" / "A" / "T1", make_dicom, "A", "1.2.1")
    volume(tmp_path / "images" / "B" / "T1", make_dicom, "B", "1.2.2", modality="MR")
    volume_mask(tmp_path / "masks" / "T1.nii.gz", 10)
    marked, left_out = read_volumes(tmp_path, make_plan, "CT")
    assert marked == {} and left_out == {AMBIGUOUS: 1, "other modality": 3}


def test_a_picture_is_no_mask_of_a_volume_and_is_told(tmp_path, make_dicom, make_plan):
    volume(tmp_path / "images" / "A", make_dicom, "A", "1.2.1")
    volume_mask(tmp_path / "masks" / "A.nii.gz", 10)
    Pillow.fromarray(np.zeros((6, 5), np.uint8)).save(tmp_path / "masks" / "A.png")
    marked, left_out = read_volumes(tmp_path, make_plan)
    assert marked == {"A": 10} and left_out == {"shape does not fit the task": 1}
