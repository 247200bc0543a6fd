"""What of a site's counts may leave: whole groups of figures, and no small class."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward.errors import PolicyError
from fedward.metrics import ClassificationCounts, Counts, SegmentationCounts
from fedward.metrics.private_counts import (
    NoisyTables,
    noise_scale,
    parts_for,
    sensitivity,
    unit_of,
)
from fedward.metrics.rates import rates
from fedward.plan.schema import Plan
from fedward.rule_codes import FIX, RuleCode
from fedward_client.policy.settings import Limits

# Merge neighbouring bins until each that is not empty holds enough.


def coarse_rows(histograms: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """Merge the bins of each histogram on its own.

    Parameters
    ----------
    histograms : NDArray
        ``(..., BINS)`` counts.
    least : int
        What a bin must hold to stand alone.

    Returns
    -------
    NDArray
        The same shape and sums; each bin holds 0 or at least `least`, if the row holds that many.
    """
    rows = histograms.reshape(-1, histograms.shape[-1])
    return np.stack([_row(row, least) for row in rows]).reshape(histograms.shape)


def _row(row: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    made = np.zeros_like(row)
    for bins in groups(row, least):
        # The median keeps the place of most of its scores.
        below = np.cumsum(row[bins])
        made[bins[np.searchsorted(below, (below[-1] + 1) // 2)]] = below[-1]
    return made


def coarse_bins(table: NDArray[Any], least: int) -> NDArray[Any]:
    """Merge the columns of a table ``(rows, BINS)`` by the counts in its first row."""
    made = np.zeros_like(table)
    for bins in groups(table[0], least):
        made[:, bins[len(bins) // 2]] = table[:, bins].sum(axis=1)
    return made


def groups(counts: NDArray[Any], least: int) -> list[NDArray[np.int64]]:
    """Neighbouring bins that are not empty, in groups that hold `least` or more each."""
    found: list[list[int]] = []
    held = least  # begins a group
    for place in np.flatnonzero(counts):
        if held >= least:
            found.append([])
            held = 0
        found[-1].append(int(place))
        held += counts[place]
    if len(found) > 1 and held < least:
        last = found.pop()
        found[-1] += last
    return [np.array(one, dtype=np.int64) for one in found]


Arrays = dict[str, NDArray[Any]]

CLASSIFICATION: Final[Mapping[str, frozenset[str]]] = {
    "scores": frozenset({"auc"}),
    "confusion": frozenset({"accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1"}),
    "calibration": frozenset({"accuracy", "ece"}),
    "loss": frozenset({"loss"}),
}
"""The figures that each array of a classifier's counts gives."""


def noise_for(plan: Plan, limits: Limits, part: str) -> NoisyTables | None:
    """How the policy has an evaluation counted; None: exactly, in counts for :func:`release`.

    Raises
    ------
    PolicyError
        The policy lets out none of the plan's figures. This follows from plan and policy alone.
    """
    task, metrics = plan.task, plan.metrics
    private = limits.counts == "private"
    if not private and not limits.count_noise:
        return None
    parts = parts_for(task, metrics.report, limits.metrics, surface=part == "test")
    if not parts:
        raise PolicyError(RuleCode.WITHHELD, fix=FIX)
    if private:
        unit = unit_of(task, metrics.images_per_patient)
        scale = noise_scale(task, parts, unit, plan.evaluation_epsilon(part))
        return NoisyTables(parts, scale, unit, metrics.images_per_patient)
    unit = unit_of(task, 1)
    scale = Fraction(limits.count_noise) * unit * sensitivity(task, parts)
    least = limits.minimum_count * unit
    return NoisyTables(parts, scale, unit, by_patient=False, least=least)


