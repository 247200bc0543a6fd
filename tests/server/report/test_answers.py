"""Curves, calibration and operating points of a report against scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sk

from fedward.plan.schema import Task
from fedward.tasks.classification import ClassificationCounts
from fedward_server.answers import answers_of
from fedward_server.report.answers import ece
from fedward_server.report.page import render
from fedward_server.results import Answers, StudyResults

TASK = Task(kind="classification", classes=("normal", "pneumonia"))


def scored(n: int) -> tuple[NDArray[Any], NDArray[Any], Answers]:
    random = np.random.default_rng(n)
    truth = random.integers(0, 2, n)
    p = 1 / (1 + np.exp(-random.normal(2.0 * truth - 1, 1.5)))
    counts = ClassificationCounts.from_scores(np.stack([1 - p, p], axis=1), truth)
    found = answers_of(TASK, counts, 1.0)
    assert found is not None
    return truth, p, found


@pytest.mark.parametrize("n", [40, 3000])
def test_the_curves_are_those_of_scikit_learn(n: int) -> None:
    truth, p, found = scored(n)
    curve = np.array(found.curves["pneumonia"])
    false, true = curve[:, 1] / (1 - truth).sum(), curve[:, 2] / truth.sum()
    assert list(found.curves) == ["pneumonia"] and len(curve) <= 64
    assert (false[-1], true[-1]) == (1.0, 1.0)
    area = np.trapezoid([0, *true], [0, *false])
    assert area == pytest.approx(sk.roc_auc_score(truth, p), abs=0.004)
    for threshold, at, hits in curve:
        # A score on the very edge of a bin may lie on either side.
        assert (p[truth == 1] >= threshold).sum() == pytest.approx(hits, abs=1)
        assert (p[truth == 0] >= threshold).sum() == pytest.approx(at, abs=1)


def test_calibration_confusion_and_operating_point() -> None:
    truth, p, found = scored(500)
    assert found.confusion == sk.confusion_matrix(truth, p > 0.5).tolist()
    sure, right = np.maximum(p, 1 - p), (p > 0.5) == truth
    place = np.minimum((sure * 15).astype(int), 14)
    expected = sum(abs(sure[place == k].sum() - right[place == k].sum()) / 500 for k in range(15))
    assert ece(found) == pytest.approx(expected)
    (point,) = found.operating_points
    hits, positives = int(((p > 0.5) & (truth == 1)).sum()), int(truth.sum())
    known = stats.binomtest(hits, positives).proportion_ci(method="wilson")
    assert (point.name, point.threshold, point.positives) == ("pneumonia", 0.5, positives)
    assert point.sensitivity == pytest.approx(hits / positives)
    assert point.sensitivity_interval == pytest.approx((known.low, known.high))
    assert point.specificity == pytest.approx(sk.recall_score(truth, p > 0.5, pos_label=0))


def test_the_page_shows_them_for_each_hospital_and_together(
    answering: StudyResults, read_page: Callable[[str], Any]
) -> None:
    page = read_page(render([answering]))
    test = answering.arms[4].test
    assert test is not None and test.answers is not None
    labels = [values["aria-label"] or "" for tag, values in page.tags if tag == "svg"]
    for what in ("ROC", "Precision and recall"):
        told = next(label for label in labels if label.startswith(f"{what}: "))
        assert all(site in told for site in ("North", "Hill", "all together"))
    told = next(one for one in labels if one.startswith("Share of right answers by confidence"))
    assert all(f"{site}: " in told for site in ("North", "Hill", "all together"))
    assert "AUC: all together 0.951 (0.941–0.961); North 0.957" in page.text
    rows = page.rows("Operating point")
    assert list(rows) == ["all together", *test.site_answers]
    point = test.site_answers["Hill"].operating_points[0]
    assert rows["Hill"][4:] == [f"{point.sensitivity:.3f}", f"{point.specificity:.3f}"]
    limits = page.intervals["Operating point"]["Hill"]
    assert limits == [
        f"{low:.3f}–{high:.3f}"
        for low, high in filter(None, (point.sensitivity_interval, point.specificity_interval))
    ]
    for label, answers in (("all together", test.answers), *test.site_answers.items()):
        table = page.tables[f"Confusion, {label}"]
        assert [[int(cell) for cell in row[1:]] for row in table[1:]] == answers.confusion


def test_a_segmenter_and_withheld_counts_have_none() -> None:
    counts = ClassificationCounts.from_scores(np.zeros((0, 2)), np.zeros(0, np.int64))
    assert answers_of(TASK, counts, 1.0) is None


def test_several_classes_have_a_curve_each() -> None:
    random = np.random.default_rng(0)
    p, truth = random.dirichlet(np.ones(3), 60), random.integers(0, 3, 60)
    task = Task(kind="classification", classes=("a", "b", "c"))
    found = answers_of(task, ClassificationCounts.from_scores(p, truth), 1.0)
    assert found is not None and list(found.curves) == ["a", "b", "c"]
    assert [one.threshold for one in found.operating_points] == [None] * 3
    flags = (random.random((60, 3)) < 0.5).astype(np.int64)
    task = task.model_copy(update={"multi_label": True})
    found = answers_of(task, ClassificationCounts.from_scores(random.random((60, 3)), flags), 1.0)
    assert found is not None and found.confusion == []
    assert [(one.threshold, one.positives) for one in found.operating_points] == [
        (0.5, n) for n in flags.sum(axis=0)
    ]
