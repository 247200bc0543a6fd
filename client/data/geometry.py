"""Resampling, cropping and padding to the plan's size; smoothed where it shrinks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedward.plan.schema import Preprocessing


@dataclass(frozen=True)
class Grid:
    """How the spatial axes change.

    Attributes
    ----------
    shape : tuple of int
        Sides after resampling, before cropping and padding.
    scale : tuple of float or None
        Exact factor per axis, when the new spacing matters more than the ends of the image.
    spacing : tuple of float
        mm per axis after resampling.
    """

    shape: tuple[int, ...]
    scale: tuple[float, ...] | None
    spacing: tuple[float, ...]


def grid_for(shape: tuple[int, ...], spacing: tuple[float, ...], prep: Preprocessing) -> Grid:
    """The resampling that the plan asks for an image of `shape` and `spacing` (mm)."""
    if prep.spacing is not None:
        scale = tuple(s / t for s, t in zip(spacing, prep.spacing, strict=True))
        # The tiny surplus keeps 10 * 0.3 / 0.1 from becoming 29.
        scale = tuple(f * (1 + 1e-9) for f in scale)
        new = tuple(math.floor(n * f) for n, f in zip(shape, scale, strict=True))
        if min(new) >= 1:
            return Grid(new, scale, prep.spacing)
        new = tuple(max(n, 1) for n in new)
    elif prep.resize == "fit":
        factor = min(t / n for t, n in zip(prep.size, shape, strict=True))
        new = tuple(
            min(max(round(n * factor), 1), t) for n, t in zip(shape, prep.size, strict=True)
        )
    else:
        new = prep.size
    after = tuple(s * n / m for s, n, m in zip(spacing, shape, new, strict=True))
    return Grid(new, None, after)


def resample(array: NDArray[Any], grid: Grid, nearest: bool = False) -> NDArray[Any]:
    """Resample ``(C, *S)`` to ``(C, *grid.shape)``.

    Linear, and widened to the new pixel where an axis shrinks, so that nothing aliases; nearest
    (the pixel whose centre is closest) for label maps.
    """
    if grid.shape == array.shape[1:] and (grid.scale is None or np.allclose(grid.scale, 1)):
        return array
    layers = torch.from_numpy(np.ascontiguousarray(array))
    if nearest:
        mode = "nearest-exact"
        return _interpolate(layers[None], grid.shape, grid.scale, mode)[0].numpy()
    if len(grid.shape) == 2:
        return _smooth(layers[None], grid.shape, grid.scale)[0].numpy()
    # torch smooths in two axes only; the filter is separable, so the third can go by itself.
    c, *_, depth = layers.shape
    plane = grid.scale and grid.scale[:2]
    layers = _smooth(layers.movedim(-1, 1), grid.shape[:2], plane).movedim(1, -1)
    lines = layers.reshape(1, c, -1, depth)
    line = grid.scale and (1.0, grid.scale[2])
    lines = _smooth(lines, (lines.shape[2], grid.shape[2]), line)
    return lines.reshape(c, *grid.shape).numpy()


def _smooth(layers: Tensor, shape: tuple[int, ...], scale: tuple[float, ...] | None) -> Tensor:
    return _interpolate(layers, shape, scale, "bilinear", antialias=True)


def _interpolate(
    layers: Tensor,
    shape: tuple[int, ...],
    scale: tuple[float, ...] | None,
    mode: str,
    antialias: bool = False,
) -> Tensor:
    if scale is None:
        return F.interpolate(layers, size=list(shape), mode=mode, antialias=antialias)
    return F.interpolate(
        layers,
        scale_factor=list(scale),
        mode=mode,
        recompute_scale_factor=False,
        antialias=antialias,
    )


def crop(array: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
    """The middle of ``(C, *S)``, each axis at most as long as in `size`."""
    middle = [
        slice((n - t) // 2, (n - t) // 2 + t) if n > t else slice(None)
        for n, t in zip(array.shape[1:], size, strict=True)
    ]
    return array[(slice(None), *middle)]


def pad(array: NDArray[Any], size: tuple[int, ...], values: NDArray[Any]) -> NDArray[Any]:
    """``(C, *S)`` in the middle of ``(C, *size)``, filled with one of `values` per channel."""
    if array.shape[1:] == size:
        return array
    out = np.empty((len(array), *size), array.dtype)
    out[...] = values.reshape((-1,) + (1,) * len(size))
    starts = [(t - n) // 2 for n, t in zip(array.shape[1:], size, strict=True)]
    inner = [slice(a, a + n) for a, n in zip(starts, array.shape[1:], strict=True)]
    out[(slice(None), *inner)] = array
    return out
