"""A mask that is found by its name is that of one image, or of none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.data.dataset import DatasetSpec, hints, read_dataset
from fedward_client.data.options import ChannelOptions, MaskOptions
from fedward_client.data.survey import survey
from fedward_client.predict.inputs import find_inputs

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
        folder: str = "masks",
        suffix: str = "",
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
            (tmp_path / folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path.endswith(".png"):
                Pillow.fromarray(mask).save(tmp_path / folder / path)
            else:
                nib.save(nib.Nifti1Image(mask[..., None], np.eye(4)), tmp_path / folder / path)
        task = make_plan("segmentation").task
        spec = DatasetSpec(tmp_path, "dicom", masks=MaskOptions(suffix=suffix))
        found = read_dataset(spec, task, empty=True)
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


# --- endings of names --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "masks", "marked", "left_out"),
    [
        (TWO, {"A/IM0001_mask.png": 4, "B/IM0001_mask.png": 9}, {"A": 4, "B": 9}, {}),
        (["A/a.dcm", "B/b.dcm"], {"a_mask.png": 4, "b_mask.nii.gz": 9}, {"A": 4, "B": 9}, {}),
        (TWO, {"IM0001_mask.png": 4}, {}, {AMBIGUOUS: 2}),  # one mask, two patients
        (["A/P1.dcm", "B/P12.dcm"], {"P12_mask.png": 4}, {"B": 4}, {NO_MASK: 1}),
        # Another patient's or another scan's mask, or nobody can tell whose.
        (["A/P1.dcm"], {"P12.png": 4}, {}, {NO_MASK: 1, NO_IMAGE: 1}),
        (["A/P1.dcm"], {"P1_2.png": 4}, {}, {NO_MASK: 1, NO_IMAGE: 1}),
        (["A/Smith.dcm"], {"Smith_Anna.png": 4}, {}, {NO_MASK: 1, NO_IMAGE: 1}),
        (["A/Smith.dcm"], {"Smithers.png": 4}, {}, {NO_MASK: 1, NO_IMAGE: 1}),
        (["A/P.dcm", "B/P_L.dcm"], {"P_L_mask.png": 4}, {}, {NO_MASK: 2, NO_IMAGE: 1}),
        (TWO, {"A/IM0001_mask.png": 4, "B/IM0001.png": 9}, {"B": 9}, {NO_MASK: 1, NO_IMAGE: 1}),
    ],
)
def test_an_ending_of_all_masks_in_a_dicom_tree(tree, images, masks, marked, left_out):
    assert tree(images, masks) == (marked, left_out)


def test_an_ending_of_masks_of_volumes(tmp_path, make_dicom, make_plan):
    volume(tmp_path / "images" / "A", make_dicom, "A", "1.2.1")
    volume(tmp_path / "images" / "B", make_dicom, "B", "1.2.2")
    volume_mask(tmp_path / "masks" / "A_seg.nii.gz", 10)
    volume_mask(tmp_path / "masks" / "1.2.2_seg.nii.gz", 30)
    assert read_volumes(tmp_path, make_plan) == ({"A": 10, "B": 30}, {})


def files(root: Path, images: list[str], masks: dict[str, int], suffix: str = "") -> Any:
    """Marked pixels by patient, the hints, and what is left out, of pictures or NIfTI slices."""
    volumes = images[0].endswith(".nii.gz")
    for name, count in [*((f"images/{name}", 0) for name in images), *masks.items()]:
        values = np.zeros((8, 8), np.uint8)
        values.flat[:count] = 1
        path = root / name if name.startswith("images/") else root / "masks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if volumes:
            nib.save(nib.Nifti1Image(values[..., None], np.eye(4)), path)
        else:
            Pillow.fromarray(values).save(path)
    spec = DatasetSpec(root, masks=MaskOptions(suffix=suffix))
    task = Task(kind="segmentation", classes=("lesion",))
    found = read_dataset(spec, task, empty=True)
    marked = {sample.patient: int(sample.mask().sum()) for sample in found.samples if sample.mask}
    told = hints(spec, task, found.left_out)
    return marked, told, Counter(item.reason for item in found.left_out)


@pytest.mark.parametrize("format", ["png", "nii.gz"])
def test_only_an_ending_that_can_be_told_apart_is_found(tmp_path, format):
    def look(folder: str, images: list[str], masks: list[str], suffix: str = "") -> Any:
        counted = {f"{name}.{format}": k for k, name in enumerate(masks, start=1)}
        names = [f"{name}.{format}" for name in images]
        marked, told, left_out = files(tmp_path / folder, names, counted, suffix)
        return {Path(name).name.split(".")[0]: n for name, n in marked.items()}, told, left_out

    assert look("a", ["P1", "P12"], ["P12_seg", "P1_seg"])[0] == {"P12": 1, "P1": 2}
    assert look("b", ["P1", "P2"], ["P1_lesion", "P2_lesion"])[0] == {"P1": 1, "P2": 2}
    marked, told, left_out = look("c", ["P1", "P2"], ["P10", "P20"])
    assert marked == {} and left_out == {NO_MASK: 2, NO_IMAGE: 2}
    assert look("d", ["P", "P_L"], ["P_L_mask"])[0] == {}
    # Of nnU-Net: a label map has the name without the number of the channel.
    assert look("e", ["P1_0000", "P12_0000"], ["P12", "P1"])[0] == {"P12": 1, "P1": 2}
    marked, told, _ = look("f", ["P1_0000", "P1_0001", "P2_0000", "P2_0001"], ["P1", "P2"])
    assert marked == {} and "end in _0000 (2), _0001 (2) beyond their mask's" in told[0]
    # What is told ends the search; another reader's masks are left out.
    names = ["P1_1stHO", "P1_2ndHO", "P2_1stHO", "P2_2ndHO"]
    marked, told, _ = look("g", ["P1", "P2"], names)
    assert marked == {} and 'set masks.suffix = "_1stHO", or the one that is meant' in told[0]
    marked, told, left_out = look("g", ["P1", "P2"], names, "_2ndHO")
    assert marked == {"P1": 2, "P2": 4} and told == [] and left_out == {"not selected": 2}


def test_tables_call_an_image_of_nnunet_as_its_label_map(tmp_path):
    images = ["P1_0000.nii.gz", "P2_0000.nii.gz"]
    (tmp_path / "patients.csv").write_text("image,patient\nP1,anna\nP2,berta\n")
    masks = {"P1.nii.gz": 3, "P2.nii.gz": 5}
    assert files(tmp_path, images, masks) == ({"anna": 3, "berta": 5}, [], {})


def test_an_ending_that_is_told_counts_in_a_dicom_tree_too(tmp_path, make_dicom, make_plan):
    for name in ("A", "B"):
        make_dicom(
            tmp_path / "images" / name / "IM1.dcm", np.zeros((8, 8), np.uint8), PatientID=name
        )
        (tmp_path / "masks" / name).mkdir(parents=True)
        for count, suffix in ((4, "_m1"), (9, "_m2")):
            mask = np.zeros((8, 8), np.uint8)
            mask.flat[:count] = 1
            Pillow.fromarray(mask).save(tmp_path / "masks" / name / f"IM1{suffix}.png")
    task = make_plan("segmentation").task
    spec = DatasetSpec(tmp_path, "dicom")
    found = read_dataset(spec, task, empty=True)
    assert not found.samples
    (told,) = hints(spec, task, found.left_out)
    assert "end in _m1 (2), _m2 (2)" in told and 'masks.suffix = "_m1"' in told
    found = read_dataset(replace(spec, masks=MaskOptions(suffix="_m2")), task)
    assert [int(sample.mask().sum()) for sample in found.samples] == [9, 9]


def beside(root: Path, names: list[str], suffix: str = "", channels: Any = None) -> Any:
    """Marked pixels by image, notes and what is left out, where all lie in one folder.

    The k-th file has k pixels that are not 0.
    """
    for count, name in enumerate(names, start=1):
        values = np.zeros((8, 8), np.uint8)
        values.flat[:count] = 1
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".nii.gz"):
            nib.save(nib.Nifti1Image(values[..., None], np.eye(4)), root / name)
        else:
            Pillow.fromarray(values).save(root / name)
    spec = DatasetSpec(root, masks=MaskOptions(suffix=suffix), channels=channels or {})
    found = read_dataset(spec, Task(kind="segmentation", classes=("lesion",)), empty=True)
    marked = {one.patient.partition(".")[0]: int(one.mask().sum()) for one in found.samples}
    return marked, found.notes, Counter(item.reason for item in found.left_out)


@pytest.mark.parametrize("format", ["png", "nii.gz"])
def test_masks_beside_their_images_are_told_by_their_ending(tmp_path, format):
    def look(folder: str, *names: str, suffix: str = "") -> Any:
        return beside(tmp_path / folder, [f"{name}.{format}" for name in names], suffix)

    note = 'names of masks end in "_mask" ({}); masks.suffix can say otherwise'
    names = ("P1", "P1_mask", "P12", "P12_mask")
    assert look("flat", *names) == ({"P1": 2, "P12": 4}, (note.format(2),), {})
    assert look("in/images", *names) == look("flat", *names)
    assert read_dataset(
        DatasetSpec(tmp_path / "in"), Task(kind="segmentation", classes=("lesion",))
    )
    # A folder for each patient, a mask whose image is gone, an image without a mask.
    marked, notes, left_out = look("tree", "A/1", "A/1_mask", "B/1", "B/1_mask", "C/1", "D/1_mask")
    assert marked == {"A/1": 2, "B/1": 4} and notes == (note.format(3),)
    assert left_out == {NO_MASK: 1, NO_IMAGE: 1}
    # A further image of the patient is no mask.
    assert look("more", "P1", "P1_flair", "P1_seg")[0::2] == ({"P1": 3}, {NO_MASK: 1})


@pytest.mark.parametrize("format", ["png", "nii.gz"])
def test_masks_beside_their_images_are_not_guessed(tmp_path, format):
    def look(folder: str, *names: str, suffix: str = "") -> Any:
        return beside(tmp_path / folder, [f"{name}.{format}" for name in names], suffix)

    several = ("P1", "P1_mask", "P1_mask_1", "P2", "P2_mask")
    with pytest.raises(DataError, match=r"_mask \(2\), _mask_1 \(1\).*set masks.suffix"):
        look("several", *several)
    marked, notes, left_out = look("several", *several, suffix="_mask")
    assert (marked, notes, left_out) == ({"P1": 2, "P2": 5}, (), {"not selected": 1})
    with pytest.raises(DataError, match="end in _mask"):  # of P_L, or of P and its left?
        look("either", "P", "P_L", "P_L_mask")
    for names in (("P1", "P2"), ("P1", "P1_2"), ("a/P1", "b/P1_mask")):
        with pytest.raises(DataError, match="P1_mask beside P1"):
            look(f"none-{names[1][0]}", *names)


def test_a_mask_beside_the_channels_of_its_image(tmp_path):
    channels = {name: ChannelOptions(suffix=f"_{name}") for name in ("t1", "flair")}
    names = [f"{p}/{p}_{kind}.nii.gz" for p in ("P1", "P2") for kind in ("t1", "flair", "seg")]
    marked, _, left_out = beside(tmp_path, names, channels=channels)
    assert marked == {"P1/P1": 3, "P2/P2": 6} and not left_out


def test_a_mask_beside_its_image_is_not_predicted(tmp_path):
    beside(tmp_path, ["P1.png", "P1_mask.png", "P2.png"])
    task = Task(kind="segmentation", classes=("lesion",))
    assert [one.name for one in find_inputs(tmp_path, task).sources] == ["P1.png", "P2.png"]


@pytest.mark.parametrize("base", ["images", "."])
@pytest.mark.parametrize(
    ("masks", "suffix", "marked", "left_out"),
    [
        ({"A/IM0001_mask.png": 4, "B/IM0001_mask.png": 9}, "", {"A": 4, "B": 9}, {}),
        # A preview has no word for masks, a mask of no image is told, and no name is guessed.
        (
            {"A/IM0001_seg.nii.gz": 4, "A/IM0001.png": 9, "B/IM0002_seg.png": 1},
            "",
            {"A": 4},
            {NO_MASK: 1, "not DICOM": 1, NO_IMAGE: 1},
        ),
        ({"A/IM0001m1.png": 4, "B/IM0001m1.png": 9}, "m1", {"A": 4, "B": 9}, {}),
        ({"IM0001_mask.png": 4, "A/IM0001_mask.png": 9}, "", {"A": 9}, {AMBIGUOUS: 1}),
    ],
)
def test_masks_among_dicom_files(tree, base, masks, suffix, marked, left_out):
    assert tree(TWO, masks, base=base, folder=base, suffix=suffix) == (marked, left_out)


def test_masks_among_dicom_files_are_not_guessed(tree):
    with pytest.raises(DataError, match="DICOM files for segmentation need masks"):
        tree(TWO, {"A/IM0001_2.png": 4, "B/IM0001.png": 4}, folder="images")
    with pytest.raises(DataError, match=r"_mask \(1\), _gt \(1\).*set masks.suffix"):
        tree(TWO, {"A/IM0001_mask.png": 4, "B/IM0001_gt.png": 9}, folder="images")


@pytest.mark.parametrize(
    "name", ["{}/T1_seg.nii.gz", "{}/T1/T1_seg.nii.gz", "{}/T1/seg.nii.gz", "labels/{}/T1.nii.gz"]
)
def test_masks_of_volumes_beside_their_series_or_in_it(tmp_path, make_ct, read_masked, name):
    place = np.diag([-0.9, -0.7, 2.5, 1.0])
    place[:3, 3] = [20, -15, 40]
    for k, patient in enumerate("AB"):
        uids = {"SeriesInstanceUID": f"1.2.{k}", "StudyInstanceUID": f"1.3.{k}"}
        (slice_, *_) = make_ct(tmp_path / patient / "T1", PatientID=patient, **uids)
        mask = np.zeros((slice_.Columns, slice_.Rows, 5), np.uint8)
        mask.flat[: k + 3] = 1
        file = tmp_path / name.format(patient)
        file.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(mask, place), file)
    found = read_masked(tmp_path, ("x",))
    assert {one.patient.strip("\\"): int(one.mask().sum()) for one in found.samples} == {
        "A": 3,
        "B": 4,
    }
    assert not found.left_out
    assert survey(tmp_path).kind == "segmentation"
    beside = "labels" not in name
    assert len(found.notes) == beside
    assert not beside or survey(tmp_path).dimensions == 3
