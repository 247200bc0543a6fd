"""DICOM SEG frames: binary, fractional, and label map (PS3.3, A.51 and C.8.20)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedward import rule_codes
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.mask_references import MaskFile
from fedward_client.data.readers.dicom.pixels import (
    Place,
    check_length,
    frame_bytes,
    open_dicom,
    place_of,
    stored_values,
)
from fedward_client.data.readers.dicom.series import Slices, normal_of
from fedward_client.data.readers.dicom.sniff import check_mask

# Segmentations on another grid than their images: the nearest of their voxels to each pixel.

Vector = NDArray[np.float64]
_dicom_regrid_LARGEST: Final = 1 << 30  # voxels of a segmentation as a whole
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
            raise rule_codes.unusable(rule_codes.MASK_POSITION)
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
        raise rule_codes.unusable(reason)
    grid = _grid(part)
    met = [_covered(points, grid, slices) for points in grid.foreground()]  # none may lie beside
    if not any(met):
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    for number in range(len(slices.places)):
        if slices.lies(number):
            yield number, part


@lru_cache(maxsize=2)
def _grid(part: Resampled) -> Grid:
    first = part.layers[0].place
    normal = normal_of(first)
    if first.orientation is None or normal is None:
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    along, spacing = first.orientation, np.array(first.spacing)
    if not all(_alike(layer.place, first) for layer in part.layers):
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    corners = np.array([layer.place.position for layer in part.layers])
    aside = (corners - corners[0]) @ np.stack([along[1], along[0]]).T
    if (np.abs(aside) > _ASIDE * spacing).any():
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    heights = corners @ normal
    step = _step(heights, part.layers[0].depth, part.layers[0].thickness)
    planes = np.round((heights - heights.min()) / step)
    if (planes.max() + 1) * float(np.prod(first.shape)) > _dicom_regrid_LARGEST:
        raise rule_codes.unusable(rule_codes.TOO_LARGE)
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
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    parts = steps / step
    gaps = len(steps) > 0 and np.ptp(steps) > _EVEN * step
    known = said or abs(step - thickness) <= _EVEN * step
    if (np.abs(parts - np.round(parts)) > _EVEN).any() or (gaps and not known):
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
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
            raise rule_codes.unusable(rule_codes.MASK_POSITION)
    return met


def _beside(ways: Vector, place: Place, grid: Grid) -> bool:
    """Whether any way ``(N, 3)`` from the corner of a slice leads out of it, voxel and all."""
    if place.orientation is None:
        return True
    axes, spacing = np.stack([place.orientation[1], place.orientation[0]]), np.array(place.spacing)
    room = 0.5 + 0.5 * np.abs(axes @ grid.axes.T).max(axis=1) / spacing + _HAIR
    pixels = ways @ axes.T / spacing
    return bool((pixels < -room).any() or (pixels > np.array(place.shape) - 1 + room).any())


_LARGEST: Final = 1 << 30  # bytes of a decoded frame


@dataclass(frozen=True)
class Layer:
    """One frame of a segmentation.

    Attributes
    ----------
    index : int
        The frame, from 0.
    segment : int or None
        The number of its segment; None in a label map, whose pixels tell.
    place : Place
        Where it lies.
    depth : float
        mm from plane to plane where the file tells; 0 where it does not.
    thickness : float
        mm, or 0.
    source : tuple or None
        SOPInstanceUID and frame of the one image that it was made from, where it says so.
    """

    index: int
    segment: int | None
    place: Place
    depth: float
    thickness: float
    source: tuple[str, int] | None


@dataclass(frozen=True)
class SegmentFrame:
    """One frame of a segmentation that lies on the grid of a slice."""

    file: MaskFile
    index: int
    segment: int | None

    def labels(self, place: Place) -> NDArray[np.uint8]:
        """The slice's label map ``(H, W)``.

        Raises
        ------
        DataError
            "shape of mask differs", "unknown class in mask", "not readable".
        """
        found = decode_layer(self.file, self.index, self.segment)
        if found.shape != place.shape:
            raise rule_codes.unusable(rule_codes.MASK_SHAPE)
        return found


def read_layers(file: MaskFile) -> tuple[Layer, ...]:
    """The frames of a file that hold a class.

    Raises
    ------
    DataError
        "not readable" or "too large".
    """
    numbers = {number for number, _ in file.labels}
    layers = _layers(file.path, file.path.stat().st_mtime_ns)
    return tuple(one for one in layers if one.segment is None or one.segment in numbers)


@lru_cache(maxsize=4)
def _layers(path: Path, changed: int) -> tuple[Layer, ...]:
    with quiet():
        try:
            check_mask(path)
            whole = pydicom.dcmread(path, force=True)
            if frame_bytes(whole) > _LARGEST:
                raise rule_codes.unusable(rule_codes.TOO_LARGE)
            check_length(whole)
            groups = whole.PerFrameFunctionalGroupsSequence
            return tuple(_layer(whole, group, k) for k, group in enumerate(groups))
        except Exception as error:
            raise rule_codes.unusable(rule_codes.reason_of(error)) from None


def decode_layer(file: MaskFile, index: int, segment: int | None) -> NDArray[np.uint8]:
    """A frame as a label map of the task's classes, ``(H, W)``.

    Raises
    ------
    DataError
        "unknown class in mask": a label map has a value that the file does not describe;
        "not readable".
    """
    with quiet():
        try:
            opened = open_dicom(file.path)
            header, values = opened.header, stored_values(opened, index)
            if values.ndim != 2:
                raise rule_codes.unusable(rule_codes.MASK_SHAPE)
            if segment is None:
                return _mapped(header, values, file)
            inside = _inside(header, values, file.threshold)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a decoder's panic is no Exception
            raise rule_codes.unusable(rule_codes.reason_of(error)) from None
    return np.where(inside, dict(file.labels)[segment], 0).astype(np.uint8)


def _mapped(header: Dataset, values: NDArray[Any], file: MaskFile) -> NDArray[np.uint8]:
    described = {0, *(int(one.SegmentNumber) for one in header.SegmentSequence)}
    if (padding := header.get("PixelPaddingValue")) is not None:
        described.add(int(padding))
    present = np.unique(values)
    if not described.issuperset(int(v) for v in present):
        raise rule_codes.unusable(rule_codes.MASK_CLASS)
    of_class = dict(file.labels)
    labels = np.array([of_class.get(int(v), 0) for v in present], np.uint8)
    return labels[np.searchsorted(present, values)]


def _inside(header: Dataset, values: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    if str(header.get("SegmentationType", "")).upper() != "FRACTIONAL":
        return np.asarray(values > 0)
    most = int(header.get("MaximumFractionalValue", 255))
    # What is nothing at all is no foreground, however low the threshold.
    return np.asarray((values >= threshold * most) & (values > 0))


def _layer(header: Dataset, group: Dataset, index: int) -> Layer:
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    number = None
    if str(header.get("SegmentationType", "")).upper() != "LABELMAP":
        owner = group if "SegmentIdentificationSequence" in group else shared
        number = int(owner.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
    measures = _first(group, "PixelMeasuresSequence") or _first(shared, "PixelMeasuresSequence")
    source = _source(group) or _source(shared)
    return Layer(
        index,
        number,
        place_of(header, index),
        _length(measures, "SpacingBetweenSlices"),
        _length(measures, "SliceThickness"),
        source,
    )


def _first(group: Dataset, name: str) -> Dataset | None:
    items = group.get(name) or []
    return items[0] if len(items) else None


def _length(measures: Dataset | None, name: str) -> float:
    value = float((measures.get(name) if measures is not None else 0) or 0)
    return abs(value) if np.isfinite(value) else 0.0


def _source(group: Dataset) -> tuple[str, int] | None:
    """The one image that a frame was made from, where it says so (C.7.6.16.2.6)."""
    images = [
        image
        for derivation in group.get("DerivationImageSequence") or []
        for image in derivation.get("SourceImageSequence") or []
    ]
    if len(images) != 1:
        return None
    number = images[0].get("ReferencedFrameNumber")
    first = number if isinstance(number, int) else (number[0] if number else 1)
    return str(images[0].ReferencedSOPInstanceUID), int(first) - 1


# Which frames of a segmentation belong to which slice of the images that it is of.

_NEAR: Final = 0.25  # of a pixel that a frame may be away from its image's place
Fit = Literal["same", "moved", "other", "shape"]


class Part(Protocol):
    """What adds to the label map of a slice."""

    def labels(self, place: Place) -> NDArray[np.uint8]:
        """Its own label map ``(H, W)``, 0 where it has nothing."""


def segment_parts(
    file: MaskFile, slices: Slices, instances: Collection[str]
) -> Iterator[tuple[int, Part]]:
    """The frames of each slice; a file on another grid is brought to that of the slices.

    Parameters
    ----------
    file : MaskFile
        The segmentation.
    slices : Slices
        Of the images.
    instances : collection of str
        SOPInstanceUIDs of the whole series: a frame made from one of these is of no other.

    Raises
    ------
    DataError
        "position of mask differs": a frame lies elsewhere than the image that it names, or on
        another grid without a common frame of reference; "shape of mask differs": the same, where
        only the size differs.
    """
    layers = read_layers(file)
    trusted = any(one.source is not None and one.source[0] in instances for one in layers)
    fits: set[Fit] = set()
    parts: list[tuple[int, Part]] = []
    for layer in layers:
        named = layer.source is not None and layer.source[0] in instances
        numbers, beside = _slices_of(layer, slices, named=named)
        if beside and not (trusted and layer.source is not None):
            fits.add("other")
        for number in numbers:
            fit = _fit(layer.place, slices.places[number], named=named)
            if fit == "moved" and named:  # its place and its image contradict each other
                raise rule_codes.unusable(rule_codes.MASK_POSITION)
            fits.add(fit)
            parts.append((number, SegmentFrame(file, layer.index, layer.segment)))
    if fits <= {"same"}:
        yield from parts
    else:
        reason = rule_codes.MASK_SHAPE if fits <= {"same", "shape"} else rule_codes.MASK_POSITION
        yield from resampled(file, layers, slices, reason)


def _slices_of(layer: Layer, slices: Slices, *, named: bool) -> tuple[tuple[int, ...], bool]:
    if named and layer.source is not None:
        return slices.named(*layer.source) or (), False
    normal = normal_of(layer.place)
    if layer.place.position is None or normal is None:
        return (), False
    found = slices.at(layer.place.position, normal)
    return found.numbers, found.beside


def _fit(one: Place, other: Place, *, named: bool) -> Fit:
    """How the grids of two frames compare; a frame that names its image need not tell its place."""
    if (
        one.position is None
        or other.position is None
        or (one.orientation is None or other.orientation is None)
    ):
        return "same" if named and one.shape == other.shape else "shape" if named else "other"
    near = _NEAR * min(other.spacing)
    turned = np.allclose(one.orientation, other.orientation, atol=1e-2)
    if not (turned and np.allclose(one.spacing, other.spacing, rtol=1e-2)):
        return "other"
    corner = np.allclose(one.position, other.position, atol=near)
    if one.shape != other.shape:
        return "shape" if corner else "other"
    return "same" if corner else "moved"
