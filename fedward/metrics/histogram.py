"""Score histograms: enough of the scores to give the area under the ROC curve.

Bins uniform in probability would put all scores of a confident model into two of them, and bins
uniform in the logit all scores of a hardly trained one. The scale here is asinh(logit p): about
linear in the logit near p = 1/2 and logarithmic in it towards 0 and 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.metrics.checks import Floats, Ints

BINS = 2048
# The least float32 above 0 is exp(-87) or so: a softmax gives nothing further out.
_REACH = float(np.arcsinh(87.0))
_SMALLEST = 1e-38


def bin_of(probability: NDArray[Any]) -> Ints:
    """The bin of each probability; same shape, 0 to ``BINS - 1``, never falling as p rises."""
    place = (np.arcsinh(logit(probability)) / _REACH + 1) / 2
    bins: Ints = np.clip((place * BINS).astype(np.int64), 0, BINS - 1)
    return bins


def logit(probability: NDArray[Any]) -> Floats:
    """log p - log(1 - p), finite also at 0 and 1; same shape."""
    p = np.asarray(probability, dtype=np.float64)
    odds: Floats = np.log(np.maximum(p, _SMALLEST)) - np.log(np.maximum(1 - p, _SMALLEST))
    return odds


def middles() -> Floats:
    """The probability in the middle of each bin, ``(BINS,)``."""
    place = (np.arange(BINS) + 0.5) / BINS
    middle: Floats = 1 / (1 + np.exp(-np.sinh((2 * place - 1) * _REACH)))
    return middle


def histograms(probabilities: Floats, positive: NDArray[np.bool_]) -> Ints:
    """Count the scores of each class.

    Parameters
    ----------
    probabilities : NDArray
        ``(N, K)`` in 0 to 1.
    positive : NDArray
        ``(N, K)``, whether the image has the class.

    Returns
    -------
    NDArray
        ``(2, K, BINS)``; first the images without the class, then those with it.
    """
    classes = probabilities.shape[1]
    row = positive * classes + np.arange(classes)
    flat = np.bincount((row * BINS + bin_of(probabilities)).ravel(), minlength=2 * classes * BINS)
    return flat.reshape(2, classes, BINS).astype(np.int64)


def auc(negative: Ints, positive: Ints) -> float | None:
    """Area under the ROC curve of binned scores, by the Mann-Whitney statistic.

    Parameters
    ----------
    negative, positive : NDArray
        ``(BINS,)`` counts. Pairs within a bin count one half.

    Returns
    -------
    float or None
        None unless there are scores of both kinds.
    """
    # Python's float product: the count of pairs may pass int64.
    pairs = float(negative.sum()) * float(positive.sum())
    if not pairs:
        return None
    below = np.cumsum(negative) - negative
    return float(np.dot(positive.astype(np.float64), below + negative / 2) / pairs)
