"""Segmentations on another grid than their images: the nearest of their voxels to each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.data import reasons
from client.data.decode import Place
from client.data.readers.dicom_mask_files import MaskFile
from client.data.readers.dicom_planes import Slices, normal_of
from client.data.readers.dicom_segments import Layer, decode_layer

Vector = NDArray[np.float64]
_LARGEST: Final = 1 << 30  # voxels of a segmentation as a whole
_EVEN: Final = 0.1  # of the distance of two planes
_ASIDE: Final = 0.25  # of a pixel that planes may be apart sideways
_HAIR: Final = 1e-3
_AT_ONCE: Final = 1 << 20  # voxels whose place is in memory


@dataclass(frozen=True)
class Grid:
    """A segmentation as one volume.

    Attributes
    ----------
    labels : NDArray
        ``(D, H, W)`` uint8.
    origin : NDArray
        Centre of the first voxel, mm.
    axes : NDArray
        ``(3, 3)``: the way, mm, from one voxel to the next along each axis of `labels`.
    """

    labels: NDArray[np.uint8]
    origin: Vector
    axes: Vector

    def at(self, place: Place) -> NDArray[np.uint8]:
        """The nearest voxel to each pixel of a slice; 0 outside."""
        start, down, across = self._steps(place)
        rows, columns = np.arange(place.shape[0])[:, None], np.arange(place.shape[1])[None]
        inside = np.ones(place.shape, bool)
        index = []
        for axis in range(3):
            # A hair more than half, so that the middle between two falls to one side throughout.
            way = start[axis] + rows * down[axis] + columns * across[axis]
            near = np.floor(way + (0.5 + 1e-6)).astype(np.int64)
            inside &= (near >= 0) & (near < self.labels.shape[axis])
            index.append(near)
        found = np.zeros(place.shape, np.uint8)
        found[inside] = self.labels[tuple(one[inside] for one in index)]
        return found

    def _steps(self, place: Place) -> tuple[Vector, Vector, Vector]:
        """Voxel of a slice's first pixel, and the ways of a row and a column, in voxels."""
        if place.position is None or place.orientation is None:
            raise reasons.unusable(reasons.MASK_POSITION)
        back = np.linalg.inv(self.axes.T)
        along, down = place.orientation
        return (
            back @ (place.position - self.origin),
            back @ (down * place.spacing[0]),
            back @ (along * place.spacing[1]),
        )

    def foreground(self) -> Iterator[Vector]:
        """Centres ``(N, 3)`` of the voxels of any class, mm; of all corners when there is none."""
        if not self.labels.any():
            ends = [(0, size - 1) for size in self.labels.shape]
            yield np.stack(np.meshgrid(*ends), -1).reshape(-1, 3) @ self.axes + self.origin
        for k, plane in enumerate(self.labels):
            found = np.argwhere(plane)
            for start in range(0, len(found), _AT_ONCE):
                part = found[start : start + _AT_ONCE]
                index = np.column_stack([np.full(len(part), k), part])
                yield index @ self.axes + self.origin


@dataclass(frozen=True, eq=False)
class Resampled:
    """A segmentation on another grid, asked for a slice."""

    file: MaskFile
    layers: tuple[Layer, ...]

    def labels(self, place: Place) -> NDArray[np.uint8]:
        """The slice's label map ``(H, W)``."""
        return _grid(self).at(place)


def resampled(
    file: MaskFile, layers: Sequence[Layer], slices: Slices, reason: str
) -> Iterator[tuple[int, Resampled]]:
    """The same segmentation for each slice.

    Raises
    ------
    DataError
        `reason`: the two are in different or unknown frames of reference; "position of mask
        differs": the segmentation's planes are uneven or not parallel, or what it marks lies
        beside the images, where it would be lost.
    """
    part = Resampled(file, tuple(layers))
    spaces = {one.place.space for one in layers} | {place.space for place in slices.places}
    if len(spaces) != 1 or "" in spaces:
        raise reasons.unusable(reason)
    grid = _grid(part)
    met = [_covered(points, grid, slices) for points in grid.foreground()]  # none may lie beside
    if not any(met):
        raise reasons.unusable(reasons.MASK_POSITION)
    for number in range(len(slices.places)):
        if slices.lies(number):
            yield number, part


