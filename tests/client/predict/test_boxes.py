"""Boxes of ``fedward-client predict``: what the network finds, in pixels of the image."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import torch
from debian import dciodvfy
from PIL import Image as Pillow

from fedward.errors import PlanError
from fedward.integrity import about_model
from fedward.models import build_model, from_arrays, save_model, to_arrays
from fedward.models.finished import open_finished
from fedward.plan import Plan, plan_from
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.readers.images import Picture
from fedward_client.data.transforms import prepare_image
from fedward_client.explain.run import How, explain
from fedward_client.predict.inputs import find_inputs
from fedward_client.predict.run import Wish, predict
from fedward_client.training.runtime import Runtime

SHAPE = (40, 60)


def plan_of(**preprocessing: Any) -> Plan:
    return plan_from(
        {
            "version": 1,
            "study": {"name": "boxes"},
            "task": {"kind": "detection", "classes": ["dot", "bar"]},
            "preprocessing": {"size": [48, 48], **preprocessing},
            "model": {"name": "retinanet", "channels": [4, 8, 8, 8, 8, 8]},
            "training": {
                "rounds": 1,
                "learning_rate": 0.1,
                "local_epochs": 1,
                "loss": "focal_giou",
            },
            "privacy": {"mechanism": "none"},
            "metrics": {"report": ["map50"], "primary": "map50"},
        }
    )


def model_of(path: Path, plan: Plan, bias: float) -> tuple[Path, dict[str, Any]]:
    """A network with random weights that is sure of much."""
    arrays = to_arrays(build_model(plan, 1))
    arrays["detector.classes.6.bias"] = np.array([bias, bias - 1], np.float32)
    weight = arrays["detector.classes.6.weight"]
    arrays["detector.classes.6.weight"] = 30 * weight
    save_model(path, arrays, about_model("study-1", plan, "shared"))
    return path, arrays


def picture(path: Path, seed: int = 0) -> None:
    values = np.random.default_rng(seed).integers(0, 255, SHAPE, np.uint8)
    Pillow.fromarray(values).save(path)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder with one picture, `a.png`."""
    folder = tmp_path / "scans"
    folder.mkdir()
    picture(folder / "a.png")
    return folder


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


HOW = [{}, {"resize": "fit"}, {"size": [32, 32], "spacing": [1.0, 1.0]}, {"spacing": [0.5, 0.5]}]


@pytest.mark.parametrize("how", HOW)
def test_boxes_lie_where_the_network_found_them(tmp_path: Path, how: dict[str, Any]) -> None:
    plan = plan_of(**how)
    file, arrays = model_of(tmp_path / "model.safetensors", plan, 0.0)
    scans = tmp_path / "scans"
    scans.mkdir()
    for k in range(2):
        picture(scans / f"p{k}.png", k)
    opened, out = open_finished(file), tmp_path / "out"
    predict(Wish(opened, scans, out, force=True), find_inputs(scans, plan.task), Runtime())
    rows = table(out / "boxes.csv")
    told = json.loads((out / "predictions.json").read_text("utf-8"))["inputs"]
    network = build_model(plan, 0).eval()
    from_arrays(network, arrays)
    for k, one in enumerate(told):
        image = Picture(scans / f"p{k}.png")()
        # Where each box of the file is on the prepared image, by the way that marked boxes go.
        named = one["images"][0]["boxes"]
        boxes = [(b["ymin"], b["xmin"], b["ymax"], b["xmax"], 1.0) for b in named]
        made = prepare_image(image, None, plan.task, plan.preprocessing, tuple(boxes))
        assert made.boxes is not None and boxes
        with torch.no_grad():
            output = network(torch.from_numpy(made.pixels[None]))
        corners, scores, kinds = plan.task.spec.boxes(plan.task, output)[0]
        sure = scores >= 0.3
        assert len(boxes) == sure.sum() == len([row for row in rows if row["image"] == one["name"]])
        np.testing.assert_allclose([b["score"] for b in named], scores[sure])
        names = [plan.task.classes[int(kind)] for kind in kinds[sure]]
        assert [b["class"] for b in named] == names
        assert one["images"][0]["found"] == {name: names.count(name) for name in plan.task.classes}
        low, high = np.zeros(2), np.array(plan.preprocessing.size)
        inside = (corners[sure] > np.tile(low, 2)) & (corners[sure] < np.tile(high, 2))
        given = np.array(boxes)[:, :4]
        inside &= (given > 0) & (given < np.tile(SHAPE, 2))
        moved = forward(given, plan, made.spacing)
        np.testing.assert_allclose(moved[inside], corners[sure][inside], atol=0.02)
        assert inside.sum() > 3


