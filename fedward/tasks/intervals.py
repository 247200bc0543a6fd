"""Confidence intervals of 95 % from counts, and their combination.

Proportions have the score interval of Wilson (1927); the area under the ROC curve has DeLong's
variance (DeLong et al., 1988) on the logit scale, of few patients Newcombe's interval (2006). Means
and differences of several figures are combined by the limits of each (MOVER, Zou and Donner, 2008),
so an interval need not be symmetric and two figures can be compared from their limits alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
LEVEL: Final = 0.95
Z: Final = 1.959963984540054
_FEW: Final = 10


def wilson(share: float, n: float) -> Interval | None:
    """Score interval of a share of ``n`` patients.

    Also an interval for the mean of values in 0 to 1 of which no spread is known: none of that mean
    has a larger variance than a share (Bhatia and Davis, 2000).

    Parameters
    ----------
    share : float
        In 0 to 1.
    n : float
        Patients; need not be whole. None of nobody.
    """
    if n <= 0:
        return None
    weight = 1 + Z * Z / n
    centre = (share + Z * Z / (2 * n)) / weight
    half = Z / weight * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def mean_interval(mean: float, variance: float, n: float) -> Interval | None:
    """Student's interval of a mean of ``n`` patients' values; None below two of them.

    Parameters
    ----------
    mean, variance : float
        Of the values; the variance is that of a population (divided by their number).
    n : float
        Patients.
    """
    if n <= 1:
        return None
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * math.sqrt(variance / (n - 1))
    return mean - half, mean + half


def bounded_mean_interval(mean: float, variance: float, n: float) -> Interval | None:
    """The same for values in 0 to 1; of values all alike, or of a single one, Wilson's."""
    found = mean_interval(mean, variance, n) if variance > 1e-12 else None
    if found is None:
        return wilson(min(1.0, max(0.0, mean)), n)
    return max(0.0, found[0]), min(1.0, found[1])


def delong_variance(
    negative: NDArray[Any], positive: NDArray[Any], per_count: float = 1.0
) -> float | None:
    """Variance of the area under the ROC curve of binned scores (DeLong et al., 1988).

    Parameters
    ----------
    negative, positive : NDArray
        ``(B,)`` counts by rising score. Pairs within a bin count one half.
    per_count : float
        Patients that one count stands for.

    Returns
    -------
    float or None
        None below two patients of either kind.
    """
    below, above = np.cumsum(negative) - negative, positive.sum() - np.cumsum(positive)
    all_negative, all_positive = float(negative.sum()), float(positive.sum())
    if min(all_negative, all_positive) * per_count <= 1:
        return None
    of_positive = (below + negative / 2) / all_negative
    of_negative = (above + positive / 2) / all_positive
    area = float(np.dot(positive, of_positive)) / all_positive
    spread = (
        float(np.dot(counts, (values - area) ** 2)) / total / (total * per_count - 1)
        for counts, values, total in (
            (positive, of_positive, all_positive),
            (negative, of_negative, all_negative),
        )
    )
    return sum(spread)


def auc_interval(
    area: float, negative: NDArray[Any], positive: NDArray[Any], per_count: float = 1.0
) -> Interval | None:
    """Interval of the area under the ROC curve of binned scores.

    DeLong's variance on the logit scale. With fewer than ten patients of either kind, or where
    scores separate all patients or none, Newcombe's score interval (2006, method 5): DeLong's is
    then too wide, or shows no variance at all.

    Parameters
    ----------
    area : float
        The area itself (see :func:`fedward.tasks.classification.auc`).
    negative, positive, per_count
        As for :func:`delong_variance`.
    """
    fewest = min(negative.sum(), positive.sum()) * per_count
    variance = delong_variance(negative, positive, per_count)
    if variance and 0 < area < 1 and fewest >= _FEW:
        return _on_logit(area, variance)
    return _newcombe(area, negative.sum() * per_count, positive.sum() * per_count)


def _on_logit(value: float, variance: float) -> Interval:
    """Normal interval of a figure in 0 to 1 on the logit scale, which it cannot leave."""
    from scipy.special import expit, logit

    half = Z * math.sqrt(variance) / (value * (1 - value))
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


def spread_interval(value: float, variance: float, n: float) -> Interval | None:
    """Interval of a figure in 0 to 1 whose own variance is known, of ``n`` patients.

    Of a figure of 0 or 1, and where no variance shows, Wilson's.
    """
    if variance > 1e-12 and 0 < value < 1:
        return _on_logit(value, variance)
    return wilson(min(1.0, max(0.0, value)), n)


def _newcombe(area: float, negative: float, positive: float) -> Interval | None:
    if min(negative, positive) <= 0:
        return None

    more = max(0.0, (negative + positive) / 2 - 1)

    def outside(other: float) -> bool:
        spread = 1 + more * ((1 - other) / (2 - other) + other / (1 + other))
        variance = other * (1 - other) * spread / (negative * positive)
        return (area - other) ** 2 >= Z * Z * variance

    return _edge(outside, 0.0, area), _edge(outside, 1.0, area)


def _edge(outside: Callable[[float], bool], out: float, inside: float) -> float:
    """Where a limit lies between a value that is outside the interval and the estimate."""
    if out == inside:
        return out
    for _ in range(50):
        middle = (out + inside) / 2
        out, inside = (middle, inside) if outside(middle) else (out, middle)
    return out


def mean_of(
    parts: Sequence[tuple[float, Interval]], *, independent: bool
) -> tuple[float, Interval]:
    """Mean of several figures, at least one, with its interval.

    Parameters
    ----------
    parts : sequence
        Figures, each with its interval.
    independent : bool
        Whether they are about different patients. Figures about the same ones may all be off to
        the same side, so that their distances to the limits are averaged.
    """
    mean = math.fsum(value for value, _ in parts) / len(parts)
    down = [value - interval[0] for value, interval in parts]
    up = [interval[1] - value for value, interval in parts]
    combine = math.hypot if independent else lambda *distances: math.fsum(distances)
    return mean, (mean - combine(*down) / len(parts), mean + combine(*up) / len(parts))


def difference(
    one: tuple[float, Interval], other: tuple[float, Interval]
) -> tuple[float, Interval]:
    """One figure minus another, with the interval for independent figures.

    Two models that were tested on the same patients mostly err on the same ones; then this interval
    is wider than it need be, and never shows a difference that a paired one would not.
    """
    (a, (a_low, a_high)), (b, (b_low, b_high)) = one, other
    low = a - b - math.hypot(a - a_low, b_high - b)
    return a - b, (low, a - b + math.hypot(a_high - a, b - b_low))


def widen(
    value: float, interval: Interval, error: float, bounds: Interval = (-math.inf, math.inf)
) -> Interval:
    """The interval with a further, independent error (one standard deviation), cut at bounds."""
    low = value - math.hypot(value - interval[0], Z * error)
    high = value + math.hypot(interval[1] - value, Z * error)
    return min(value, max(bounds[0], low)), max(value, min(bounds[1], high))