@lru_cache(maxsize=2)
def _grid(part: Resampled) -> Grid:
    first = part.layers[0].place
    normal = normal_of(first)
    if first.orientation is None or normal is None:
        raise reasons.unusable(reasons.MASK_POSITION)
    along, spacing = first.orientation, np.array(first.spacing)
    if not all(_alike(layer.place, first) for layer in part.layers):
        raise reasons.unusable(reasons.MASK_POSITION)
    corners = np.array([layer.place.position for layer in part.layers])
    aside = (corners - corners[0]) @ np.stack([along[1], along[0]]).T
    if (np.abs(aside) > _ASIDE * spacing).any():
        raise reasons.unusable(reasons.MASK_POSITION)
    heights = corners @ normal
    step = _step(heights, part.layers[0].depth, part.layers[0].thickness)
    planes = np.round((heights - heights.min()) / step)
    if (planes.max() + 1) * float(np.prod(first.shape)) > _LARGEST:
        raise reasons.unusable(reasons.TOO_LARGE)
    labels = np.zeros((int(planes.max()) + 1, *first.shape), np.uint8)
    for layer, k in zip(part.layers, planes.astype(int), strict=True):
        # Where two segments overlap, the later class stands.
        np.maximum(labels[k], decode_layer(part.file, layer.index, layer.segment), out=labels[k])
    axes = np.stack([normal * step, along[1] * spacing[0], along[0] * spacing[1]])
    return Grid(labels, corners[int(heights.argmin())], axes)


def _alike(place: Place, first: Place) -> bool:
    return (
        place.position is not None
        and place.orientation is not None
        and place.shape == first.shape
        and np.allclose(place.spacing, first.spacing, rtol=1e-3)
        and np.allclose(place.orientation, first.orientation, atol=1e-3)  # type: ignore[arg-type]
    )


def _step(heights: Vector, said: float, thickness: float) -> float:
    """The distance of planes, of which those without anything may be left out."""
    found = np.unique(np.round(heights, 3))
    steps = np.diff(found)
    step = said or (float(steps.min()) if len(steps) else thickness)
    if not step:
        raise reasons.unusable(reasons.MASK_POSITION)
    parts = steps / step
    gaps = len(steps) > 0 and np.ptp(steps) > _EVEN * step
    known = said or abs(step - thickness) <= _EVEN * step
    if (np.abs(parts - np.round(parts)) > _EVEN).any() or (gaps and not known):
        raise reasons.unusable(reasons.MASK_POSITION)
    return step


def _covered(points: Vector, grid: Grid, slices: Slices) -> bool:
    """Whether any of some voxels is in a slice.

    Raises
    ------
    DataError
        "position of mask differs": one is in the stack's height, but beside its pictures.
    """
    met = False
    for stack in slices.stacks:
        # A voxel reaches half its size further than its centre.
        reach = 0.5 * (stack.step or stack.pixel) + 0.5 * np.abs(grid.axes @ stack.normal).max()
        height = points @ stack.normal
        after = np.searchsorted(stack.heights, height).clip(0, len(stack.heights) - 1)
        before = (after - 1).clip(0)
        ahead, behind = (np.abs(height - stack.heights[k]) for k in (after, before))
        nearest = np.where(ahead < behind, after, before)
        close = np.minimum(ahead, behind) <= reach + _HAIR
        met |= bool(close.any())
        first = slices.places[int(stack.numbers[0])]
        corners = np.array([slices.places[int(k)].position for k in stack.numbers])
        if _beside(points[close] - corners[nearest[close]], first, grid):
            raise reasons.unusable(reasons.MASK_POSITION)
    return met


def _beside(ways: Vector, place: Place, grid: Grid) -> bool:
    """Whether any way ``(N, 3)`` from the corner of a slice leads out of it, voxel and all."""
    if place.orientation is None:
        return True
    axes, spacing = np.stack([place.orientation[1], place.orientation[0]]), np.array(place.spacing)
    room = 0.5 + 0.5 * np.abs(axes @ grid.axes.T).max(axis=1) / spacing + _HAIR
    pixels = ways @ axes.T / spacing
    return bool((pixels < -room).any() or (pixels > np.array(place.shape) - 1 + room).any())
