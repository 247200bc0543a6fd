"""Noisy tables: what a patient can move, what they tell, and how near their figures are."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from fedward.dp.discrete_laplace import discrete_laplace, variance
from fedward.errors import ProtocolError
from fedward.plan.schema import Task
from fedward.tasks.base import project
from fedward.tasks.classification import CLASSIFICATION, ClassificationCounts
from fedward.tasks.private_counts import (
    PrivateCounts,
    add_noise,
    noise_scale,
    patient_weights,
)
from fedward.tasks.segmentation import DICE_STEPS, SEGMENTATION, SegmentationCounts

BINARY = Task(kind="classification", classes=("no", "yes"))
THREE = Task(kind="classification", classes=("a", "b", "c"))
SEVERAL = Task(kind="classification", classes=("a", "b", "c"), multi_label=True)
LUNGS = Task(kind="segmentation", classes=("left", "right"))
TASKS = {"binary": BINARY, "three": THREE, "several": SEVERAL, "lungs": LUNGS}


def seeded(seed: int) -> Callable[[int], int]:
    return random.Random(seed).randrange


def answers(task: Task, rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    """Random values and truth of n images, as a trainer has them."""
    k = len(task.classes)
    if task.kind == "segmentation":
        values = rng.uniform(0, 1, (3, n, k))
        values[2] *= 100
        values[:, rng.uniform(size=(n, k)) < 0.2] = np.nan
        return values, None
    logits = rng.normal(0, 1.5, (n, k))
    if task.multi_label:
        return 1 / (1 + np.exp(-logits)), rng.uniform(size=(n, k)) < 0.4
    odds = np.exp(logits)
    truth = np.eye(k, dtype=bool)[rng.integers(0, k, n)]
    return odds / odds.sum(axis=1, keepdims=True), truth


def tables(task: Task, values: Any, truth: Any, patients: Any, images: int, seed: int) -> Any:
    names = task.spec.metric_names
    parts = task.spec.parts_for(task, names, names, surface=True)
    unit = task.spec.unit * images
    weights = patient_weights(patients, images, unit, seeded(seed))
    return parts, unit, task.spec.tables(task, values, truth, weights, parts)


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), images=st.sampled_from([1, 2, 7]))
def test_a_patient_moves_all_tables_by_the_stated_sensitivity(
    name: str, seed: int, images: int
) -> None:
    task, rng = TASKS[name], np.random.default_rng(seed)
    patients = np.sort(rng.integers(0, 6, 30))
    values, truth = answers(task, rng, 30)
    gone = patients == patients[0]
    other = values.copy()
    if task.kind == "segmentation":
        other[:, gone] = np.nan
    weights = patient_weights(patients, images, task.spec.unit * images, seeded(seed))
    parts, unit, whole = tables(task, values, truth, patients, images, seed)
    if task.kind == "segmentation":
        without = task.spec.tables(task, other, truth, weights, parts)
    else:
        without = task.spec.tables(task, values, truth, np.where(gone, 0, weights), parts)
    moved = sum(int(np.abs(whole[part] - without[part]).sum()) for part in parts)
    assert moved <= unit * task.spec.sensitivity(task, parts)


def test_a_single_image_reaches_the_stated_sensitivity() -> None:
    # The bound is tight: less noise than it asks for would not be private.
    for task in (BINARY, THREE, SEVERAL):
        values, truth = answers(task, np.random.default_rng(0), 1)
        parts, unit, whole = tables(task, values, truth, np.zeros(1, np.int64), 1, 0)
        assert sum(int(table.sum()) for table in whole.values()) == unit * task.spec.sensitivity(
            task, parts
        )


@pytest.mark.parametrize("scale", [Fraction(1, 4), Fraction(1), Fraction(7, 3), Fraction(250)])
def test_the_noise_has_the_probabilities_of_the_discrete_laplace_distribution(
    scale: Fraction,
) -> None:
    n = 20_000
    drawn = discrete_laplace((n,), scale, seeded(1))
    q = math.exp(-1 / float(scale))
    assert variance(scale) == pytest.approx(2 * q / (1 - q) ** 2)
    assert drawn.var() == pytest.approx(variance(scale), rel=0.1, abs=0.01)
    seen = Counter(drawn.tolist())
    for x in range(-3, 4):
        expected = n * (1 - q) / (1 + q) * q ** abs(x)
        assert abs(seen[x] - expected) < 5 * math.sqrt(expected) + 1, (x, seen[x], expected)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_an_attacker_who_knows_everything_else_cannot_tell_by_more_than_epsilon(
    epsilon: float,
) -> None:
    """The likelihood ratio of every outcome, with and without the one patient, by counting."""
    task, n = BINARY, 40_000
    values, truth = np.array([[0.2, 0.8]]), np.array([[False, True]])
    parts, unit, there = tables(task, values, truth, np.zeros(1, np.int64), 1, 0)
    scale = noise_scale(task, parts, unit, epsilon)
    cell = np.unravel_index(there["scores"].argmax(), there["scores"].shape)
    noise = discrete_laplace((2, n), scale, seeded(3))
    present = Counter((noise[0] + there["scores"][cell]).tolist())
    absent = Counter(noise[1].tolist())
    ratios = [
        math.log(present[x] / absent[x]) for x in present if present[x] > 400 and absent[x] > 400
    ]
    assert max(ratios) <= epsilon + 0.15
    assert max(ratios) >= epsilon - 0.15  # and not private by accident


def test_figures_are_near_those_of_exact_counts() -> None:
    """Half a point at the default ε for 624 patients at five hospitals, as in pneumonia."""
    rng, wrong = np.random.default_rng(0), []
    for trial in range(20):
        truth = np.arange(624) >= 234
        logit = rng.normal(0, 1.3, 624) + np.where(truth, 1.6, -1.6)
        p = 1 / (1 + np.exp(-logit))
        values = np.stack([1 - p, p], axis=1)
        flags = np.stack([~truth, truth], axis=1)
        hospital = rng.choice(5, 624, p=[0.4, 0.25, 0.2, 0.1, 0.05])
        total, exact = None, None
        for site in range(5):
            here = hospital == site
            parts, unit, own = tables(
                BINARY, values[here], flags[here], np.arange(here.sum()), 1, trial
            )
            scale = noise_scale(BINARY, parts, unit, 4.0)
            noisy = add_noise(own, scale, seeded(trial * 5 + site))
            counts = PrivateCounts.from_arrays(BINARY, noisy, unit, float(scale))
            whole = ClassificationCounts.from_scores(values[here], truth[here].astype(int))
            total = counts if total is None else total + counts
            exact = whole if exact is None else exact + whole
        assert total is not None and exact is not None
        names = ("auc", "accuracy", "sensitivity", "specificity", "loss")
        told, right = total.figures(names), exact.figures(names)
        assert right["auc"] == pytest.approx(roc_auc_score(truth, p), abs=1e-3)
        errors = total.standard_errors(names)
        assert 0.0005 < errors["auc"] < 0.01
        wrong.append([abs(told[name] - right[name]) for name in names])  # type: ignore[operator]
    mean = np.mean(wrong, axis=0)
    assert mean[0] < 0.005 and mean[1] < 0.005, mean
    assert mean[2] < 0.01 and mean[3] < 0.01 and mean[4] < 0.03, mean


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("apart", [0.5, 2.0, 4.0])
def test_few_bins_give_the_area_of_hardly_trained_and_of_sure_models(
    scale: float, apart: float
) -> None:
    """A sure model's scores once fell into one bin, which took two points from its area."""
    rng, n = np.random.default_rng(0), 20_000
    truth = np.arange(n) >= n // 3
    logit = scale * (rng.normal(0, 1, n) + apart * (truth - 0.5))
    p = 1 / (1 + np.exp(-logit))
    values, flags = np.stack([1 - p, p], axis=1), np.stack([~truth, truth], axis=1)
    _, unit, whole = tables(BINARY, values, flags, np.arange(n), 1, 0)
    told = PrivateCounts(BINARY, whole, unit, 0.0).figures(["auc"])["auc"]
    assert told == pytest.approx(roc_auc_score(truth, p), abs=0.006)


