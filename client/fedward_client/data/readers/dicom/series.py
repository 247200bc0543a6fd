"""Frames of a DICOM series as one volume: sorted, tilt-corrected, turned to RAS."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from fedward import rule_codes
from fedward.errors import DataError
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.headers import Header
from fedward_client.data.readers.dicom.pixels import Frame, Place, open_dicom, place_of
from fedward_client.data.readers.nifti import oriented_volume
from fedward_client.data.sample import Image

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
        raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
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
        raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
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
            raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
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
        raise rule_codes.unusable(rule_codes.DUPLICATE_SLICES)
    parts = steps / steps.min()
    if np.ptp(steps) <= _UNEVEN * usual:
        return
    whole = np.abs(parts - np.round(parts)).max() <= _UNEVEN
    raise rule_codes.unusable(rule_codes.INCOMPLETE if whole else rule_codes.UNEVEN)


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


# The slices of each volume: a series, or one file, may hold several stacks.

T = TypeVar("T")
Frames = tuple[tuple[Path, int], ...]


@dataclass(frozen=True)
class Stack:
    """Frames that belong together, and the headers of their files."""

    headers: tuple[Header, ...]
    frames: Frames


def single(header: Header) -> Stack:
    """One file with all its frames."""
    return Stack((header,), tuple((header.path, k) for k in range(header.frames)))


def stacks(headers: Sequence[Header]) -> list[Stack]:
    """Divide series by plane, size and spacing, and where places repeat by acquisition and time.

    A multi-frame file is a stack of its own, or several by what its functional groups say.
    """
    groups: dict[tuple[str, ...], list[Header]] = {}
    for header in headers:
        uid = header.keys["seriesinstanceuid"] or str(header.path)
        own = str(header.path) if header.frames > 1 else ""
        groups.setdefault((header.patient, uid, header.plane, own), []).append(header)
    return [stack for group in groups.values() for stack in _stacks(group)]


def _stacks(group: list[Header]) -> Iterator[Stack]:
    if group[0].frames > 1:
        for numbers in _of_file(group[0]):
            yield Stack((group[0],), tuple((group[0].path, k) for k in numbers))
        return
    # Some scanners number each slice as an acquisition, so it counts only where places repeat.
    for part in _takes(group, lambda one: one.position, lambda one: one.take):
        yield Stack(tuple(part), tuple((one.path, 0) for one in part))


def _takes(
    group: Sequence[T], place: Callable[[T], Hashable], take: Callable[[T], Hashable]
) -> list[list[T]]:
    places = [where for one in group if (where := place(one))]
    if len(set(places)) == len(places):
        return [list(group)]
    found: dict[Hashable, list[T]] = {}
    for one in group:
        found.setdefault(take(one), []).append(one)
    return list(found.values())


def _of_file(header: Header) -> list[list[int]]:
    """The frames of each stack of a multi-frame file (C.7.6.16.2.2, C.7.6.16.2.4)."""
    everything = list(range(header.frames))
    try:
        with quiet():
            whole = open_dicom(header.path).header
            shared = (whole.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
            groups = list(whole.get("PerFrameFunctionalGroupsSequence") or [])
            facts = [_facts(group, shared) for group in groups[: header.frames]]
    except Exception:  # whoever reads the frames meets this again, and tells
        return [everything]
    if len(facts) != header.frames:
        return [everything]
    planes: dict[Hashable, list[int]] = {}
    for k in everything:
        planes.setdefault(facts[k][0], []).append(k)
    return [
        take
        for plane in planes.values()
        for take in _takes(plane, lambda k: facts[k][1], lambda k: facts[k][2])
    ]


def _facts(group: Dataset, shared: Dataset) -> tuple[Hashable, Hashable, Hashable]:
    """Plane and stack, place, and time and echo of a frame."""

    def value(sequence: str, name: str) -> Any:
        for owner in (group, shared):
            items = owner.get(sequence) or []
            if len(items) and items[0].get(name) is not None:
                return items[0].get(name)
        return None

    content = "FrameContentSequence"
    turned = _rounded(value("PlaneOrientationSequence", "ImageOrientationPatient"))
    plane = (str(value(content, "StackID") or ""), turned)
    place = _rounded(value("PlanePositionSequence", "ImagePositionPatient"))
    # Acquisitions are not told apart by number: some scanners count each frame as one.
    time = str(value(content, "TemporalPositionIndex"))
    echo = str(value("MREchoSequence", "EffectiveEchoTime"))
    weight = str(value("MRDiffusionSequence", "DiffusionBValue"))
    return plane, place, (time, echo, weight)


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(round(float(v), 2) + 0.0 for v in values or ())


# Whether slices make a volume, as far as their headers tell.


@dataclass(frozen=True)
class Layout:
    """What headers tell of a stack of slices.

    Attributes
    ----------
    reason : str
        Why it makes no volume; "" if it does.
    tilt : float
        Degrees; 0 for an upright one.
    step : float
        mm between slices; 0 where headers do not tell.
    """

    reason: str = ""
    tilt: float = 0.0
    step: float = 0.0


def layout(stack: Stack) -> Layout:
    """Whether a stack of slices makes a volume, and how they lie.

    Two slices in one place are no reason yet: whether they are the same, only their pixels tell.
    """
    try:
        with quiet():
            places = _places(stack)
    except Exception:  # whoever reads the frames meets this again, and tells
        return Layout()
    alone = {tuple(np.round(p.position, 3)): p for p in places if p.position is not None}
    lying = [place for place in places if place.position is None]
    if not lying and len(alone) < 2 <= len(places):
        return Layout()
    try:
        found = geometry([*alone.values(), *lying], places[0].spacing)
        return Layout(tilt=found.tilt, step=found.step)
    except DataError as error:
        return Layout(rule_codes.reason_of(error))


def _places(stack: Stack) -> list[Place]:
    if all(header.place is not None for header in stack.headers):
        return [header.place for header in stack.headers if header.place is not None]
    return [place_of(open_dicom(path).header, frame) for path, frame in stack.frames]


# Which slice of a stack a place belongs to: by the image that is named, or by the plane.

_NEAR: Final = 0.25  # of the distance of slices (of a pixel, for one slice) is the same plane
_BESIDE: Final = 0.75  # of that distance is too near to be the plane of a slice that is not here
_PARALLEL: Final = 0.999  # cosine of the normals of two planes that count as parallel
_ALIKE: Final = 3  # digits to which normals are compared
_ONE: Final = 1e-3  # mm between slices that count as in one place


@dataclass(frozen=True)
class Found:
    """The slices in whose plane something lies; `beside`: it lies so close to some, yet in none."""

    numbers: tuple[int, ...] = ()
    beside: bool = False


@dataclass(frozen=True)
class _Stack:
    """Parallel slices by their height along the normal."""

    normal: Vector
    heights: Vector
    numbers: NDArray[np.int64]
    step: float
    pixel: float

    @property
    def near(self) -> float:
        return _NEAR * (self.step or self.pixel)

    def find(self, height: float) -> Found:
        low, high = np.searchsorted(self.heights, [height - self.near, height + self.near])
        if low < high:
            return Found(tuple(int(k) for k in self.numbers[low:high]))
        reach = _BESIDE * (self.step or self.pixel)
        low, high = np.searchsorted(self.heights, [height - reach, height + reach])
        return Found(beside=bool(low < high))


class Slices:
    """Slices of a stack, ready to be asked for.

    Parameters
    ----------
    places : sequence of Place
        Where each slice lies.
    frames : sequence
        File and frame of each.
    """

    def __init__(self, places: Sequence[Place], frames: Sequence[tuple[Path, int]]) -> None:
        self.places, self.frames = tuple(places), tuple(frames)
        self._images: dict[tuple[str, int], list[int]] = {}
        self._frames: dict[str, int] = {}
        for number, (place, (_, frame)) in enumerate(zip(places, frames, strict=True)):
            self._images.setdefault((place.instance, frame), []).append(number)
            self._frames[place.instance] = self._frames.get(place.instance, 0) + 1

    def named(self, instance: str, frame: int | None) -> tuple[int, ...] | None:
        """The slices of an image; None when it has several and none is meant."""
        if frame is None:
            if self._frames.get(instance, 0) > 1:
                return None
            frame = 0
        return tuple(self._images.get((instance, frame), ()))

    def at(self, position: Vector, normal: Vector | None = None) -> Found:
        """The slices in whose plane a point lies; with a normal, only those parallel to it."""
        found: list[int] = []
        beside = parallel = False
        for stack in self.stacks:
            if normal is not None and abs(float(stack.normal @ normal)) < _PARALLEL:
                continue
            parallel = True
            one = stack.find(float(position @ stack.normal))
            found += one.numbers
            beside |= one.beside
        return Found(tuple(found), not found and (beside or not parallel))

    def away(self, number: int, points: Vector) -> float:
        """How far ``(N, 3)`` points lie from the plane of a slice, in parts of what is near."""
        stack = self._stack_of[number]
        height = self.places[number].position @ stack.normal  # type: ignore[operator]
        return float(np.abs(points @ stack.normal - height).max()) / stack.near

    def lies(self, number: int) -> bool:
        """Whether a slice tells where it lies."""
        return number in self._stack_of

    @cached_property
    def stacks(self) -> tuple[_Stack, ...]:
        """Parallel slices together."""
        groups: dict[tuple[float, ...], list[int]] = {}
        for number, place in enumerate(self.places):
            normal = normal_of(place)
            if normal is not None and place.position is not None:
                key = tuple(float(v) for v in np.round(normal, _ALIKE) + 0.0)
                groups.setdefault(key, []).append(number)
        return tuple(self._stack(numbers) for numbers in groups.values())

    def _stack(self, numbers: list[int]) -> _Stack:
        normal = normal_of(self.places[numbers[0]])
        positions = np.array([self.places[k].position for k in numbers])
        heights = positions @ normal
        order = np.argsort(heights, kind="stable")
        steps = np.diff(heights[order])
        step = float(steps[steps > _ONE].min(initial=np.inf))
        pixel = min(min(self.places[k].spacing) for k in numbers)
        return _Stack(
            np.asarray(normal),
            heights[order],
            np.array(numbers)[order],
            step if np.isfinite(step) else 0.0,
            pixel,
        )

    @cached_property
    def _stack_of(self) -> dict[int, _Stack]:
        return {int(number): stack for stack in self.stacks for number in stack.numbers}


def normal_of(place: Place) -> Vector | None:
    """The unit normal of a slice; None where it tells none, or impossible axes."""
    if place.orientation is None:
        return None
    normal = np.cross(place.orientation[0], place.orientation[1])
    lengths = [*np.linalg.norm(place.orientation, axis=1), np.linalg.norm(normal)]
    return normal if np.allclose(lengths, 1, atol=1e-2) else None
