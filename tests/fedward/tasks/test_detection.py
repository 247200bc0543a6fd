"""Counts of detections against an exact computation written out here, and what of them leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedward.errors import ProtocolError
from fedward.plan.schema import Task
from fedward.tasks.detection import (
    BINS,
    DETECTION,
    MOST_BOXES,
    OVERLAPS,
    DetectionCounts,
    anchors,
    levels,
)
from fedward.tasks.private_counts import PrivateCounts

TASK = Task(kind="detection", classes=("a", "b"))
SIZE = (64, 96)
NAMES = DETECTION.metric_names
Found = list[tuple[float, int, NDArray[np.float64]]]  # score, class and corners


def scene(seed: int, images: int = 30) -> tuple[list[Found], NDArray[np.float32]]:
    """Marked boxes and what a model found: most of them, shifted, and others that are not there."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((images, MOST_BOXES, 5), np.float32)
    found: list[Found] = []
    for own in truth:
        here: Found = []
        for row in own[: rng.integers(0, 6)]:
            low = rng.uniform(0, 40, 2)
            k = int(rng.integers(0, 2))
            row[:] = (*low, *(low + rng.uniform(8, 24, 2)), k + 1)
            if rng.random() < 0.8:
                moved = row[:4] + rng.normal(0, rng.choice([0.5, 3.0]), 4)
                here.append((float(rng.beta(4, 2)), k, moved.astype(np.float64)))
        for _ in range(rng.integers(0, 4)):
            low = rng.uniform(0, 40, 2)
            box = np.concatenate([low, low + rng.uniform(6, 20, 2)])
            here.append((float(rng.beta(2, 4)), int(rng.integers(0, 2)), box))
        found.append(here)
    return found, truth


def outputs(found: list[Found]) -> torch.Tensor:
    """A network's output that says just that: other places have the lowest score."""
    places, width = DETECTION.output_shape(TASK, SIZE)
    out = torch.zeros(len(found), places, width)
    out[..., :2] = -20.0
    for image, rows in zip(out, found, strict=True):
        for place, (score, k, box) in enumerate(rows):
            image[place, k] = float(np.log(score / (1 - score)))
            image[place, 2:] = torch.from_numpy(box)
    return out


def counted(seed: int, images: int = 30) -> DetectionCounts:
    found, truth = scene(seed, images)
    answers = DETECTION.answers(TASK, outputs(found), truth, np.ones((images, 2)), surface=False)
    counts = DETECTION.count(answers, truth)
    assert isinstance(counts, DetectionCounts)
    return counts


