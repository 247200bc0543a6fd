"""A model's answer for each pixel, back on the grid of the image: the inverse of preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedward.plan.schema import Preprocessing
from fedward_client.data.transforms import grid_for

_BLOCK: Final = 1 << 24  # values that are interpolated at once


@dataclass(frozen=True)
class _Axis:
    """Where the pixels of one axis lie among the model's.

    Attributes
    ----------
    low, high : NDArray
        ``(n,)`` the model's pixels before and behind each pixel of the image.
    weight : NDArray
        ``(n,)`` float32 of the one behind.
    outside : NDArray
        ``(n,)``, whether a pixel was cropped before the model saw it.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    weight: NDArray[np.float32]
    outside: NDArray[np.bool_]

    @property
    def same(self) -> bool:
        """Whether each pixel is one of the model's."""
        return not (self.weight.any() or self.outside.any())


def restore(
    probabilities: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...], prep: Preprocessing
) -> NDArray[np.uint8]:
    """The likeliest class of each pixel of an image.

    Probabilities are interpolated linearly at the centre of each pixel; what the plan's crop of
    the middle took away is background.

    Parameters
    ----------
    probabilities : Tensor
        ``(K, *prep.size)``, the first class being the background.
    shape, spacing : tuple
        Of the decoded image, mm.
    prep : Preprocessing
        The plan's.

    Returns
    -------
    NDArray
        ``(*shape)`` uint8 label map.
    """
    axes = _axes(shape, spacing, prep)
    if all(axis.same and len(axis.low) == n for axis, n in zip(axes, prep.size, strict=True)):
        picked = [axis.low for axis in axes]
        return np.asarray(probabilities.argmax(0).byte().cpu().numpy()[np.ix_(*picked)])
    values = probabilities.float().cpu()
    out = np.empty(shape, np.uint8)
    rows = max(1, _BLOCK // (len(values) * int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        part = slice(start, start + rows)
        block = _along(values, 1, axes[0], part)
        for number, axis in enumerate(axes[1:], start=2):
            block = _along(block, number, axis, slice(None))
        out[part] = block.argmax(0).byte().numpy()
    for number, axis in enumerate(axes):
        np.moveaxis(out, number, 0)[axis.outside] = 0
    return out


def seen(shape: tuple[int, ...], spacing: tuple[float, ...], prep: Preprocessing) -> float:
    """The share of an image that the plan's crop of the middle leaves."""
    left = [1 - axis.outside.mean() for axis in _axes(shape, spacing, prep)]
    return float(np.prod(left))


def _along(values: Tensor, number: int, axis: _Axis, part: slice) -> Tensor:
    low = values.index_select(number, torch.from_numpy(axis.low[part]))
    if not axis.weight[part].any():
        return low
    high = values.index_select(number, torch.from_numpy(axis.high[part]))
    weight = torch.from_numpy(axis.weight[part])
    return torch.lerp(low, high, weight.reshape(-1, *(1,) * (values.ndim - number - 1)))


def _axes(shape: tuple[int, ...], spacing: tuple[float, ...], prep: Preprocessing) -> list[_Axis]:
    grid = grid_for(shape, spacing, prep)
    scale: Any = grid.scale or tuple(m / n for m, n in zip(grid.shape, shape, strict=True))
    if grid.shape == shape and np.allclose(scale, 1):  # as `resample` leaves such an image alone
        scale = (1.0,) * len(shape)
    return [
        _axis(n, m, factor, size)
        for n, m, factor, size in zip(shape, grid.shape, scale, prep.size, strict=True)
    ]


def _axis(n: int, resampled: int, factor: float, size: int) -> _Axis:
    """Of `n` pixels, `resampled` by a factor, of which the middle `size` were kept or padded."""
    place = (np.arange(n) + 0.5) * factor - 0.5  # among the resampled pixels, centre to centre
    start = max(0, (resampled - size) // 2)
    kept = min(resampled, size)
    outside = np.zeros(n, bool)
    if resampled > size:
        outside = (place < start - 0.5) | (place > start + kept - 0.5)
    place = np.clip(place - start, 0, kept - 1) + max(0, (size - resampled) // 2)
    low = np.floor(place + 1e-6).astype(np.int64)
    weight = np.where(place - low < 1e-6, 0.0, place - low).astype(np.float32)
    return _Axis(low, np.where(weight > 0, low + 1, low), weight, outside)
