"""Score histograms, from which the area under the ROC curve is computed.

Bins uniform in probability would put all scores of a confident model into two of them, and bins
uniform in the logit all scores of a hardly trained one. The scale here is asinh(logit p): about
linear in the logit near p = 1/2 and logarithmic in it towards 0 and 1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.metrics.checks import Floats, Ints

BINS = 2048
COARSE_BINS = 16  # even, so that a probability of 1/2 is the edge of a bin
# The largest logit. The least float32 above 0 is exp(-87) or so: a softmax gives nothing further
# out.
_REACH = {BINS: math.asinh(87.0), COARSE_BINS: math.asinh(8.0)}
_SMALLEST = 1e-38


def bin_of(probability: NDArray[Any], bins: int = BINS) -> Ints:
    """The bin of each probability; same shape, 0 to ``bins - 1``, never falling as p rises."""
    place = (np.arcsinh(logit(probability)) / _REACH[bins] + 1) / 2
    found: Ints = np.clip((place * bins).astype(np.int64), 0, bins - 1)
    return found


def logit(probability: NDArray[Any]) -> Floats:
    """log p - log(1 - p), finite also at 0 and 1; same shape."""
    p = np.asarray(probability, dtype=np.float64)
    odds: Floats = np.log(np.maximum(p, _SMALLEST)) - np.log(np.maximum(1 - p, _SMALLEST))
    return odds


def middles(bins: int = BINS) -> Floats:
    """The probability in the middle of each bin, ``(bins,)``."""
    return _probability((np.arange(bins) + 0.5) / bins, bins)


def lower_edges(bins: int = BINS) -> Floats:
    """The lowest probability of each bin, ``(bins,)``; that of the first is 0."""
    edges = _probability(np.arange(bins) / bins, bins)
    edges[0] = 0.0
    return edges


def _probability(place: Floats, bins: int) -> Floats:
    p: Floats = 1 / (1 + np.exp(-np.sinh((2 * place - 1) * _REACH[bins])))
    return p


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
