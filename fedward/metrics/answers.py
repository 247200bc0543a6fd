"""Counts of a classifier's answers from its probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.errors import DataError, ModelError
from fedward.metrics.checks import Floats, Ints
from fedward.rule_codes import RuleCode

CALIBRATION_BINS = 15
_TINY = 1e-12
Flags = NDArray[np.bool_]


def probabilities(values: NDArray[Any]) -> Floats:
    """The values as ``(N, K)`` float64 in 0 to 1; raises ModelError for any others."""
    p = np.asarray(values, dtype=np.float64)
    if p.ndim != 2 or not p.shape[1]:
        raise ModelError(RuleCode.PROBABILITY_SHAPE, value=p.shape)
    # Written so that NaN fails it; sums of float32 may pass 1 by a rounding.
    if not ((p >= -1e-6) & (p <= 1 + 1e-6)).all():
        raise ModelError(
            RuleCode.PROBABILITIES,
            fix="Lower the learning rate; the model may have diverged",
        )
    return np.clip(p, 0.0, 1.0)


def truth(targets: NDArray[Any], p: Floats) -> Flags:
    """Indices ``(N,)`` or flags ``(N, K)`` as flags ``(N, K)``; raises DataError for any others."""
    fix = "Check the label table against the plan's classes"
    if targets.ndim == 2:
        if targets.shape != p.shape or not np.isin(targets, (0, 1)).all():
            raise DataError(RuleCode.TARGET_FLAGS, fix=fix)
        return targets.astype(np.bool_)
    if targets.shape != p.shape[:1] or targets.dtype.kind not in "iu":
        raise DataError(RuleCode.TARGET_INDEX, fix=fix)
    if ((targets < 0) | (targets >= p.shape[1])).any():
        raise DataError(RuleCode.TARGET_RANGE, values={"last": p.shape[1] - 1}, fix=fix)
    flags: Flags = targets[:, None] == np.arange(p.shape[1])
    return flags


def single_label(p: Floats, truth: Flags) -> tuple[Ints, Floats, Flags]:
    """Confusion ``(K, K)``; confidence and rightness ``(N,)`` of the likeliest class."""
    k, answer = p.shape[1], p.argmax(axis=1)
    actual = truth.argmax(axis=1)
    confusion = np.bincount(actual * k + answer, minlength=k * k).reshape(k, k)
    return confusion.astype(np.int64), p.max(axis=1), answer == actual


def multi_label(p: Floats, truth: Flags) -> tuple[Ints, Floats, Flags]:
    """Confusion ``(K, 2, 2)``; confidence and rightness ``(N * K,)`` of each decision at 0.5."""
    k, answer = p.shape[1], p >= 0.5
    cell = np.arange(k) * 4 + truth * 2 + answer
    confusion = np.bincount(cell.ravel(), minlength=4 * k).reshape(k, 2, 2)
    return confusion.astype(np.int64), np.maximum(p, 1 - p).ravel(), (answer == truth).ravel()


def calibration(confidence: Floats, right: Flags) -> Floats:
    """Decisions, summed confidence and right ones in bins of equal width, ``(3, 15)``."""
    place = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    weights = (None, confidence, right.astype(np.float64))
    return np.stack([np.bincount(place, w, CALIBRATION_BINS).astype(np.float64) for w in weights])


def cross_entropy(p: Floats, truth: Flags, multi_label: bool) -> Floats:
    """Cross-entropy of each image in nats, ``(N,)``; multi-label: mean binary one over classes."""
    of_truth = -np.log(np.maximum(np.where(truth, p, 1 - p), _TINY))
    entropy: Floats = of_truth.mean(axis=1) if multi_label else of_truth[truth]
    return entropy