def release(counts: Counts, limits: Limits) -> tuple[Arrays, tuple[str, ...]]:
    """The counts as they may leave.

    Parameters
    ----------
    counts : Counts
        The site's.
    limits : Limits
        Figures that may be worked out, smallest count, digits.

    Returns
    -------
    tuple
        Arrays in which what is withheld is 0, and the names of what was withheld.
    """
    if isinstance(counts, ClassificationCounts):
        return _classification(counts, limits)
    return _segmentation(counts, limits)


def _classification(counts: ClassificationCounts, limits: Limits) -> tuple[Arrays, tuple[str, ...]]:
    arrays, least = {k: np.array(v) for k, v in counts.to_arrays().items()}, limits.minimum_count
    withheld = {name for name, gives in CLASSIFICATION.items() if not gives <= set(limits.metrics)}
    if counts.images < least:
        withheld = set(arrays)
    small = _small_classes(counts, least)
    if small.any():
        withheld |= _hide(arrays, small, counts.multi_label)
    for name in withheld & set(arrays):
        arrays[name][...] = 0
    arrays["scores"] = coarse_rows(arrays["scores"], least)
    arrays["calibration"] = coarse_bins(arrays["calibration"], least)
    arrays["calibration"][1] = arrays["calibration"][1].round(limits.rounding)
    arrays["loss"][0] = arrays["loss"][0].round(limits.rounding)
    return arrays, tuple(sorted(withheld))


def _small_classes(counts: ClassificationCounts, least: int) -> NDArray[np.bool_]:
    tp, fn, fp, tn = rates(counts)
    few = [(n > 0) & (n < least) for n in (tp + fn, fp + tn)]
    either: NDArray[np.bool_] = few[0] | few[1]
    return either


def _hide(arrays: Arrays, small: NDArray[np.bool_], multi_label: bool) -> set[str]:
    if not multi_label:  # the other classes and the total would tell
        return {"scores", "confusion"}
    arrays["scores"][:, small] = 0
    arrays["confusion"][small] = 0
    return {"classes"}


def _segmentation(counts: SegmentationCounts, limits: Limits) -> tuple[Arrays, tuple[str, ...]]:
    arrays = {name: np.array(array) for name, array in counts.to_arrays().items()}
    withheld = _rows(arrays, limits.metrics)
    n, least = arrays["counts"], limits.minimum_count
    small = (n > 0) & (n < least)
    small[:, small[0]] = True  # HD95 counts no image that Dice does not
    if small.any():
        withheld.add("classes")
    for name in ("counts", "sums", "squares"):
        arrays[name][small] = 0
    if "loss" not in limits.metrics or arrays["loss"][1] < least:
        withheld |= {"loss"} if arrays["loss"][1] else set()
        arrays["loss"][:] = 0
    _round(arrays, limits.rounding)
    return arrays, tuple(sorted(withheld))


def _rows(arrays: Arrays, metrics: Collection[str]) -> set[str]:
    # An image's IoU follows from its Dice.
    overlap = {"dice", "iou"} <= set(metrics)
    gone = [0, 1, 2] if not overlap else [] if "hd95" in metrics else [2]
    for name in ("counts", "sums", "squares"):
        arrays[name][gone] = 0
    return {("dice", "iou", "hd95")[row] for row in gone}


def _round(arrays: Arrays, digits: int) -> None:
    """Round sums and squares so that they stay possible: n q >= s^2, and q <= s for shares."""
    n, limit = arrays["counts"], np.full_like(arrays["sums"], np.inf)
    limit[:2] = n[:2]
    sums = np.minimum(arrays["sums"].round(digits), limit)
    lowest = np.divide(sums**2, n, out=np.zeros_like(sums), where=n > 0)
    highest = np.where(np.isfinite(limit), sums, np.inf)
    squares = np.clip(arrays["squares"].round(digits), lowest, highest)
    arrays["sums"], arrays["squares"] = sums, np.where(n > 0, squares, 0.0)
    arrays["loss"][0] = arrays["loss"][0].round(digits)


Release = Callable[[Counts, Limits], tuple[Arrays, tuple[str, ...]]]
