"""Frames of a series as one volume: in order, upright, turned to RAS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from client.data import reasons
from client.data.decode import Frame, Place
from client.data.readers.nifti import oriented_volume
from client.data.types import Image

Vector = NDArray[np.float64]
_UNEVEN: Final = 0.1  # of the usual distance of two slices
_TILT: Final = 0.5  # pixels that the first and the last slice may be apart sideways


class Placed(Protocol):
    """What the geometry of a volume is made from."""

    @property
    def position(self) -> Vector | None:
        """Centre of the first pixel, mm."""

    @property
    def orientation(self) -> Vector | None:
        """Unit vectors along a row and down a column."""


@dataclass(frozen=True)
class Geometry:
    """How frames make a volume.

    Attributes
    ----------
    order : tuple of int
        The frames from one end of the normal to the other.
    affine : NDArray
        ``(4, 4)``, voxel (row, column, slice) to RAS mm.
    drift : NDArray
        ``(D, 2)`` pixels (rows, columns) by which each slice must move to stand upright.
    tilt : float
        Degrees between the stack of slices and their normal; 0 for an upright one.
    step : float
        mm between slices along their normal.
    """

    order: tuple[int, ...]
    affine: Vector
    drift: Vector
    tilt: float
    step: float

    @property
    def scanned(self) -> Vector:
        """``(4, 4)``, voxel to RAS mm of the slices where the scanner took them, tilt included."""
        pushed = np.eye(4)
        pushed[:2, 3] = self.drift[0]
        pushed[:2, 2] = (self.drift[-1] - self.drift[0]) / (len(self.drift) - 1)
        return np.asarray(self.affine @ pushed, np.float64)

    def volume(self, slices: Sequence[NDArray[Any]], *, labels: bool) -> tuple[Any, Any]:
        """Frames ``(H, W)`` in their first order to ``(x, y, z)`` in RAS, and its spacing, mm."""
        ordered = [slices[k] for k in self.order]
        if self.tilt:
            ordered = [_moved(s, d, labels) for s, d in zip(ordered, self.drift, strict=True)]
        turned = oriented_volume(np.stack(ordered, axis=-1), self.affine)
        return turned[0], turned[1]


def stack(frames: Sequence[Frame]) -> Image:
    """Frames of one series as a volume ``(C, x, y, z)`` in RAS.

    Raises
    ------
    DataError
        As :func:`geometry` does; the same slice twice is dropped when its pixels are the same too.
    """
    kept = _without_copies(frames)
    if not all(frame.image.pixels.shape == kept[0].image.pixels.shape for frame in kept):
        raise reasons.unusable(reasons.WRONG_SHAPE)
    place = geometry(kept, kept[0].image.spacing)
    count = len(kept[0].image.pixels)
    turned = [
        place.volume([frame.image.pixels[c] for frame in kept], labels=False) for c in range(count)
    ]
    pixels = np.ascontiguousarray(np.stack([t[0] for t in turned]), np.float32)
    middle = kept[place.order[len(kept) // 2]]
    return Image(pixels, turned[0][1], middle.image.window, place.tilt, middle.image.lookup)


def geometry(frames: Sequence[Placed], spacing: tuple[float, ...]) -> Geometry:
    """Order slices by their position along the normal, never by instance number.

    Parameters
    ----------
    frames : sequence
        Places of the slices, in any order.
    spacing : tuple of float
        mm between rows, then between columns.

    Raises
    ------
    DataError
        "shape does not fit the task": fewer than two slices, or some that do not say where they
        lie or lie in another plane; "duplicate slices": two in one place; "slices missing": a gap
        of whole slices; "slices uneven": any other distance (10 %).
    """
    along, corners = frames[0].orientation, [f.position for f in frames]
    if len(frames) < 2 or along is None or not all(_alike(f, along) for f in frames):
        raise reasons.unusable(reasons.WRONG_SHAPE)
    places = np.array(corners, np.float64)
    normal = np.cross(along[0], along[1])
    heights = places @ normal
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    _check_steps(steps)
    aside = (places[order] - places[order].mean(axis=0)) @ np.stack([along[1], along[0]]).T
    tilt = _tilt(aside, steps, spacing)
    corner = places[order[0]]
    if tilt:  # the upright stack stands over the middle of the tilted one
        corner = corner - aside[0] @ np.stack([along[1], along[0]])
    step = float(np.mean(steps))
    affine, drift = _affine(corner, along, normal, step, spacing), aside / np.array(spacing[:2])
    return Geometry(tuple(int(k) for k in order), affine, drift, tilt, step)


def frame_affine(place: Place) -> Vector | None:
    """``(4, 4)``, voxel (row, column, slice) of one frame to RAS mm; None where it lies nowhere."""
    along, corner = place.orientation, place.position
    if along is None or corner is None:
        return None
    return _affine(corner, along, np.cross(along[0], along[1]), 1.0, place.spacing)


def apart(places: Sequence[Place]) -> list[Place]:
    """The first of all that lie in one position.

    Raises
    ------
    DataError
        "shape does not fit the task": one does not say where it lies.
    """
    kept: dict[tuple[float, ...], Place] = {}
    for place in places:
        if place.position is None:
            raise reasons.unusable(reasons.WRONG_SHAPE)
        kept.setdefault(tuple(np.round(place.position, 3)), place)
    return list(kept.values())


def _without_copies(frames: Sequence[Frame]) -> list[Frame]:
    seen: dict[tuple[float, ...], Frame] = {}
    kept = []
    for frame in frames:
        key = () if frame.position is None else tuple(np.round(frame.position, 3))
        known = seen.setdefault(key, frame) if key else frame
        if known is frame or not np.array_equal(known.image.pixels, frame.image.pixels):
            kept.append(frame)
    return kept


def _check_steps(steps: Vector) -> None:
    usual = float(np.median(steps))
    if steps.min() <= 0.01 * max(usual, 1e-3):
        raise reasons.unusable(reasons.DUPLICATE_SLICES)
    parts = steps / steps.min()
    if np.ptp(steps) <= _UNEVEN * usual:
        return
    whole = np.abs(parts - np.round(parts)).max() <= _UNEVEN
    raise reasons.unusable(reasons.INCOMPLETE if whole else reasons.UNEVEN)


def _tilt(aside: Vector, steps: Vector, spacing: tuple[float, ...]) -> float:
    """Degrees by which the slices are pushed sideways, 0 where it is less than half a pixel."""
    way = aside[-1] - aside[0]
    if np.abs(way / np.array(spacing[:2])).max() <= _TILT:
        return 0.0
    return float(np.degrees(np.arctan2(np.linalg.norm(way), steps.sum())))


def _moved(values: NDArray[Any], by: Vector, labels: bool) -> NDArray[Any]:
    low = 0 if labels else values.min()
    moved = ndimage.shift(values, by, order=0 if labels else 1, mode="constant", cval=float(low))
    return np.asarray(moved, values.dtype)


def _alike(frame: Placed, along: Vector) -> bool:
    return (
        frame.position is not None
        and frame.orientation is not None
        and np.allclose(frame.orientation, along, atol=1e-3)
    )


def _affine(
    corner: Vector, along: Vector, normal: Vector, step: float, spacing: tuple[float, ...]
) -> Vector:
    """Voxel (row, column, slice) to RAS mm (C.7.6.2.1.1, with left and posterior negated)."""
    affine = np.eye(4)
    affine[:3, 0] = along[1] * spacing[0]
    affine[:3, 1] = along[0] * spacing[1]
    affine[:3, 2] = normal * step
    affine[:3, 3] = corner
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
