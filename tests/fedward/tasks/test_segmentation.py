"""A segmenter's figures against sets of pixels, brute force and MONAI, and their adding up."""

from __future__ import annotations

import time
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from numpy.typing import NDArray

from fedward.errors import DataError, ModelError, PlanError, ProtocolError
from fedward.plan.schema import MetricName, Task
from fedward.tasks.registry import counts_from_arrays
from fedward.tasks.segmentation import SegmentationCounts, surface_distance

NAMES: tuple[MetricName, ...] = ("dice", "iou", "hd95", "loss")
Masks = NDArray[np.uint8]


def discs(n: int, side: int, classes: int, seed: int) -> Masks:
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    out = np.zeros((n, side, side), np.uint8)
    for image in out:
        for k in range(1, classes + 1):
            cy, cx, r = random.uniform(0, side, 2).tolist() + [random.uniform(0, side / 3)]
            image[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = k
    return out


def counts(p: Masks, t: Masks, classes: int, mm: float = 1.0, **more: Any) -> SegmentationCounts:
    spacing = np.full((len(t), t.ndim - 1), mm)
    return SegmentationCounts.from_masks(p, t, classes, spacing, hd95=True, **more)


def pixels(mask: Masks, k: int) -> set[tuple[int, ...]]:
    return {tuple(place) for place in np.argwhere(mask == k).tolist()}


def brute_surface(mask: NDArray[np.bool_]) -> list[tuple[int, ...]]:
    """Pixels with a neighbour across a face that is not in the mask."""
    inside = {tuple(p) for p in np.argwhere(mask).tolist()}
    steps = [s * e for e in np.eye(mask.ndim, dtype=int) for s in (-1, 1)]
    return [
        p for p in inside if any(tuple((np.array(p) + s).tolist()) not in inside for s in steps)
    ]


def brute_hd95(a: NDArray[np.bool_], b: NDArray[np.bool_], spacing: tuple[float, ...]) -> float:
    first, second = (np.array(brute_surface(m)) * spacing for m in (a, b))
    distance = np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    return max(
        float(np.percentile(distance.min(axis=1), 95)),
        float(np.percentile(distance.min(axis=0), 95)),
    )


@given(seed=st.integers(0, 10**6), classes=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_dice_and_iou_are_those_of_sets(seed: int, classes: int) -> None:
    p, t = discs(3, 12, classes, seed), discs(3, 12, classes, seed + 1)
    found = counts(p, t, classes)
    for k in range(1, classes + 1):
        dice, iou = [], []
        for a, b in ((pixels(x, k), pixels(y, k)) for x, y in zip(p, t, strict=True)):
            if a | b:
                dice.append(2 * len(a & b) / (len(a) + len(b)))
                iou.append(len(a & b) / len(a | b))
        for name, values in (("dice", dice), ("iou", iou)):
            mean = found.per_class(name)[k - 1]  # type: ignore[arg-type]
            assert mean == (pytest.approx(np.mean(values)) if values else None)
            spread = found.spread(name)[k - 1]  # type: ignore[arg-type]
            assert spread == (pytest.approx(np.std(values), abs=1e-7) if values else None)


@given(seed=st.integers(0, 10**6), spacing=st.tuples(*[st.floats(0.2, 5)] * 2))
@settings(max_examples=30, deadline=None)
def test_hd95_agrees_with_brute_force(seed: int, spacing: tuple[float, float]) -> None:
    a, b = (discs(1, 14, 1, seed + i)[0] == 1 for i in range(2))
    if a.any() and b.any():
        assert surface_distance(a, b, spacing) == pytest.approx(brute_hd95(a, b, spacing))
    else:
        assert surface_distance(a, b, spacing) is None


def test_hd95_agrees_with_brute_force_in_volumes() -> None:
    random = np.random.default_rng(0)
    a, b = (random.random((7, 6, 5)) < share for share in (0.1, 0.2))
    spacing = (0.7, 1.0, 3.0)
    assert surface_distance(a, b, spacing) == pytest.approx(brute_hd95(a, b, spacing))


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_hd95_agrees_with_monai() -> None:
    p, t = discs(6, 40, 1, 1), discs(6, 40, 1, 2)
    one_hot = [torch.from_numpy(np.stack([m == 0, m == 1], 1)) for m in (p, t)]
    wanted = compute_hausdorff_distance(*one_hot, percentile=95, spacing=[1.5, 0.5])
    spacing = np.tile([1.5, 0.5], (6, 1))
    found = SegmentationCounts.from_masks(p, t, 1, spacing, hd95=True)
    both = np.isfinite(wanted.numpy())
    assert found.counts[2, 0] == both.sum()
    assert found.per_class("hd95") == [pytest.approx(wanted.numpy()[both].mean(), rel=1e-5)]


def test_a_disc_moved_by_three_pixels_of_two_mm_is_six_mm_off() -> None:
    t = np.zeros((1, 30, 30), np.uint8)
    t[0, 10:15, 10:15] = 1
    assert counts(np.roll(t, 3, axis=1), t, 1, mm=2).figures(["hd95"]) == {"hd95": 6.0}


def test_absent_classes() -> None:
    empty, full = np.zeros((1, 8, 8), np.uint8), np.ones((1, 8, 8), np.uint8)
    nobody = counts(empty, empty, 1)
    assert nobody.figures(NAMES) == {"dice": None, "iou": None, "hd95": None, "loss": None}
    for p, t in ((empty, full), (full, empty)):
        missed = counts(p, t, 1)
        assert missed.figures(["dice", "iou", "hd95"]) == {"dice": 0.0, "iou": 0.0, "hd95": None}
    both = nobody + counts(empty, full, 1) + counts(full, full, 1)
    assert both.figures(["dice", "iou", "hd95"]) == {"dice": 0.5, "iou": 0.5, "hd95": 0.0}
    # The second class never occurs, so the mean is that of the first alone.
    assert counts(full, full, 2).per_class("dice") == [1.0, None]
    assert counts(full, full, 2).figures(["dice"]) == {"dice": 1.0}


@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 9), max_size=4))
@settings(max_examples=40, deadline=None)
def test_parts_add_up_to_the_whole(seed: int, cuts: list[int]) -> None:
    p, t = discs(9, 12, 2, seed), discs(9, 12, 2, seed + 1)
    losses = np.random.default_rng(seed).random(9)
    parts = np.split(np.random.default_rng(seed).permutation(9), sorted(cuts))
    merged = reduce(add, (counts(p[i], t[i], 2, losses=losses[i]) for i in parts))
    whole = counts(p, t, 2, losses=losses)
    for name, value in whole.figures(NAMES).items():
        assert merged.figures(NAMES)[name] == (None if value is None else pytest.approx(value))
    assert (merged.counts == whole.counts).all()


