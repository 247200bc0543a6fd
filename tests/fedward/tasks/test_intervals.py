"""Intervals against brute force: resampled patients, simulated studies, other formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedward.plan.schema import Task
from fedward.tasks.classification import CLASSIFICATION, ClassificationCounts
from fedward.tasks.intervals import (
    auc_interval,
    bounded_mean_interval,
    delong_variance,
    difference,
    mean_of,
    wilson,
)
from fedward.tasks.private_counts import PrivateCounts, add_noise, noise_scale
from fedward.tasks.segmentation import SegmentationCounts

NAMES = CLASSIFICATION.metric_names


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    p: NDArray[Any] = e / e.sum(axis=1, keepdims=True)
    return p


def scores(n: int, k: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    random = np.random.default_rng(seed)
    targets = random.integers(0, k, n)
    return softmax(random.normal(size=(n, k)) + 1.2 * np.eye(k)[targets]), targets


@pytest.mark.parametrize(("hits", "n"), [(0, 9), (3, 28), (14, 28), (28, 28), (997, 1000)])
def test_wilson_is_that_of_scipy(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert wilson(0.5, 0) is None


def test_delong_is_the_variance_of_placements_pair_by_pair() -> None:
    random = np.random.default_rng(0)
    negative, positive = random.integers(0, 9, 40), random.integers(2, 12, 23)  # with ties
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    expected = wins.mean(axis=1).var(ddof=1) / 23 + wins.mean(axis=0).var(ddof=1) / 40
    binned = [np.bincount(values, minlength=12) for values in (negative, positive)]
    assert delong_variance(*binned) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [5, 20])
def test_the_auc_interval_covers_the_truth(n: int) -> None:
    # Normal scores one standard deviation apart: AUC = Phi(1 / sqrt 2).
    random, truth = np.random.default_rng(1), stats.norm.cdf(1 / math.sqrt(2))
    covered, times = 0, 600
    for _ in range(times):
        drawn = np.concatenate([random.normal(0, 1, n), random.normal(1, 1, n)])
        order = drawn.argsort().argsort()
        negative, positive = (
            np.bincount(order[half], minlength=2 * n) for half in (slice(n), slice(n, 2 * n))
        )
        area = (order[n:].sum() - n * (n - 1) / 2) / n**2
        low, high = auc_interval(area, negative, positive) or (1.0, 0.0)
        covered += low <= truth <= high
    assert 0.93 <= covered / times <= 0.985


@pytest.mark.parametrize("place", [0, 1])
def test_perfect_separation_of_few_is_not_certain(place: int) -> None:
    sides = np.array([[8, 0], [0, 8]])
    low, high = auc_interval(1.0 - place, sides[place], sides[1 - place]) or (0, 0)
    # Hanley and McNeil's variance at the limit, as in Newcombe (2006): known for 8 and 8.
    limit = low if place == 0 else 1 - high
    variance = limit * (1 - limit) * (1 + 7 * ((1 - limit) / (2 - limit) + limit / (1 + limit)))
    assert (1 - limit) ** 2 == pytest.approx(1.959964**2 * variance / 64, rel=1e-4)
    assert 0.6 < limit < 0.9 and (high == 1.0 if place == 0 else low == 0.0)


@pytest.mark.parametrize("k", [2, 4])
def test_intervals_are_about_those_of_a_bootstrap(k: int) -> None:
    p, targets = scores(400, k, seed=3)
    found = ClassificationCounts.from_scores(p, targets).intervals(NAMES)
    random, again = np.random.default_rng(0), []
    for _ in range(300):
        drawn = random.integers(0, 400, 400)
        again.append(ClassificationCounts.from_scores(p[drawn], targets[drawn]).figures(NAMES))
    for name in NAMES:
        spread = np.std([one[name] for one in again])
        half = (found[name][1] - found[name][0]) / 2
        # Over several classes the limits of dependent figures are averaged: that is wider.
        loose = k > 2 and name in ("auc", "specificity", "f1")
        assert 0.8 < half / (1.96 * spread) < (2.3 if loose else 1.25), name


def test_a_tie_at_the_majority_class_has_a_width() -> None:
    """Every image answered alike: sensitivity 1, 0 and 0, with no spread to be seen."""
    targets = np.repeat([0, 1, 2], [10, 9, 9])
    counts = ClassificationCounts.from_scores(np.tile([0.4, 0.3, 0.3], (28, 1)), targets)
    low, high = counts.intervals(["balanced_accuracy"])["balanced_accuracy"]
    limits = [
        stats.binomtest(h, n).proportion_ci(method="wilson") for h, n in ((10, 10), (0, 9), (0, 9))
    ]
    assert low == pytest.approx(1 / 3 - (1 - limits[0].low) / 3, abs=1e-9)
    assert high == pytest.approx(1 / 3 + math.hypot(limits[1].high, limits[2].high) / 3, abs=1e-9)


def test_images_of_one_patient_make_no_interval_narrower() -> None:
    p, targets = scores(60, 2, seed=4)
    once = ClassificationCounts.from_scores(p, targets)
    often = ClassificationCounts.from_scores(p.repeat(5, axis=0), targets.repeat(5))
    narrow, same = often.intervals(NAMES), often.intervals(NAMES, per_image=0.2)
    for name, interval in once.intervals(NAMES).items():
        assert same[name] == pytest.approx(interval, abs=0.004 if name == "ece" else 1e-9), name
        assert narrow[name][1] - narrow[name][0] < 0.7 * (interval[1] - interval[0])


def test_figures_that_are_not_there_have_no_interval() -> None:
    counts = ClassificationCounts.from_scores(np.full((3, 2), 0.5), np.zeros(3, np.int64))
    assert set(counts.intervals(NAMES)) == {"accuracy", "specificity", "ece", "loss"}
    nothing = ClassificationCounts.from_scores(np.zeros((0, 2)), np.zeros(0, np.int64))
    assert nothing.intervals(NAMES) == {}


def test_multi_label_intervals_hold_each_figure() -> None:
    random = np.random.default_rng(5)
    flags = (random.random((80, 3)) < 0.4).astype(np.int64)
    p = 1 / (1 + np.exp(-random.normal(2 * flags - 1.0, 1.0)))
    counts = ClassificationCounts.from_scores(p, flags)
    values, found = counts.figures(NAMES), counts.intervals(NAMES)
    assert set(found) == set(NAMES)
    assert all(found[n][0] < (values[n] or 0) < found[n][1] for n in NAMES)
    one = wilson(values["accuracy"] or 0, 80)  # three decisions on an image weigh as one
    assert found["accuracy"] == pytest.approx(one)


def test_dice_has_students_interval_over_patients() -> None:
    dice = np.array([0.9, 0.8, 0.95, 0.7, 0.85])
    values = np.stack([dice, dice / (2 - dice), 10 * (1 - dice)])[:, :, None]
    found = SegmentationCounts.from_values(values).intervals(["dice", "iou", "hd95"])
    for row, name in zip(values[:, :, 0], ("dice", "iou", "hd95"), strict=True):
        expected = stats.t.interval(0.95, 4, row.mean(), stats.sem(row))
        assert found[name] == pytest.approx((max(0, expected[0]), expected[1]), abs=1e-9), name
    halved = SegmentationCounts.from_values(np.repeat(values, 2, axis=1)).intervals(["dice"], 0.5)
    assert halved["dice"] == pytest.approx(found["dice"], abs=1e-9)
    lone = SegmentationCounts.from_values(values[:, :1]).intervals(["dice", "hd95"])
    assert lone == {"dice": pytest.approx(wilson(0.9, 1))}
    assert bounded_mean_interval(1.0, 0.0, 6) == wilson(1.0, 6)


def test_a_difference_of_shares_is_newcombes() -> None:
    # Newcombe (1998), Statistics in Medicine 17: 873, table II (a), method 10: 56/70 - 48/80.
    one, other = ((hits / n, wilson(hits / n, n) or (0, 0)) for hits, n in ((56, 70), (48, 80)))
    value, (low, high) = difference(one, other)
    assert (value, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_a_mean_of_dependent_figures_is_wider() -> None:
    parts = [(0.5, (0.4, 0.7)), (0.7, (0.6, 0.8))]
    assert mean_of(parts, independent=False) == (0.6, pytest.approx((0.5, 0.75)))
    low, high = mean_of(parts, independent=True)[1]
    assert (low, high) == pytest.approx(
        (0.6 - math.hypot(0.1, 0.1) / 2, 0.6 + math.hypot(0.2, 0.1) / 2)
    )


def test_noise_widens_the_interval_as_it_widens_the_figure() -> None:
    task = Task(kind="classification", classes=("a", "b"))
    p, targets = scores(300, 2, seed=6)
    parts = task.spec.parts_for(task, ["auc", "accuracy"], NAMES, surface=False)
    weights = np.ones(300, np.int64)
    tables = task.spec.tables(task, p, targets[:, None] == np.arange(2), weights, parts)
    scale = noise_scale(task, parts, 1, 0.5)
    random = np.random.default_rng(7)
    made = [
        PrivateCounts.from_arrays(
            task, add_noise(tables, scale, lambda n: int(random.integers(n))), 1, float(scale), 0.5
        )
        for _ in range(12)
    ]
    exact = PrivateCounts(task, tables, 1, 0.0, 0.5).intervals(["auc"])["auc"]
    plain = ClassificationCounts.from_scores(p, targets).intervals(["auc"])["auc"]
    assert exact == pytest.approx(plain, abs=0.02)  # of coarser bins
    noise = np.std([one.figures(["auc"])["auc"] for one in made])
    halves = [(i[1] - i[0]) / 2 for one in made for i in one.intervals(["auc"]).values()]
    expected = math.hypot((exact[1] - exact[0]) / 2, 1.96 * float(noise))
    assert np.mean(halves) == pytest.approx(expected, rel=0.35)
    assert np.mean(halves) > (exact[1] - exact[0]) / 2
