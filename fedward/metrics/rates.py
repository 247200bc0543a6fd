"""A classifier's metrics from its counts; None where the counts do not define one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedward.metrics import histogram
from fedward.metrics.checks import Ints, mean, ratio

if TYPE_CHECKING:
    from fedward.metrics.classification import ClassificationCounts


def rates(counts: ClassificationCounts) -> Ints:
    """True positives, false negatives, false positives, true negatives: ``(4, K)``."""
    m = counts.confusion
    if counts.multi_label:
        return np.stack([m[:, 1, 1], m[:, 1, 0], m[:, 0, 1], m[:, 0, 0]])
    hit = np.diag(m)
    missed, wrong = m.sum(axis=1) - hit, m.sum(axis=0) - hit
    return np.stack([hit, missed, wrong, m.sum() - hit - missed - wrong])


def _over_classes(counts: ClassificationCounts, values: Sequence[float | None]) -> float | None:
    binary = counts.classes == 2 and not counts.multi_label
    return values[-1] if binary else mean(values)


def _sensitivities(counts: ClassificationCounts) -> list[float | None]:
    tp, fn, _, _ = rates(counts)
    return [ratio(a, a + b) for a, b in zip(tp, fn, strict=True)]


def _specificities(counts: ClassificationCounts) -> list[float | None]:
    _, _, fp, tn = rates(counts)
    return [ratio(a, a + b) for a, b in zip(tn, fp, strict=True)]


def _auc(counts: ClassificationCounts) -> float | None:
    return _over_classes(counts, list(map(histogram.auc, *counts.scores)))


def _accuracy(counts: ClassificationCounts) -> float | None:
    return ratio(counts.calibration[2].sum(), counts.calibration[0].sum())


def _balanced_accuracy(counts: ClassificationCounts) -> float | None:
    sensitivity = _sensitivities(counts)
    if not counts.multi_label:
        return mean(sensitivity) if sum(s is not None for s in sensitivity) > 1 else None
    pairs = zip(sensitivity, _specificities(counts), strict=True)
    return mean((a + b) / 2 for a, b in pairs if a is not None and b is not None)


def _f1(counts: ClassificationCounts) -> float | None:
    tp, fn, fp, _ = rates(counts)
    parts = zip(tp, fn, fp, strict=True)
    return _over_classes(counts, [ratio(2 * a, 2 * a + b + c) for a, b, c in parts])


def _ece(counts: ClassificationCounts) -> float | None:
    """Expected calibration error (Guo et al., 2017, eq. 5)."""
    n, confidence, right = counts.calibration
    return ratio(np.abs(confidence - right).sum(), n.sum())


FIGURES: dict[str, Callable[[ClassificationCounts], float | None]] = {
    "auc": _auc,
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "sensitivity": lambda counts: _over_classes(counts, _sensitivities(counts)),
    "specificity": lambda counts: _over_classes(counts, _specificities(counts)),
    "f1": _f1,
    "ece": _ece,
    "loss": lambda counts: ratio(counts.loss[0], counts.loss[1]),
}