@pytest.mark.parametrize("name", ["binary", "three", "several"])
def test_without_noise_the_figures_are_those_of_exact_counts(name: str) -> None:
    task, rng = TASKS[name], np.random.default_rng(4)
    values, truth = answers(task, rng, 400)
    targets = truth.astype(np.float32) if task.multi_label else truth.argmax(axis=1)
    _, unit, whole = tables(task, values, truth, np.arange(400), 1, 0)
    exact = ClassificationCounts.from_scores(values, targets)
    names = ("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1", "loss")
    told, right = PrivateCounts(task, whole, unit, 0.0).figures(names), exact.figures(names)
    again = PrivateCounts.of(task, exact).figures(names)
    for figure in names:
        slack = {"auc": 0.01, "loss": 0.06}.get(figure, 1e-9)
        assert told[figure] == pytest.approx(right[figure], abs=slack), figure
        assert again[figure] == pytest.approx(right[figure], abs=slack), figure


def test_mean_overlaps_are_kept_to_a_thousandth_and_distances_are_cut() -> None:
    values, _ = answers(LUNGS, np.random.default_rng(2), 50)
    _, unit, whole = tables(LUNGS, values, None, np.arange(50), 1, 0)
    told = PrivateCounts(LUNGS, whole, unit, 0.0)
    cut = values.copy()
    cut[2] = np.minimum(cut[2], 64.0)
    exact = SegmentationCounts.from_values(cut)
    for row, name in enumerate(("dice", "iou", "hd95")):
        expected = np.nanmean(cut[row], axis=0)
        scale = 64.0 if name == "hd95" else 1.0
        np.testing.assert_allclose(told.per_class(name), expected, atol=scale / DICE_STEPS)
        np.testing.assert_allclose(exact.per_class(name), expected)  # type: ignore[arg-type]


