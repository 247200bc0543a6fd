"""A model's answer for each pixel, back on the grid of the image: the inverse of preprocessing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.plan.schema import Preprocessing
from fedward_client.data.transforms import crop, grid_for, pad, restored


def restore(
    probabilities: NDArray[Any],
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    prep: Preprocessing,
) -> NDArray[np.uint8]:
    """The likeliest class of each pixel of an image.

    Probabilities are interpolated linearly; what the plan's crop of the middle took away is
    background.

    Parameters
    ----------
    probabilities : NDArray
        ``(K, *S)`` on the prepared image, the first class being the background.
    shape, spacing : tuple
        Of the decoded image, mm.
    prep : Preprocessing
        The plan's.

    Returns
    -------
    NDArray
        ``(*shape)`` uint8 label map.
    """
    best, labels = np.empty(0), np.zeros(shape, np.uint8)
    for number, one in enumerate(probabilities):  # a layer may have the size of a volume
        layer = restore_layer(one, shape, spacing, prep, outside=float(number == 0))
        if number == 0:
            best = layer
            continue
        better = layer > best
        labels[better] = number
        best = np.where(better, layer, best)
    return labels


def restore_layer(
    layer: NDArray[Any],
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    prep: Preprocessing,
    outside: float = 0.0,
) -> NDArray[Any]:
    """One layer ``(*S)`` of a prepared image on the grid of the image of `shape`.

    What the plan's crop of the middle took away is `outside`.
    """
    grid = grid_for(shape, spacing, prep)
    content = crop(layer[None], grid.shape)  # without the border that padded it
    whole = pad(content, grid.shape, np.full(1, outside))
    if grid.shape != shape:  # on one grid nothing is rounded
        whole = whole.astype(np.float32)
    return np.asarray(restored(whole, grid, shape)[0])


def seen(shape: tuple[int, ...], spacing: tuple[float, ...], prep: Preprocessing) -> float:
    """The share of an image that the plan's crop of the middle leaves."""
    if prep.patch is not None:
        return 1.0
    grid = grid_for(shape, spacing, prep)
    return math.prod(min(1.0, t / n) for n, t in zip(grid.shape, prep.size, strict=True))
