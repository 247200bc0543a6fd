"""Polygons to masks: a pixel is inside when its centre is, by the even-odd rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.data import reasons

Points = NDArray[np.float64]
_AT_ONCE: Final = 1 << 20  # crossings of rows and edges that are in memory
_MOST: Final = 1 << 26  # in all


def fill(polygons: Sequence[Points], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Rasterise closed polygons together: what two of them cover is outside again (XOR).

    Parameters
    ----------
    polygons : sequence
        Of corners ``(N, 2)``: row and column, the centre of the first pixel being (0, 0). The last
        corner is joined with the first. An edge that is walked forth and back (a keyhole) encloses
        nothing.
    shape : tuple of int
        Rows and columns.

    Returns
    -------
    NDArray
        ``shape``. A centre that lies on an edge belongs to the polygon below or right of it, so
        that polygons with a common edge neither overlap nor leave a gap.

    Raises
    ------
    DataError
        "too large": more crossings of rows and edges than any drawing has.

    Notes
    -----
    Every edge turns over all pixels right of it in the rows that it crosses; what is turned over
    an odd number of times is inside.
    """
    rows, columns = shape
    turned = np.zeros((rows, columns + 1), np.int64)
    total = 0
    for low, high in _edges(polygons):
        first = np.clip(np.ceil(low[:, 0]), 0, rows).astype(np.int64)
        last = np.clip(np.ceil(high[:, 0]), 0, rows).astype(np.int64)  # not crossed itself
        counts = last - first
        total += int(counts.sum())
        if total > _MOST:
            raise reasons.unusable(reasons.TOO_LARGE)
        for part in _portions(counts):
            _turn(turned, low[part], high[part], first[part], counts[part])
    return np.asarray(np.cumsum(turned[:, :columns], axis=1) % 2 == 1)


def _edges(polygons: Sequence[Points]) -> Iterator[tuple[Points, Points]]:
    """Upper and lower ends of each polygon's edges."""
    for polygon in polygons:
        other = np.roll(polygon, -1, axis=0)
        # By one order of the ends, an edge walked back gives the very same numbers as forth.
        swap = (polygon[:, 0] > other[:, 0])[:, None]
        yield np.where(swap, other, polygon), np.where(swap, polygon, other)


def _portions(counts: NDArray[np.int64]) -> Iterator[slice]:
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _AT_ONCE, "right")))
        yield slice(start, stop)
        start = stop


def _turn(
    turned: NDArray[np.int64],
    low: Points,
    high: Points,
    first: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> None:
    edge = np.repeat(np.arange(len(counts)), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    row = first[edge] + np.arange(len(edge)) - starts
    low, high = low[edge], high[edge]
    share = (row - low[:, 0]) / (high[:, 0] - low[:, 0])
    crossing = low[:, 1] + share * (high[:, 1] - low[:, 1])
    column = np.clip(np.ceil(crossing), 0, turned.shape[1] - 1).astype(np.int64)
    np.add.at(turned, (row, column), 1)
