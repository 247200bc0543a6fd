"""Merge neighbouring bins until each that is not empty holds enough."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


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
