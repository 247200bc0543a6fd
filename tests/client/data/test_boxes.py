"""Boxes: from files to a prepared image, under every change of an image, and bad ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from fedward.errors import DataError
from fedward.plan import plan_from
from fedward.plan.schema import Augmentation, Plan
from fedward_client.data.augment import augment
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.options import BoxOptions
from fedward_client.data.prepare import doubts, prepare
from fedward_client.data.sample import Image, Sample
from fedward_client.data.transforms import prepare_image

HEAD = "image,class,xmin,ymin,xmax,ymax\n"


def plan_of(size: tuple[int, int] = (32, 32), **preprocessing: Any) -> Plan:
    return plan_from(
        {
            "version": 1,
            "study": {"name": "boxes"},
            "task": {"kind": "detection", "classes": ["dot", "Bar"]},
            "preprocessing": {"size": list(size), "intensity": "unit", **preprocessing},
            "split": {"validation": 0.2, "test": 0.2},
            "model": {"name": "retinanet", "channels": [4, 8, 8, 8, 8, 8]},
            "training": {
                "rounds": 1,
                "learning_rate": 0.01,
                "local_epochs": 1,
                "loss": "focal_giou",
            },
            "privacy": {"mechanism": "none"},
            "metrics": {"report": ["map50"], "primary": "map50"},
        }
    )


def pictures(root: Path, count: int = 6, shape: tuple[int, int] = (40, 60)) -> Path:
    (root / "images").mkdir(parents=True)
    for k in range(count):
        values = np.random.default_rng(k).integers(0, 255, shape, np.uint8)
        Pillow.fromarray(values).save(root / "images" / f"p{k}.png")
    return root


def read(root: Path, **options: Any) -> Any:
    spec = DatasetSpec(root, "folders", boxes=BoxOptions(**options))
    return read_dataset(spec, plan_of().task)


def reasons(dataset: Any) -> Counter[str]:
    return Counter(one.reason for one in dataset.left_out)


# Where boxes come from.

ROWS = ((5.0, 10.0, 15.0, 30.0, 1.0), (0.0, 2.0, 40.0, 50.0, 2.0))


def as_table(root: Path) -> None:
    table = HEAD + "images/p0.png,dot,10,5,30,15\np0.png,bar,2,0,50,40\np1,,,,,\n"
    (root / "boxes.csv").write_text(table)


def as_sides(root: Path) -> None:
    table = "file;label;x;y;width;height\np0.png;0;10;5;20;10\np0.png;Bar;2;0;48;40\n"
    (root / "boxes.csv").write_text(table)


def as_coco(root: Path) -> None:
    told = {
        "images": [{"id": 7, "file_name": "p0.png"}, {"id": 8, "file_name": "p1.png"}],
        "categories": [{"id": 3, "name": "dot"}, {"id": 9, "name": "bar"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "bbox": [10, 5, 20, 10]},
            {"image_id": 7, "category_id": 9, "bbox": [2, 0, 48, 40]},
            {"image_id": 8, "category_id": 9, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        ],
    }
    (root / "boxes.json").write_text(json.dumps(told))


def as_yolo(root: Path) -> None:
    (root / "labels").mkdir()
    rows = f"0 {20 / 60} {10 / 40} {20 / 60} {10 / 40}\n1 {26 / 60} 0.5 {48 / 60} 1.0\n"
    (root / "labels" / "p0.txt").write_text(rows)


@pytest.mark.parametrize(
    ("write", "source"),
    [(as_table, "table"), (as_sides, "table"), (as_coco, "table"), (as_yolo, "yolo")],
)
def test_all_forms_of_boxes_say_the_same(tmp_path: Path, write: Any, source: str) -> None:
    write(pictures(tmp_path))
    found = read(tmp_path, source=source)
    assert not found.left_out and len(found.samples) == 6
    np.testing.assert_allclose(found.samples[0].boxes, ROWS, atol=1e-4)
    assert all(sample.boxes == () for sample in found.samples[1:]), "no box is an answer too"


def test_boxes_are_around_the_parts_of_masks(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "masks").mkdir()
    for k in range(6):
        mask = np.zeros((40, 60), np.uint8)
        mask[5:15, 10:30] = 1
        mask[20:24, 40:41] = 2
        mask[24:28, 41:45] = 2  # touches at a corner: one thing
        mask[0, 59] = 2 * (k > 0)
        Pillow.fromarray(mask).save(tmp_path / "masks" / f"p{k}.png")
    found = read(tmp_path, source="masks")
    site = prepare("here", found.samples, plan_of((40, 60)))
    expected = [[5, 10, 15, 30, 1], [20, 40, 28, 45, 2]]
    np.testing.assert_array_equal(site.targets[0][:3], [*expected, [0] * 5])
    third = [expected[0], [0, 59, 1, 60, 2], expected[1]]
    np.testing.assert_array_equal(site.targets[1][:3], third)


@pytest.mark.parametrize("source", ["file", "SOPInstanceUID", "coco", "yolo"])
def test_boxes_of_dicom_images_are_told_by_the_same_tables(
    tmp_path: Path, make_dicom: Any, source: str
) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (40, 60), np.uint16)
    for k in range(4):
        make_dicom(
            tmp_path / "images" / f"p{k}.dcm", values, PatientID=f"P{k}", SOPInstanceUID=f"1.2.{k}"
        )
    make_dicom(tmp_path / "images" / "clip.dcm", np.stack([values] * 2), frames=2, PatientID="P9")
    if source == "yolo":
        as_yolo(tmp_path)
    elif source == "coco":
        as_coco(tmp_path)
        text = (tmp_path / "boxes.json").read_text().replace(".png", ".dcm")
        (tmp_path / "boxes.json").write_text(text)
    else:
        as_table(tmp_path)
        text = (tmp_path / "boxes.csv").read_text().replace("image,", f"{source},")
        name = "1.2.0" if source == "SOPInstanceUID" else "p0.dcm"
        text = text.replace("images/p0.png", name).replace("p0.png", name)
        (tmp_path / "boxes.csv").write_text(text)
    options = BoxOptions(source="yolo" if source == "yolo" else "table")
    task = plan_of().task
    found = read_dataset(DatasetSpec(tmp_path, "dicom", boxes=options), task)
    assert reasons(found)["shape does not fit the task"] == 1
    ours = [one for one in found.samples if one.boxes]
    assert len(found.samples) == 4 and len(ours) == 1 and ours[0].patient.endswith("P0")
    np.testing.assert_allclose(ours[0].boxes, ROWS, atol=1e-4)
    site = prepare("here", found.samples, plan_of((40, 60)))
    place = found.samples.index(ours[0])
    np.testing.assert_allclose(site.targets[place][: len(ROWS)], ROWS, atol=1e-4)


def test_a_segmentation_is_boxes_of_its_images_and_no_image_without_a_box(
    tmp_path: Path, make_ct: Any, make_seg: Any
) -> None:
    images = make_ct(tmp_path / "ct", 3)
    rows, columns = images[0].Rows, images[0].Columns
    masks = np.zeros((3, rows, columns), np.uint8)
    masks[1, 2:5, 4:9] = 1
    make_seg(tmp_path / "seg.dcm", images, masks, ["dot"])
    spec = DatasetSpec(tmp_path, "dicom", boxes=BoxOptions(source="masks"))
    found = read_dataset(spec, plan_of().task)
    plan = plan_of((rows, columns))
    boxes = [
        prepare_image(one.load(), one.mask and one.mask(), plan.task, plan.preprocessing).boxes
        for one in found.samples
    ]
    marked = [one[0] for one in boxes if one is not None and one[0, -1]]
    assert len(boxes) == 3
    np.testing.assert_array_equal(marked, [[2, 4, 5, 9, 1]])
    (tmp_path / "boxes.csv").write_text(HEAD)
    table = read_dataset(DatasetSpec(tmp_path, "dicom"), plan_of().task)
    assert len(table.samples) == 3 and reasons(table) == {"not selected": 1}


def test_boxes_of_an_image_of_which_a_region_is_seen_move_with_it() -> None:
    values = np.random.default_rng(0).integers(0, 255, (1, 40, 60)).astype(np.float32)
    image = Image(values, (1.0, 1.0), region=(slice(10, 30), slice(20, 60)))
    boxes = (
        (12.0, 25.0, 20.0, 35.0, 1.0),
        (25.0, 50.0, 35.0, 60.0, 2.0),
        (0.0, 0.0, 9.0, 9.0, 1.0),
    )
    plan = plan_of((20, 40))
    made = prepare_image(image, None, plan.task, plan.preprocessing, boxes)
    assert made.boxes is not None
    expected = [[2, 5, 10, 15, 1], [15, 30, 20, 40, 2], [0] * 5]
    np.testing.assert_array_equal(made.boxes[:3], expected)


@pytest.mark.parametrize("form", ["npz", "nifti"])
def test_masks_of_other_formats_give_boxes_too(tmp_path: Path, form: str) -> None:
    images = np.random.default_rng(0).integers(0, 255, (4, 40, 60), np.uint8)
    masks = np.zeros((4, 40, 60), np.uint8)
    masks[:, 5:15, 10:30] = 1
    root = tmp_path / "all.npz"
    if form == "npz":
        np.savez(root, images=images, masks=masks)
    else:
        root = tmp_path
        for folder, arrays in (("images", images), ("masks", masks)):
            (root / folder).mkdir()
            for k, array in enumerate(arrays):
                values = array.T[..., None].astype(np.int16)
                turned = np.diag([-1.0, -1.0, 1.0, 1.0])  # columns to the left, rows to the back
                nib.save(nib.Nifti1Image(values, turned), root / folder / f"p{k}.nii.gz")
    spec = DatasetSpec(root, form, boxes=BoxOptions(source="masks"))
    site = prepare("here", read_dataset(spec, plan_of().task).samples, plan_of((40, 60)))
    np.testing.assert_array_equal(site.targets[:, 0], [[5, 10, 15, 30, 1]] * 4)


BAD = {
    "p0.png,dot,10,5,30,45": "box outside its image",
    "p0.png,dot,-4,5,30,15": "box outside its image",
    "p0.png,dot,10,5,10,15": "box without area",
    "p0.png,dot,30,5,10,15": "box without area",
    "p0.png,dot,10,5,thirty,15": "box is not numbers",
    "p0.png,dot,10,5,,15": "box is not numbers",
    "p0.png,dot,10,5,nan,15": "box is not numbers",
    "p0.png,blob,10,5,30,15": "unknown class",
    "p9.png,dot,10,5,30,15": "no image",
    "\n".join(["p0.png,dot,10,5,30,15"] * 257): "too many boxes",
}


@pytest.mark.parametrize(("row", "reason"), BAD.items(), ids=BAD.values())
def test_an_image_with_a_bad_box_is_left_out_and_counted(
    tmp_path: Path, row: str, reason: str
) -> None:
    pictures(tmp_path)
    (tmp_path / "boxes.csv").write_text(f"{HEAD}p0.png,dot,1,1,9,9\n{row}\np1.png,bar,0,0,9,9\n")
    found = read(tmp_path)
    assert reasons(found) == {reason: 1}
    assert len(found.samples) == (6 if reason == "no image" else 5)
    # The same at training, should an image have changed since it was read.
    if reason.startswith("box") and "numbers" not in reason:
        corners = [float(cell) for cell in row.split(",")[2:]]
        rows = ((corners[1], corners[0], corners[3], corners[2], 1.0),)
        bad = Sample("p", found.samples[0].load, boxes=rows)
        site = prepare("here", [bad, *found.samples], plan_of())
        assert site.left_out == {reason: 1}


def test_a_box_may_be_a_pixel_off_and_words_and_others_can_be_told(tmp_path: Path) -> None:
    pictures(tmp_path)
    rows = "p0.png,Blob,-0.5,0,61,40\np0.png,artefact,1,1,5,5\n"
    (tmp_path / "boxes.csv").write_text(HEAD + rows)
    found = read(tmp_path, words={"blob": "dot"}, others="ignore")
    assert not found.left_out and len(found.samples[0].boxes) == 1
    site = prepare("here", found.samples, plan_of((40, 60)))
    np.testing.assert_array_equal(site.targets[0][0], [0, 0, 40, 60, 1])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "boxes must stand in boxes.csv"),
        ("picture,class,xmin,ymin,xmax,ymax\n", "a column of the image"),
        ("image,kind,xmin,ymin,xmax,ymax\n", "a column of the class"),
        ("image,class,left,top,right,bottom\n", "columns of corners"),
    ],
)
def test_a_table_that_says_nothing_is_refused(tmp_path: Path, text: str | None, told: str) -> None:
    pictures(tmp_path)
    if text is not None:
        (tmp_path / "boxes.csv").write_text(text + "p0.png,dot,1,1,2,2\n")
    with pytest.raises(DataError, match=told):
        read(tmp_path)


def test_formats_that_hold_no_boxes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", images=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(DataError, match="boxes are read from folders and dicom"):
        read_dataset(DatasetSpec(tmp_path / "all.npz", "npz"), plan_of().task)


# Where boxes go.

SHAPE = (40, 60)


def painted(box: Any, shape: tuple[int, int] = SHAPE, fine: int = 1) -> Any:
    values = np.zeros((shape[0] * fine, shape[1] * fine), np.float32)
    rows, columns = (slice(round(box[a] * fine), round(box[a + 2] * fine)) for a in (0, 1))
    values[rows, columns] = 1
    return values


def edges(picture: Any, cut: float = 0.5) -> list[float]:
    """Where a bright thing begins and ends, in pixels from the border of the picture."""
    rows, columns = np.nonzero(np.asarray(picture) > cut)
    return [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"resize": "fit"},
        {"spacing": [2.0, 2.0]},
        {"spacing": [0.5, 0.5]},
        {"spacing": [0.3, 0.3]},
        {"size": (24, 30), "spacing": [1.0, 1.0]},
        {"size": (57, 33)},
        {"size": (57, 33), "resize": "fit"},
    ],
)
def test_boxes_go_where_the_image_goes(how: dict[str, Any]) -> None:
    plan = plan_of(**{"size": (64, 64), **how})
    box = (12.0, 20.0, 26.0, 40.0)
    image = Image(painted(box)[None], (1.0, 1.0), (0.0, 1.0))
    made = prepare_image(image, None, plan.task, plan.preprocessing, ((*box, 2.0),))
    assert made.boxes is not None and made.boxes[0, 4] == 2 and not made.boxes[1:].any()
    np.testing.assert_allclose(made.boxes[0, :4], edges(made.pixels[0]), atol=0.76)


def test_what_the_plan_cuts_off_is_gone_and_told() -> None:
    plan = plan_of((16, 16), spacing=[1.0, 1.0])
    pixels = np.random.default_rng(0).random((1, 40, 40)).astype(np.float32)
    image = Image(pixels, (1.0, 1.0))
    rows = ((10.0, 10.0, 20.0, 20.0, 1.0), (5.0, 5.0, 13.5, 13.5, 2.0), (0.0, 0.0, 6.0, 6.0, 1.0))
    made = prepare_image(image, None, plan.task, plan.preprocessing, rows)
    assert made.boxes is not None
    np.testing.assert_array_equal(made.boxes[0], [0, 0, 8, 8, 1])
    assert not made.boxes[1:].any() and made.lost == pytest.approx(2 / 3)
    away = [Sample(str(k), lambda: image, boxes=rows[2:]) for k in range(5)]
    assert any("lost all" in doubt for doubt in doubts(prepare("here", away, plan), plan))


GEOMETRIC = [
    {"flip": ("horizontal",)},
    {"flip": ("vertical",)},
    {"flip": ("horizontal", "vertical")},
    {"scale": 0.3},
    {"shift": 0.2},
    {"rotate": 20.0},
    {"flip": ("vertical",), "scale": 0.2, "shift": 0.1, "rotate": 40.0},
]


@pytest.mark.parametrize("how", GEOMETRIC)
def test_boxes_follow_every_geometric_change(how: dict[str, Any]) -> None:
    """Against a picture of the box that is changed itself: the upright box around it."""
    box, fine = np.array([12.0, 18.0, 27.0, 41.0]), 4
    count = 24
    images = torch.from_numpy(painted(box, fine=fine))[None, None].repeat(count, 1, 1, 1)
    boxes = torch.zeros(count, 4, 5)
    boxes[:, 2] = torch.tensor([*(fine * box), 2])
    strengths = Augmentation.model_validate(how)
    seeded = torch.Generator().manual_seed(3)
    changed, moved = augment(images, boxes, strengths, seeded, "boxes")
    assert moved is not None and moved.shape == boxes.shape
    for picture, own in zip(changed[:, 0].numpy(), moved.numpy(), strict=True):
        assert own[2, 4] == 2 and not own[[0, 1, 3]].any()
        np.testing.assert_allclose(own[2, :4] / fine, np.array(edges(picture)) / fine, atol=0.6)
    assert len(np.unique(moved[:, 2].numpy().round(2), axis=0)) > 1


def test_boxes_that_leave_the_image_are_cut_and_those_that_left_are_gone() -> None:
    boxes = torch.zeros(200, 2, 5)
    boxes[:, 0] = torch.tensor([0.0, 0.0, 10.0, 10.0, 1.0])
    boxes[:, 1] = torch.tensor([15.0, 25.0, 25.0, 35.0, 2.0])
    images = torch.zeros(200, 1, *SHAPE)
    strengths = Augmentation(shift=0.4)
    _, moved = augment(images, boxes, strengths, torch.Generator().manual_seed(0), "boxes")
    assert moved is not None
    there = moved[:, 0, 4] > 0
    assert 20 < there.sum() < 180
    areas = (moved[:, 0, 2:4] - moved[:, 0, :2]).prod(1)
    assert (areas[there] >= 24.9).all() and not moved[~there, 0].any()
    assert (moved[..., :2] >= 0).all() and (moved[..., 2:4] <= torch.tensor(SHAPE)).all()


def test_labels_are_not_moved() -> None:
    labels = torch.arange(3)
    seeded = torch.Generator().manual_seed(0)
    _, same = augment(torch.rand(3, 1, 8, 8), labels, Augmentation(rotate=9), seeded, "labels")
    assert same is labels
