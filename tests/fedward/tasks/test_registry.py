"""A kind of task is one file and a metric one entry: everything else follows from the registry."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedward.plan.schema import Metrics, Task
from fedward.tasks.classification import CLASSIFICATION, ClassificationCounts
from fedward.tasks.registry import LOSSES, METRICS, TASKS, kinds_of
from fedward.tasks.segmentation import SegmentationCounts
from fedward_client.policy.settings import METRICS as ALLOWED
from fedward_client.policy.settings import Limits
from fedward_server.report.formatting import figure, metric_name
from fedward_server.report.stats import LOWER_IS_BETTER

ROOT = Path(__file__).parents[3]
PACKAGES = ("fedward", "client", "server", "simulation", "strategies")


def sources() -> list[Path]:
    found = [file for name in PACKAGES for file in (ROOT / name).rglob("*.py")]
    return [file for file in found if file.parent != ROOT / "fedward" / "tasks"]


def test_no_module_beside_the_task_files_asks_for_a_kind_of_task() -> None:
    asked = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Compare | ast.MatchValue)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in TASKS
    ]
    assert not asked


@pytest.mark.parametrize("name", METRICS)
def test_plan_policy_report_and_page_know_every_metric(name: str) -> None:
    metric = METRICS[name]
    assert Metrics(report=(name,), primary=name).primary == name
    assert name in ALLOWED
    assert metric_name(name) == metric.label
    assert (name in LOWER_IS_BETTER) == (metric.better == "lower")
    assert len(figure(0.123456, name)) == 2 + metric.digits
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    row = re.search(rf"^\| `{name}` \| (.+) \|$", page, re.MULTILINE)
    assert row and row[1].startswith(f"{metric.label} |") and metric.better in row[1]


def test_the_names_that_plans_were_written_with_are_still_there() -> None:
    assert tuple(TASKS) == ("classification", "segmentation", "detection")
    assert set(LOSSES) == {"cross_entropy", "bce", "focal", "dice_ce", "dice_focal", "focal_giou"}
    assert {*METRICS} >= {
        *("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1", "ece"),
        *("dice", "iou", "hd95", "loss"),
        *("map50", "map50_95", "map10", "froc", "box_f1"),
    }
    assert (kinds_of("labels"), kinds_of("masks")) == ("classification", "segmentation")
    assert kinds_of("boxes") == "detection"


def test_every_figure_lies_within_its_bounds_and_its_interval() -> None:
    rng = np.random.default_rng(3)
    odds = np.exp(rng.normal(size=(80, 3)))
    labels = ClassificationCounts.from_scores(
        odds / odds.sum(axis=1, keepdims=True), rng.integers(0, 3, 80), rng.uniform(size=80)
    )
    values = rng.uniform(size=(3, 80, 2)) * np.array([1.0, 1.0, 30.0])[:, None, None]
    values[1] = values[0] / (2 - values[0])
    for counts in (labels, SegmentationCounts.from_values(values)):
        names = counts.spec.metric_names
        found, limits = counts.figures(names), counts.intervals(names)
        for name, value in found.items():
            low, high = counts.spec.metric(name).bounds
            assert value is None or low <= value <= high
            if name in limits:
                assert value is not None and limits[name][0] <= value <= limits[name][1]
        assert len(limits) >= len(names) - 1


BEFORE = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1", "ece")


def test_a_metric_that_is_added_withholds_nothing_that_a_site_lets_out() -> None:
    """A site's list names the metrics of an earlier release; the confusion leaves as it did."""
    assert METRICS["precision"].implied
    three = Task(kind="classification", classes=("a", "b", "c"))
    rng = np.random.default_rng(0)
    odds = np.exp(rng.normal(size=(200, 3)))
    counts = CLASSIFICATION.count(odds / odds.sum(axis=1, keepdims=True), rng.integers(0, 3, 200))
    limits = Limits(metrics=BEFORE)
    for wanted in ("f1", "precision"):
        assert CLASSIFICATION.parts_for(three, (wanted,), BEFORE, surface=False) == ("decisions",)
    arrays, withheld = counts.release(limits.metrics, 1, 3)
    assert arrays["confusion"].any() and set(withheld) == {"scores", "loss"}


def test_an_implied_metric_opens_nothing() -> None:
    """What follows from other figures leaves only where these leave, even if a site lists it."""
    three = Task(kind="classification", classes=("a", "b", "c"))
    allowed = ("precision", "accuracy")
    assert CLASSIFICATION.parts_for(three, ("precision",), allowed, surface=False) == ()
    counts = CLASSIFICATION.count(np.eye(3)[[0, 1, 2] * 10], np.array([0, 1, 2] * 10))
    arrays, withheld = counts.release(allowed, 1, 3)
    assert not arrays["confusion"].any() and "confusion" in withheld


def test_reading_a_plan_imports_neither_torch_nor_scipy() -> None:
    code = "import sys, fedward.plan.load, fedward_client.config as c; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "scipy", "monai", "pydicom", "nibabel", "PIL"}