def test_volumes_count_too() -> None:
    random = np.random.default_rng(4)
    p, t = (random.integers(0, 3, (2, 6, 5, 4), dtype=np.uint8) for _ in range(2))
    flat = counts(p.reshape(2, 6, 20), t.reshape(2, 6, 20), 2).per_class("dice")
    assert counts(p, t, 2).per_class("dice") == pytest.approx(flat)


def test_arrays_come_back_as_the_same_counts() -> None:
    made = counts(discs(5, 20, 2, 1), discs(5, 20, 2, 2), 2, losses=np.ones(5))
    task = Task(kind="segmentation", classes=("left", "right"))
    assert task.spec.counts is SegmentationCounts
    back = counts_from_arrays(task, made.to_arrays())
    assert back.figures(NAMES) == made.figures(NAMES)
    with pytest.raises(ProtocolError, match="the plan's classes"):
        counts_from_arrays(Task(kind="segmentation", classes=("lung",)), made.to_arrays())


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_real_sums_always_pass_the_checks(seed: int) -> None:
    one = discs(1, 12, 2, seed)
    SegmentationCounts.from_arrays(counts(discs(1, 12, 2, seed + 1), one, 2).to_arrays())
    SegmentationCounts.from_arrays(counts(one, one, 2).to_arrays())


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("counts", (0, 0), -1),
        ("counts", (0, 0), 1.5),
        ("counts", (2, 0), 50),
        ("counts", (1, 0), 4),
        ("sums", (0, 0), np.nan),
        ("sums", (0, 0), 5.5),
        ("sums", (2, 0), 1e9),
        ("squares", (0, 0), np.inf),
        ("squares", (1, 0), 5.5),
        ("loss", 1, 0.5),
        ("loss", 0, -1),
    ],
)
def test_impossible_sums_are_refused(name: str, place: Any, value: float) -> None:
    arrays = counts(discs(5, 20, 1, 1), discs(5, 20, 1, 2), 1, losses=np.ones(5)).to_arrays()
    array = arrays[name].astype(np.float64)
    array[place] = value
    with pytest.raises(ProtocolError):
        SegmentationCounts.from_arrays({**arrays, name: array})


def test_masks_that_do_not_fit_are_refused() -> None:
    good, spacing = np.zeros((2, 8, 8), np.uint8), np.ones((2, 2))
    make = SegmentationCounts.from_masks
    for truth in (good.astype(np.int64), good + np.uint8(2), good[0]):
        with pytest.raises(DataError):
            make(good, truth, 1, spacing, False)
    for prediction in (good.astype(np.int64), good + np.uint8(2), good[:1]):
        with pytest.raises(ModelError):
            make(prediction, good, 1, spacing, False)
    for bad in (spacing[:1], 0 * spacing, spacing * np.nan):
        with pytest.raises(DataError, match="spacing"):
            make(good, good, 1, bad, False)
    with pytest.raises(ModelError, match="losses"):
        make(good, good, 1, spacing, False, np.array([1.0, np.nan]))


def test_a_figure_of_classification_is_refused() -> None:
    made = counts(discs(2, 9, 1, 1), discs(2, 9, 1, 2), 1)
    with pytest.raises(PlanError, match="no such metric"):
        made.figures(["auc"])
    with pytest.raises(ProtocolError, match="of one task"):
        made.merge(counts(discs(2, 9, 1, 1), discs(2, 9, 1, 2), 2))


def test_dice_of_hundreds_of_images_is_quick() -> None:
    p, t = discs(300, 128, 1, 1), discs(300, 128, 1, 2)
    start = time.perf_counter()
    SegmentationCounts.from_masks(p, t, 1, np.ones((300, 2)), hd95=False)
    assert time.perf_counter() - start < 2
