"""Confidence intervals of a classifier's metrics, from its counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward.metrics import histogram
from fedward.metrics.checks import Floats
from fedward.metrics.intervals import (
    Interval,
    auc_interval,
    mean_interval,
    mean_of,
    widen,
    wilson,
)
from fedward.metrics.rates import FIGURES, rates

if TYPE_CHECKING:
    from fedward.metrics.classification import ClassificationCounts

_DRAWS: Final = 200
Part = tuple[float, Interval]


def share_interval(part: float, all_: float, per_count: float) -> Part | None:
    """A share with Wilson's interval; None of nothing."""
    if all_ <= 0:
        return None
    share = min(1.0, max(0.0, float(part / all_)))
    interval = wilson(share, float(all_) * per_count)
    return None if interval is None else (share, interval)


def _over_classes(
    counts: ClassificationCounts, parts: Sequence[Part | None], *, independent: bool = False
) -> Interval | None:
    if counts.classes == 2 and not counts.multi_label:
        return parts[-1][1] if parts[-1] else None
    return _mean(parts, independent=independent)


def _mean(parts: Sequence[Part | None], *, independent: bool) -> Interval | None:
    there = [part for part in parts if part]
    return mean_of(there, independent=independent)[1] if there else None


def sensitivities(counts: ClassificationCounts, per_count: float) -> list[Part | None]:
    """Of each class, with its interval."""
    tp, fn, _, _ = rates(counts)
    return [share_interval(a, a + b, per_count) for a, b in zip(tp, fn, strict=True)]


def specificities(counts: ClassificationCounts, per_count: float) -> list[Part | None]:
    """Of each class, with its interval."""
    _, _, fp, tn = rates(counts)
    return [share_interval(a, a + b, per_count) for a, b in zip(tn, fp, strict=True)]


def _auc(counts: ClassificationCounts, per_count: float) -> Interval | None:
    parts: list[Part | None] = []
    for negative, positive in zip(*counts.scores, strict=True):
        area = histogram.auc(negative, positive)
        interval = None if area is None else auc_interval(area, negative, positive, per_count)
        parts.append((area, interval) if area is not None and interval else None)
    return _over_classes(counts, parts)


def _accuracy(counts: ClassificationCounts, per_count: float) -> Interval | None:
    decisions, _, right = counts.calibration.sum(axis=1)
    part = share_interval(right, decisions, per_count / _decisions_per_image(counts))
    return part[1] if part else None


def _decisions_per_image(counts: ClassificationCounts) -> int:
    # The decisions on one image are not independent: it weighs as one.
    return counts.classes if counts.multi_label else 1


def _sensitivity(counts: ClassificationCounts, per_count: float) -> Interval | None:
    # An image of a single-label task is of one class: the classes' images are different ones.
    apart = not counts.multi_label
    return _over_classes(counts, sensitivities(counts, per_count), independent=apart)


def _specificity(counts: ClassificationCounts, per_count: float) -> Interval | None:
    return _over_classes(counts, specificities(counts, per_count))


def _balanced_accuracy(counts: ClassificationCounts, per_count: float) -> Interval | None:
    found = sensitivities(counts, per_count)
    if not counts.multi_label:
        return _mean(found, independent=True)
    pairs = [
        mean_of([one, other], independent=True)
        for one, other in zip(found, specificities(counts, per_count), strict=True)
        if one and other
    ]
    return _mean(pairs, independent=False)


def _f1(counts: ClassificationCounts, per_count: float) -> Interval | None:
    tp, fn, fp, _ = rates(counts)
    shares = [share_interval(a, a + b + c, per_count) for a, b, c in zip(tp, fn, fp, strict=True)]
    # F1 rises with the share of true positives among all but the true negatives.
    parts = [
        None if one is None else (_to_f1(one[0]), (_to_f1(one[1][0]), _to_f1(one[1][1])))
        for one in shares
    ]
    return _over_classes(counts, parts)


def _to_f1(share: float) -> float:
    return 2 * share / (1 + share)


def _ece(counts: ClassificationCounts, per_count: float) -> Interval | None:
    """Twice the standard deviation of a parametric bootstrap of the bins, on either side."""
    decisions, confidence, right = counts.calibration
    n = round(decisions.sum() * per_count / _decisions_per_image(counts))
    value = FIGURES["ece"](counts)
    if n < 1 or value is None:
        return None
    random, there = np.random.default_rng(0), decisions > 0
    share = right[there] / decisions[there]
    drawn = random.multinomial(n, decisions[there] / decisions.sum(), _DRAWS)
    hits = random.binomial(drawn, np.clip(share, 0.0, 1.0))
    sure = confidence[there] / decisions[there]
    again = np.abs(drawn * sure - hits).sum(axis=1) / n
    return widen(value, (value, value), float(again.std()), (0.0, 1.0))


def _loss(counts: ClassificationCounts, per_count: float) -> Interval | None:
    """The spread of the losses is that of the scores' histogram."""
    value = FIGURES["loss"](counts)
    if value is None:
        return None
    p = np.clip(histogram.middles(counts.scores.shape[2]), 1e-12, 1 - 1e-12)
    present, absent = -np.log(p), -np.log1p(-p)
    if not counts.multi_label:
        _, spread, n = _spread(counts.scores[1].sum(axis=0), present)
        return _around(value, spread, n * per_count)
    parts = []
    for negative, positive in zip(*counts.scores, strict=True):
        losses = np.concatenate([absent, present])
        middle, spread, n = _spread(np.concatenate([negative, positive]), losses)
        interval = _around(middle, spread, n * per_count)
        parts.append((middle, interval) if interval else None)
    there = [part for part in parts if part]
    if not there:
        return None
    middle, (low, high) = mean_of(there, independent=False)
    # The losses themselves are exact, those of the histogram have the width of its bins.
    return max(0.0, value - (middle - low)), value + (high - middle)


def _spread(weights: NDArray[Any], losses: Floats) -> tuple[float, float, float]:
    n = float(weights.sum())
    if n <= 0:
        return 0.0, 0.0, 0.0
    middle = float(np.dot(weights, losses)) / n
    return middle, float(np.dot(weights, (losses - middle) ** 2)) / n, n


def _around(value: float, spread: float, n: float) -> Interval | None:
    found = mean_interval(value, spread, n)
    return None if found is None else (max(0.0, found[0]), found[1])


INTERVALS: Final[dict[str, Callable[[ClassificationCounts, float], Interval | None]]] = {
    "auc": _auc,
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "sensitivity": _sensitivity,
    "specificity": _specificity,
    "f1": _f1,
    "ece": _ece,
    "loss": _loss,
}
"""For each figure: its interval, given the patients that one count stands for."""