def test_hospitals_with_noise_and_without_add_up() -> None:
    rng = np.random.default_rng(7)
    values, truth = answers(BINARY, rng, 300)
    first = slice(0, 200)
    _, unit, own = tables(BINARY, values[first], truth[first], np.arange(200), 3, 0)
    noisy = PrivateCounts(BINARY, own, unit, 0.25)
    exact = ClassificationCounts.from_scores(values[200:], truth[200:].argmax(axis=1))
    together = noisy + PrivateCounts.of(BINARY, exact)
    whole = ClassificationCounts.from_scores(values, truth.argmax(axis=1))
    assert together.figures(["accuracy"])["accuracy"] == pytest.approx(
        whole.figures(["accuracy"])["accuracy"]
    )
    assert together.images == 300 and together.variance == 0.25


def test_weights_of_a_patients_images_add_up_to_at_most_one_patient() -> None:
    patients = np.repeat(np.arange(4), [1, 3, 10, 50])
    for images in (1, 4, 12):
        unit = images * 100
        weights = patient_weights(patients, images, unit, seeded(0))
        for patient in range(4):
            own = weights[patients == patient]
            assert unit - len(own) < own.sum() <= unit
            assert (own > 0).sum() == min(images, len(own))
    drawn = {tuple(patient_weights(patients, 1, 1, seeded(s)).nonzero()[0]) for s in range(30)}
    assert len(drawn) > 20  # which image counts is drawn anew


@settings(max_examples=30, deadline=None)
@given(row=st.lists(st.integers(-20, 40), min_size=2, max_size=8))
def test_cells_below_zero_go_by_the_nearest_possible_table(row: list[int]) -> None:
    table, total = np.array([row], np.int64), max(sum(row), 0)
    made = project(table)[0]
    assert (made >= 0).all() and made.sum() == pytest.approx(total, abs=1e-9)
    if total:
        best = minimize(
            lambda x: ((x - row) ** 2).sum(),
            np.full(len(row), total / len(row)),
            bounds=[(0, None)] * len(row),
            tol=1e-12,
            constraints={"type": "eq", "fun": lambda x: x.sum() - total},
        )
        assert ((made - row) ** 2).sum() <= best.fun + 1e-6


