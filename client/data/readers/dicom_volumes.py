"""Frames of a series as one volume."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.data import reasons
from client.data.decode import Frame
from client.data.readers.nifti import oriented_volume
from client.data.types import Image


def stack(frames: Sequence[Frame]) -> Image:
    """Frames of one series as a volume ``(C, x, y, z)`` in RAS.

    Raises
    ------
    DataError
        "shape does not fit the task": the frames do not share a plane and a size, or do not say
        where they lie; "slices missing": they are not evenly spaced (10 %).
    """
    along = frames[0].orientation
    if len(frames) < 2 or along is None or not all(_alike(f, frames[0]) for f in frames):
        raise reasons.unusable(reasons.WRONG_SHAPE)
    normal = np.cross(along[0], along[1])
    places = np.array([f.position for f in frames]) @ normal
    order = np.argsort(places, kind="stable")
    steps = np.diff(places[order])
    if steps.min() <= 0 or np.ptp(steps) > 0.1 * np.median(steps):
        raise reasons.unusable(reasons.INCOMPLETE)
    ordered = [frames[k] for k in order]
    values = np.stack([f.image.pixels for f in ordered], axis=-1)
    affine = _affine(ordered[0], along, normal, float(np.mean(steps)))
    turned = [oriented_volume(channel, affine) for channel in values]
    pixels = np.ascontiguousarray(np.stack([t[0] for t in turned]), np.float32)
    return Image(pixels, turned[0][1], ordered[len(ordered) // 2].image.window)


def _alike(frame: Frame, first: Frame) -> bool:
    return (
        frame.position is not None
        and frame.orientation is not None
        and frame.image.pixels.shape == first.image.pixels.shape
        and np.allclose(frame.orientation, first.orientation, atol=1e-3)  # type: ignore[arg-type]
        and np.allclose(frame.image.spacing, first.image.spacing, rtol=1e-3)
    )


def _affine(
    first: Frame, along: NDArray[np.float64], normal: NDArray[np.float64], step: float
) -> NDArray[np.float64]:
    """Voxel (row, column, slice) to RAS mm (C.7.6.2.1.1, with left and posterior negated)."""
    affine = np.eye(4)
    affine[:3, 0] = along[1] * first.image.spacing[0]
    affine[:3, 1] = along[0] * first.image.spacing[1]
    affine[:3, 2] = normal * step
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
