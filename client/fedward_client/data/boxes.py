"""Boxes: checked against their image, and where they go when it is prepared."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.tasks.detection import MOST_BOXES
from fedward_client.data.sample import BoxRows

_ROUNDED: Final = 1.0  # pixel by which programs that draw boxes may be off

VISIBLE: Final = 0.25
"""Share of a box that must be left within the image for it to count."""

Boxes = NDArray[np.float32]


def checked(rows: BoxRows, shape: tuple[int, ...]) -> Boxes:
    """Boxes as an array ``(m, 2 D + 1)``, cut at the border of their image.

    Raises
    ------
    DataError
        "too many boxes", "box is not numbers", "box outside its image" (by more than a pixel) or
        "box without area".
    """
    d = len(shape)
    boxes = np.array(rows, np.float32).reshape(len(rows), 2 * d + 1)
    if len(boxes) > MOST_BOXES:
        raise rule_codes.unusable(rule_codes.MANY_BOXES)
    if not np.isfinite(boxes).all():
        raise rule_codes.unusable(rule_codes.BOX_NUMBERS)
    low, high, sides = boxes[:, :d], boxes[:, d : 2 * d], np.array(shape, np.float32)
    if (low < -_ROUNDED).any() or (high > sides + _ROUNDED).any():
        raise rule_codes.unusable(rule_codes.BOX_OUTSIDE)
    for ends in (low, high):
        np.clip(ends, 0, sides, out=ends)
    if (high <= low).any():
        raise rule_codes.unusable(rule_codes.BOX_AREA)
    return boxes


def around(mask: NDArray[np.uint8]) -> BoxRows:
    """A box around each connected part of each class that a label map marks."""
    from scipy import ndimage

    found: list[tuple[float, ...]] = []
    for k in np.unique(mask[mask > 0]).tolist():
        # Parts that touch at a corner are one, as a reader would see them.
        parts, _ = ndimage.label(mask == k, np.ones([3] * mask.ndim))
        for place in ndimage.find_objects(parts):
            ends = [
                float(end)
                for side in ("start", "stop")
                for end in (getattr(s, side) for s in place)
            ]
            found.append((*ends, float(k)))
    return tuple(found)


def in_region(boxes: Boxes, region: tuple[slice, ...]) -> Boxes:
    """Boxes ``(m, 2 D + 1)`` of an image where only a region of it is looked at, cut at its border.

    Those of which too little is left within it are gone, as what a mask marks there is.
    """
    d = len(region)
    start = np.array([part.start or 0 for part in region], np.float32)
    sides = np.array([part.stop for part in region], np.float32) - start
    low, high, kept = within(boxes[:, :d] - start, boxes[:, d : 2 * d] - start, sides)
    moved = np.concatenate([low, high, boxes[:, 2 * d :]], axis=1)
    return np.asarray(moved[kept], np.float32)


def on_grid(
    boxes: Boxes, factors: tuple[float, ...], shape: tuple[int, ...], size: tuple[int, ...]
) -> Boxes:
    """Boxes of an image where it is resampled, and its middle is cropped or padded.

    Parameters
    ----------
    boxes : NDArray
        ``(m, 2 D + 1)`` of the image.
    factors : tuple of float
        By which each axis grows.
    shape : tuple of int
        Sides after resampling.
    size : tuple of int
        Sides at the end.

    Returns
    -------
    NDArray
        ``(MOST_BOXES, 2 D + 1)`` with zeros where there is no box.
    """
    d, out = len(size), np.zeros((MOST_BOXES, 2 * len(size) + 1), np.float32)
    moved, start = boxes.copy(), _start(shape, size)
    for ends in (moved[:, :d], moved[:, d : 2 * d]):
        ends[...] = ends * np.array(factors, np.float32) + start
    low, high, kept = within(moved[:, :d], moved[:, d : 2 * d], np.array(size, np.float32))
    left = np.concatenate([low, high, moved[:, 2 * d :]], axis=1)[kept]
    out[: len(left)] = left
    return out


def off_grid(
    corners: NDArray[np.float64],
    factors: tuple[float, ...],
    shape: tuple[int, ...],
    size: tuple[int, ...],
) -> NDArray[np.float64]:
    """Corners ``(m, 2 D)`` on a prepared image where they are in the image; see :func:`on_grid`."""
    ends = corners.reshape(len(corners), 2, len(size))
    return np.asarray((ends - _start(shape, size)) / np.array(factors)).reshape(corners.shape)


def _start(shape: tuple[int, ...], size: tuple[int, ...]) -> NDArray[np.float32]:
    """Where a resampled image begins once its middle is cropped or padded."""
    # As `crop` and `pad` count: each rounds its own half down.
    start = [(t - n) // 2 if t > n else -((n - t) // 2) for n, t in zip(shape, size, strict=True)]
    return np.array(start, np.float32)


def within(low: Any, high: Any, sides: Any) -> tuple[Any, Any, Any]:
    """Boxes cut at the border of an image, and which of them have enough left to count.

    Parameters
    ----------
    low, high, sides : NDArray or Tensor
        ``(..., D)`` corners and ``(D,)`` sides; all arrays, or all tensors.
    """
    ends = [end.clip(0 * sides, sides) for end in (low, high)]
    left = (ends[1] - ends[0]).prod(-1)
    return *ends, (left > 0) & (left >= VISIBLE * (high - low).prod(-1))
