"""A finished model on other data: figures as scikit-learn computes them, and by subgroup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from sklearn.metrics import accuracy_score, roc_auc_score

from fedward.errors import DataError
from fedward.integrity import about_model
from fedward.models import build_model, save_model, to_arrays
from fedward.models.finished import open_finished
from fedward_simulation.evaluate import as_json, evaluate_model
from fedward_simulation.options import Options

COUNT = 40


@pytest.fixture
def model(tmp_path: Path, make_plan: Any) -> Path:
    plan = make_plan(
        preprocessing={"size": [16, 16], "intensity": "unit"},
        metrics={"report": ["auc", "accuracy"], "primary": "auc"},
    )
    path = tmp_path / "model.safetensors"
    arrays = to_arrays(build_model(plan, 3))
    last = [name for name, value in arrays.items() if value.ndim == 2][-1]
    arrays[last] = arrays[last] * 2000  # scores that lie apart, in bins of their own
    save_model(path, arrays, about_model("s", plan, "shared"))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures of 40 patients, two of one of them, with sex, age and scanner; one is broken."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    rows = ["file,label,patient,Sex,age,scanner"]
    for k in range(COUNT):
        pixels = rng.integers(0, 256, (16, 16), np.uint8)
        Pillow.fromarray(pixels).save(folder / f"{k}.png")
        patient = f"P{max(k, 1)}"
        label = ("no", "yes")[int(rng.random() < 0.4)]
        age = "070Y" if k < 4 else str(30 + k % 3)
        rows.append(f"{k}.png,{label},{patient},{'FM'[k % 2]},{age},{'AB'[k % 5 == 0]}")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    rows.append("broken.png,yes,P99,F,50,A")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def scores(model: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of the positive class, image by image, by torch alone."""
    network = open_finished(model).build()
    table = [line.split(",") for line in (data / "labels.csv").read_text().splitlines()[1:-1]]
    images = np.stack([np.asarray(Pillow.open(data / row[0])) for row in table])
    with torch.no_grad():
        logits = network(torch.from_numpy(images[:, None] / np.float32(255)))
    return np.array([row[1] == "yes" for row in table]), logits.softmax(dim=1)[:, 1].numpy()


def run(model: Path, data: Path, *columns: str, least: int = 10) -> dict[str, Any]:
    opened = open_finished(model)
    options = Options(data=data, out=data, partition="iid", device="cpu")
    return as_json(opened, evaluate_model(opened, options, columns, least), least)


def test_figures_are_those_of_an_independent_computation(model: Path, data: Path) -> None:
    told = run(model, data, "scanner")
    truth, score = scores(model, data)
    everybody, *groups = told["groups"]
    assert (everybody["patients"], everybody["images"]) == (COUNT - 1, COUNT)
    assert everybody["figures"]["auc"] == pytest.approx(roc_auc_score(truth, score), abs=2e-3)
    assert everybody["figures"]["accuracy"] == pytest.approx(accuracy_score(truth, score > 0.5))
    low, high = everybody["intervals"]["auc"]
    assert 0 < low < everybody["figures"]["auc"] < high < 1
    assert told["left_out"] == {"not readable": 1}
    assert sum(n for *_, n in told["answers"]["calibration"]) == COUNT
    found = {(one["column"], one["value"]): one for one in groups}
    part = np.arange(COUNT) % 2 == 1
    men = found["sex", "M"]
    assert men["figures"]["auc"] == pytest.approx(roc_auc_score(truth[part], score[part]), abs=2e-3)
    assert men["images"] == COUNT // 2


def test_groups_of_few_patients_are_counted_and_not_measured(model: Path, data: Path) -> None:
    told = run(model, data, "scanner")
    found = {(one["column"], one["value"]): one for one in told["groups"]}
    assert set(found) == {
        ("", ""),
        ("scanner", "A"),
        ("scanner", "B"),
        ("sex", "F"),
        ("sex", "M"),
        ("age", "18 to 39"),
        ("age", "65 and over"),
    }
    few = [key for key, one in found.items() if not one["figures"]]
    assert set(few) == {("scanner", "B"), ("age", "65 and over")}
    assert found["scanner", "B"]["patients"] == 8 and not found["scanner", "B"]["intervals"]
    assert not [one for one in run(model, data, least=3)["groups"] if not one["figures"]]


def test_a_column_that_is_not_there_is_named(model: Path, data: Path) -> None:
    with pytest.raises(DataError, match=r"ward; there are age, scanner, sex"):
        run(model, data, "ward")


def test_the_command(model: Path, data: Path, tmp_path: Path, commands: Any) -> None:
    words = ("evaluate", model, "--data", data, "--out", tmp_path / "out", "--by", "scanner")
    done = commands("fedward_simulation.cli", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("all", "scanner: A", "too few", "left out: 1: not readable", "AUC"):
        assert part in done.stdout
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told == run(model, data, "scanner")