def forward(boxes: Any, plan: Plan, spacing: Any) -> Any:
    """Pixels of the image to pixels of the prepared one, by the spacing and the middle alone."""
    ends = boxes.reshape(-1, 2, 2) / np.array(spacing)
    sides = np.floor(np.array(SHAPE) / np.array(spacing) + 1e-6)
    return (ends + (np.array(plan.preprocessing.size) - sides) // 2).reshape(-1, 4)


def test_the_table_of_boxes_serves_as_a_dataset_s(tmp_path: Path, scans: Path) -> None:
    plan = plan_of()
    file, _ = model_of(tmp_path / "model.safetensors", plan, -1.0)
    opened, out = open_finished(file), tmp_path / "out"
    predict(Wish(opened, scans, out), find_inputs(scans, plan.task), Runtime())
    (scans / "boxes.csv").write_bytes((out / "boxes.csv").read_bytes())
    found = read_dataset(DatasetSpec(scans, "folders"), plan.task)
    rows = table(out / "boxes.csv")
    assert rows and not found.left_out
    assert len(found.samples[0].boxes or ()) == len(rows)
    again = find_inputs(scans, plan.task)
    assert [one.name for one in again.sources] == ["a.png"] and not again.left_out
    (line,) = table(out / "predictions.csv")
    assert int(line["found dot"]) + int(line["found bar"]) == len(rows)


def test_a_model_that_finds_nothing_says_so(tmp_path: Path, scans: Path) -> None:
    plan = plan_of()
    file, _ = model_of(tmp_path / "model.safetensors", plan, -30.0)
    opened, out = open_finished(file), tmp_path / "out"
    outcome = predict(Wish(opened, scans, out), find_inputs(scans, plan.task), Runtime())
    assert outcome.count("predicted") == 1
    assert (out / "boxes.csv").read_text() == "image,frame,class,xmin,ymin,xmax,ymax,score\n"
    assert outcome.records[0]["images"] == [{"found": {"dot": 0, "bar": 0}, "boxes": []}]


def test_no_map_is_made_of_boxes(tmp_path: Path, scans: Path) -> None:
    plan, out = plan_of(), tmp_path / "out"
    file, _ = model_of(tmp_path / "model.safetensors", plan, 0.0)
    wish = Wish(open_finished(file), scans, out)
    with pytest.raises(PlanError, match="maps are made for classifications and segmentations"):
        explain(wish, find_inputs(scans, plan.task), Runtime(), How())
    assert not out.exists()


def test_boxes_of_a_dicom_image_are_coordinates_in_its_report(tmp_path: Path, dx: Any) -> None:
    plan = plan_of(resize="fit")
    file, _ = model_of(tmp_path / "model.safetensors", plan, 0.0)
    pixels = np.random.default_rng(0).integers(0, 4096, SHAPE)
    image = pydicom.dcmread(dx(tmp_path / "in" / "a.dcm", pixels))
    out = tmp_path / "out"
    predict(
        Wish(open_finished(file), tmp_path / "in", out), find_inputs(tmp_path / "in", plan.task),
        Runtime(),
    )  # fmt: skip
    (told,) = json.loads((out / "predictions.json").read_text("utf-8"))["inputs"]
    path = out / told["files"]["sr"]
    content = hd.sr.MeasurementReport.from_sequence([pydicom.dcmread(path)])
    found = []
    for group in content.get_planar_roi_measurement_groups():
        (score,) = group.get_measurements()
        (source,) = group.roi.ContentSequence[0].ReferencedSOPSequence
        assert source.ReferencedSOPInstanceUID == image.SOPInstanceUID
        line = group.roi.value
        assert line.shape == (5, 2) and (line[0] == line[-1]).all()
        found.append((group.finding_type.meaning, *line[0], *line[2], score.value))
    boxes = [
        (b["class"], b["xmin"], b["ymin"], b["xmax"], b["ymax"], b["score"])
        for b in told["images"][0]["boxes"]
    ]
    assert sorted(one[0] for one in found) == sorted(one[0] for one in boxes)
    rows = [sorted(one[1:] for one in side) for side in (found, boxes)]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)
    counts = {
        group.finding_type.meaning: group.get_measurements()[0].value
        for group in content.get_image_measurement_groups()
    }
    assert counts == told["images"][0]["found"] and len(boxes) == sum(counts.values()) > 10
    said = dciodvfy(path)
    assert "Error" not in said and "Abort" not in said, said