@pytest.mark.parametrize(
    "change",
    [
        {"other": np.zeros(3, np.int64)},
        {"scores": np.zeros((1, 2, 15), np.int64)},
        {"scores": np.zeros((1, 2, 24))},
        {"scores": np.full((1, 2, 24), 1 << 60)},
        {"dice": np.zeros((2, 2), np.int64)},
    ],
    ids=lambda one: next(iter(one)),
)
def test_tables_from_outside_are_checked(change: dict[str, Any]) -> None:
    arrays = {"scores": np.zeros((1, 2, 24), np.int64)}
    assert PrivateCounts.from_arrays(BINARY, arrays, 1, 0.25).images == 0
    for unit, scale in ((0, 1.0), (1, 0.0), (1, math.nan)):
        with pytest.raises(ProtocolError):
            PrivateCounts.from_arrays(BINARY, arrays, unit, scale)
    with pytest.raises(ProtocolError):
        PrivateCounts.from_arrays(BINARY, arrays | change, 1, 0.25)


def test_a_figure_that_a_policy_withholds_cannot_be_computed() -> None:
    no_auc = set(CLASSIFICATION.metric_names) - {"auc"}
    assert CLASSIFICATION.parts_for(BINARY, ("auc", "accuracy"), no_auc, surface=False) == (
        "decisions",
    )
    assert CLASSIFICATION.parts_for(BINARY, ("auc",), no_auc, surface=False) == ()
    assert CLASSIFICATION.parts_for(
        BINARY, ("auc",), CLASSIFICATION.metric_names, surface=False
    ) == ("scores",)
    every = CLASSIFICATION.parts_for(
        THREE, CLASSIFICATION.metric_names, CLASSIFICATION.metric_names, surface=False
    )
    assert every == ("scores", "decisions")
    assert SEGMENTATION.parts_for(
        LUNGS, ("dice", "hd95"), SEGMENTATION.metric_names, surface=False
    ) == ("dice",)


@pytest.mark.parametrize("name", TASKS)
def test_withholding_small_cells_does_not_make_the_model_better(name: str) -> None:
    """A few errors are a small cell: a Dice of 0.9 on 40 images was once sent as 1."""
    task, rng, told = TASKS[name], np.random.default_rng(0), []
    names = ("dice", "iou") if task.kind == "segmentation" else ("auc", "accuracy")
    parts = task.spec.parts_for(task, names, task.spec.metric_names, surface=False)
    scale = Fraction(task.spec.unit * task.spec.sensitivity(task, parts), 4)
    for trial in range(40):
        values, truth = answers(task, rng, 80)
        if task.kind == "segmentation":
            values[:2] = 0.9 + 0.1 * (values[:2] - 0.5)
        else:
            values = 0.7 * values + 0.3 * truth
            values = values if task.multi_label else values / values.sum(axis=1, keepdims=True)
        weights = np.full(80, task.spec.unit, np.int64)
        exact = task.spec.tables(task, values, truth, weights, parts)
        noisy = add_noise(exact, scale, seeded(trial))
        left = task.spec.withhold(noisy, 5 * task.spec.unit)
        own, without = (
            PrivateCounts.from_arrays(task, one, task.spec.unit, float(scale)).figures(names)
            for one in (left, noisy)
        )
        told.append([own[one] - without[one] for one in names])  # type: ignore[operator]
    assert np.abs(np.mean(told, axis=0)).max() < 0.01, np.mean(told, axis=0)
    few = {part: noisy[part] // 30 for part in parts}
    assert not any(table.any() for table in task.spec.withhold(few, 5 * task.spec.unit).values())