def iou(one: Any, other: Any) -> float:
    height = min(one[2], other[2]) - max(one[0], other[0])
    width = min(one[3], other[3]) - max(one[1], other[1])
    both = max(height, 0.0) * max(width, 0.0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return both / (sum(areas) - both) if sum(areas) > both else 0.0


def exact(found: list[Found], truth: Any, k: int, least: float) -> tuple[list[bool], int]:
    """Whether each detection of a class is right, from the surest on; and marked boxes."""
    rows, marked = [], 0
    for here, own in zip(found, truth, strict=True):
        kept: Found = []
        for one in sorted((f for f in here if f[1] == k and f[0] >= 0.01), key=lambda f: -f[0]):
            box = np.clip(one[2].astype(np.float32), 0, None)
            if all(iou(box, other[2]) <= 0.5 for other in kept):
                kept.append((one[0], k, box))
        free = [box[:4] for box in own if box[4] == k + 1]
        marked += len(free)
        for score, _, box in kept:
            best = max(range(len(free)), key=lambda j: iou(box, free[j]), default=-1)
            right = best >= 0 and iou(box, free[best]) >= least
            rows.append((score, right))
            if right:
                free.pop(best)
    return [right for _, right in sorted(rows, key=lambda row: -row[0])], marked


def exact_ap(right: list[bool], marked: int) -> float:
    points, hits = [], 0
    for place, one in enumerate(right, start=1):
        hits += one
        points.append((hits / marked, hits / place))
    recalls = [r / 100 for r in range(101)]
    return float(
        np.mean([max((p for r, p in points if r >= at - 1e-9), default=0.0) for at in recalls])
    )


def exact_froc(right: list[bool], marked: int, images: int) -> float:
    seen = []
    for rate in (0.125, 0.25, 0.5, 1, 2, 4, 8):
        hits = wrong = best = 0
        for one in right:
            hits, wrong = hits + one, wrong + (not one)
            best = hits if wrong <= rate * images else best
        seen.append(best / marked)
    return float(np.mean(seen))


@pytest.mark.parametrize("seed", range(4))
def test_figures_lie_within_what_bins_can_hide_of_the_exact_ones(seed: int) -> None:
    counts, (found, truth) = counted(seed), scene(seed)
    overlaps = {"map50": [0.5], "map10": [0.1], "map50_95": list(OVERLAPS[1:])}
    for k in range(2):
        for name, least in overlaps.items():
            values = [exact_ap(*exact(found, truth, k, one)) for one in least]
            check(counts, name, k, float(np.mean(values)))
        check(counts, "froc", k, exact_froc(*exact(found, truth, k, 0.1), len(found)))


def check(counts: DetectionCounts, name: str, k: int, value: float) -> None:
    low, mixed, high = (counts.bounds(name, order)[k] for order in ("worst", "mixed", "best"))
    assert low is not None and mixed is not None and high is not None
    assert low - 1e-9 <= value <= high + 1e-9
    assert abs(mixed - value) < 0.01  # of 30 images; more images, smaller errors


def test_sites_add_up_to_all_images() -> None:
    parts = [scene(seed) for seed in (5, 6)]
    both = [*parts[0][0], *parts[1][0]], np.concatenate([truth for _, truth in parts])
    answers = DETECTION.answers(TASK, outputs(both[0]), both[1], np.ones((60, 2)), surface=False)
    whole, added = DETECTION.count(answers, both[1]), counted(5) + counted(6)
    assert whole.figures(NAMES) == pytest.approx(added.figures(NAMES), rel=1e-12)
    for name, array in added.to_arrays().items():
        if name != "spread":
            np.testing.assert_allclose(array, whole.to_arrays()[name], rtol=1e-12)
    assert all(value is not None for value in added.figures(NAMES).values())
    assert set(added.intervals(NAMES)) == {*NAMES}


def test_intervals_are_as_wide_as_figures_of_other_images_differ() -> None:
    sites = [counted(seed) for seed in range(24)]
    for place, name in enumerate(("map50", "map50_95", "map10", "froc")):
        values = np.array([one.per_class(name) for one in sites], np.float64)
        told = np.array([np.sqrt(one.spread[place]) / one.boxes[0] for one in sites])
        np.testing.assert_allclose(told.mean(axis=0), values.std(axis=0), rtol=0.35)
        # Of two hospitals together they are narrower by about the root of two, and images that
        # are of half as many patients tell half as much.
        one, two = (each.class_intervals(name)[0] for each in (sites[0], sites[0] + sites[1]))
        half = sites[0].class_intervals(name, 0.5)[0]
        assert one is not None and two is not None and half is not None
        assert 0.5 < (two[1] - two[0]) / (one[1] - one[0]) < 0.95
        assert 1.2 < (half[1] - half[0]) / (one[1] - one[0]) < 1.6


def test_a_perfect_model_has_full_figures_and_a_blind_one_none() -> None:
    found, truth = scene(1)
    sure = [
        [(0.95, int(row[4]) - 1, row[:4].astype(np.float64)) for row in own if row[4]]
        for own in truth
    ]
    # Marked boxes that overlap by half are one thing for any detector: keep apart ones.
    truth = np.array([keep_apart(own) for own in truth])
    sure = [[(0.95, int(r[4]) - 1, r[:4].astype(np.float64)) for r in o if r[4]] for o in truth]
    for rows, value in ((sure, 1.0), ([[] for _ in found], 0.0)):
        answers = DETECTION.answers(TASK, outputs(rows), truth, np.ones((30, 2)), surface=False)
        figures = DETECTION.count(answers, truth).figures(NAMES)
        assert figures == pytest.approx(dict.fromkeys(NAMES, value))


def keep_apart(own: Any) -> Any:
    kept: list[Any] = []
    for row in own[own[:, 4] > 0]:
        if all(iou(row, other) < 0.05 for other in kept):
            kept.append(row)
    made = np.zeros_like(own)
    made[: len(kept)] = kept or np.zeros((0, 5))
    return made


def test_not_finite_outputs_find_nothing() -> None:
    found, truth = scene(2)
    out = outputs(found)
    out[:, ::2] = torch.nan
    out[:, 1::2, 2:] = torch.inf
    answers = DETECTION.answers(TASK, out, truth, np.ones((30, 2)), surface=False)
    assert not np.isfinite(answers).any()


def test_what_leaves_holds_enough_images_in_each_bin() -> None:
    counts = counted(3)
    arrays, withheld = counts.release(NAMES, 5, 3)
    assert not withheld
    made = DetectionCounts.from_arrays(arrays)
    for name, whole in counts.scores.items():
        left = made.scores[name]
        assert np.array_equal(left[0].sum(axis=3), whole[0].sum(axis=3)), "detections are kept"
        assert not left[1:].any(), "of how many images they are stays"
        # A bin was merged of neighbours that hold detections of five images or more.
        held = np.maximum(whole[1].max(axis=3), whole[2].sum(axis=3))
        assert ((np.count_nonzero(left[0], axis=3) <= 1) | (held >= 5)).all()
        assert np.count_nonzero(left[0]) < np.count_nonzero(whole[0]) / 2


def test_merged_bins_keep_the_figures_on_average() -> None:
    """What the bins lose has no direction: models would come out better than they are."""
    moved = []
    for seed in range(6):
        counts = counted(seed, 60)
        made = DetectionCounts.from_arrays(counts.release(NAMES, 5, 3)[0])
        before, after = counts.figures(NAMES), made.figures(NAMES)
        moved.append([after[name] - before[name] for name in NAMES])  # type: ignore[operator]
    assert np.abs(np.mean(moved, axis=0)).max() < 0.015
    assert np.abs(moved).max() < 0.04


def test_no_bin_of_fewer_images_leaves() -> None:
    """One image has forty detections of one score: they are one image's."""
    box = np.array([10.0, 10.0, 20.0, 20.0])
    truth = np.zeros((20, MOST_BOXES, 5), np.float32)
    truth[:, 0] = (*box, 1)
    spread = [box + 12 * np.array([i // 5, i % 5, i // 5, i % 5]) for i in range(40)]
    found: list[Found] = [[(0.55, 0, one) for one in spread]]
    found += [[(0.8, 0, box + 30.0)] for _ in range(19)]
    answers = DETECTION.answers(TASK, outputs(found), truth, np.ones((20, 2)), surface=False)
    arrays, _ = DETECTION.count(answers, truth).release(NAMES, 5, 3)
    wrong = arrays["at50"][0, 1, 0, 0]
    assert np.count_nonzero(wrong) == 1 and wrong.sum() > 50


def test_a_class_of_few_images_and_figures_that_are_not_allowed_stay() -> None:
    found, truth = scene(4)
    truth[3:][truth[3:, :, 4] == 2] = 0
    answers = DETECTION.answers(TASK, outputs(found), truth, np.ones((30, 2)), surface=False)
    counts = DETECTION.count(answers, truth)
    arrays, withheld = counts.release(NAMES, 5, 3)
    assert withheld == ("classes",) and not arrays["boxes"][:, 1].any()
    assert not any(arrays[name][:, :, :, 1].any() for name in ("at10", "at50", "above"))
    arrays, withheld = counts.release(("map50",), 1, 3)
    assert withheld == ("above", "at10", "f1")
    made = DetectionCounts.from_arrays(arrays)
    assert made.gives("map50") and not any(made.gives(name) for name in NAMES if name != "map50")
    assert made.figures(("froc", "map50_95")) == {"froc": None, "map50_95": None}
    assert made.spread[0].all() and not made.spread[1:].any()
    arrays, _ = counts.release(NAMES, 31, 3)
    assert not any(array.any() for name, array in arrays.items() if name != "images")


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("above"),
        lambda a: a["at50"].__setitem__((0, 0, 0, 0, 5), 10_000),  # boxes found more than once
        lambda a: a["at10"].__setitem__((1, 1, 0, 0, 7), 10_000),  # images without a detection
        lambda a: a["at10"].__setitem__((2, 1, 0, 0, 7), 1 + a["at10"][1, 1, 0, 0, 7]),
        lambda a: a["boxes"].__setitem__((1, 0), 31),
        lambda a: a["f1"].__setitem__((1, 0), 40.0),
        lambda a: a["spread"].__setitem__((0, 0), a["boxes"][0, 0] ** 2),
        lambda a: a.update(at50=a["at50"][..., :-1]),
        lambda a: a.update(boxes=a["boxes"] + 0.5),
    ],
)
def test_impossible_counts_are_refused(change: Any) -> None:
    arrays = {name: np.array(array) for name, array in counted(7).to_arrays().items()}
    DetectionCounts.from_arrays(arrays).held_to(TASK)
    change(arrays)
    with pytest.raises(ProtocolError):
        DetectionCounts.from_arrays(arrays)


def test_tables_with_noise_give_the_mean_f1() -> None:
    found, truth = scene(8)
    answers = DETECTION.answers(TASK, outputs(found), truth, np.ones((30, 2)), surface=False)
    counts = DETECTION.count(answers, truth)
    weights = np.full(30, DETECTION.unit, np.int64)
    assert DETECTION.parts_for(TASK, NAMES, NAMES, surface=True) == ("box_f1",)
    assert DETECTION.parts_for(TASK, NAMES, ("map50",), surface=True) == ()
    tables = DETECTION.tables(TASK, answers, truth, weights, ("box_f1",))
    # An image changes each class by a unit at most: half of it from one cell to the other.
    one = DETECTION.tables(TASK, answers[:1], truth[:1], weights[:1], ("box_f1",))
    assert one["box_f1"].sum() <= DETECTION.unit * DETECTION.sensitivity(TASK, ("box_f1",))
    private = PrivateCounts.from_arrays(TASK, tables, DETECTION.unit, 1.0)
    names = ("box_f1", "map50")
    assert private.figures(names)["map50"] is None
    assert private.figures(names)["box_f1"] == pytest.approx(
        counts.figures(names)["box_f1"], abs=1e-3
    )
    kept = DETECTION.withhold({"box_f1": np.array([[3000, 2000], [100, 0]])}, 5000)["box_f1"]
    assert kept.tolist() == [[3000, 2000], [0, 0]]
    same = PrivateCounts.of(TASK, counts).tables["box_f1"]
    assert np.abs(same - tables["box_f1"]).max() <= 30


def test_anchors_lie_on_the_levels_places() -> None:
    found = anchors(SIZE)
    assert levels(SIZE) == [(8, 12), (4, 6), (2, 3), (1, 2)]
    assert found.shape == (96 + 24 + 6 + 2, 4)
    np.testing.assert_array_equal(found[13], [12 - 16, 12 - 16, 12 + 16, 12 + 16])
    assert counted(9).scores["at10"].shape[-1] == BINS
