"""Frames of a DICOM series as one volume: sorted, tilt-corrected, evenly apart, turned to RAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from fedward import rule_codes
from fedward.errors import DataError
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.headers import TAKES, TIMES, Header
from fedward_client.data.readers.dicom.pixels import Frame, Place, open_dicom, place_of
from fedward_client.data.readers.nifti import oriented_volume, turned_back
from fedward_client.data.sample import Image

Vector = NDArray[np.float64]
_UNEVEN: Final = 0.1  # of the usual distance of two slices
_GAP: Final = (
    5.0  # mm across which slices are interpolated: the thickness of a usual clinical slice
)
_STRETCHED: Final = 5  # times the smallest distance of two slices; likewise
_HAIR: Final = 1e-3  # mm
_PART: Final = 2  # digits of a step to which a slice's place between resampled ones counts
_DECIMAL: Final = 0.1  # mm to which some scanners and exports write positions
_FITTED: Final = 2.4  # of a rounding error that even heights may be off a line through them
_ROUNDED: Final = 0.5  # of the usual distance of two slices is more than rounding
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
        mm between slices of the volume along their normal.
    at : NDArray
        ``(D,)`` each slice's place in the volume, in steps from the first.
    gap : float
        The largest distance, mm, of slices that are unevenly apart and so are resampled; else 0.
    """

    order: tuple[int, ...]
    affine: Vector
    drift: Vector
    tilt: float
    step: float
    at: Vector
    gap: float = 0.0

    @property
    def depth(self) -> int:
        """Slices of the volume."""
        return round(float(self.at[-1])) + 1

    @property
    def scanned(self) -> Vector:
        """``(4, 4)``, voxel to RAS mm of the slices where the scanner took them, tilt included."""
        pushed = np.eye(4)
        pushed[:2, 3] = self.drift[0]
        pushed[:2, 2] = (self.drift[-1] - self.drift[0]) / (self.depth - 1)
        return np.asarray(self.affine @ pushed, np.float64)

    def volume(self, slices: Sequence[NDArray[Any]], *, labels: bool) -> tuple[Any, Any]:
        """Frames ``(H, W)`` in their first order to ``(x, y, z)`` in RAS, and its spacing, mm."""
        ordered = [slices[k] for k in self.order]
        if self.tilt:
            ordered = [_moved(s, d, labels) for s, d in zip(ordered, self.drift, strict=True)]
        if self.gap:
            ordered = _even(ordered, self.at, labels)
        turned = oriented_volume(np.stack(ordered, axis=-1), self.affine)
        return turned[0], turned[1]

    def slices(self, labels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """The inverse for labels: ``(x, y, z)`` in RAS to ``(H, W)`` of each frame, in its order.

        Slices of a leaning gantry move back to where they were taken, by the nearest pixel; one of
        a resampled volume is the nearest of that volume.
        """
        turned = np.moveaxis(turned_back(labels, self.affine), -1, 0)
        ordered = [turned[k] for k in np.rint(self.at).astype(int)]
        if self.tilt:
            ordered = [_moved_back(s, d) for s, d in zip(ordered, self.drift, strict=True)]
        found = dict(zip(self.order, ordered, strict=True))
        return [found[k] for k in range(len(ordered))]


def stack(frames: Sequence[Frame]) -> Image:
    """Frames of one series as a volume ``(C, x, y, z)`` in RAS.

    Raises
    ------
    DataError
        As :func:`geometry` does; the same slice twice is dropped when its pixels are the same too.
    """
    return arranged(frames)[0]


def arranged(frames: Sequence[Frame]) -> tuple[Image, tuple[int, ...], Geometry]:
    """The volume of :func:`stack`, the numbers of the frames that make it, and how they do.

    Raises
    ------
    DataError
        As :func:`stack` does.
    """
    numbers = _without_copies(frames)
    kept = [frames[k] for k in numbers]
    if not all(frame.image.pixels.shape == kept[0].image.pixels.shape for frame in kept):
        raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
    place = geometry(kept, kept[0].image.spacing)
    filled = _filled(kept)
    turned = [
        place.volume([pixels[c] for pixels in filled], labels=False) for c in range(len(filled[0]))
    ]
    pixels = np.ascontiguousarray(np.stack([t[0] for t in turned]), np.float32)
    middle = kept[place.order[len(kept) // 2]]
    one = middle.image
    image = Image(
        pixels, turned[0][1], one.window, place.tilt, one.lookup, one.measured, gap=place.gap
    )
    return image, tuple(numbers), place


def geometry(frames: Sequence[Placed], spacing: tuple[float, ...]) -> Geometry:
    """Order slices by their position along the normal, never by instance number.

    Slices that are unevenly apart (by more than 10 %, or than what one decimal leaves out) are to
    be resampled to their smallest distance, unless a gap is too wide to be interpolated.

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
        of whole slices that is wider than 5 mm, or than five times the smallest distance; "slices
        uneven": any other such gap.
    """
    along, corners = frames[0].orientation, [f.position for f in frames]
    if len(frames) < 2 or along is None or not all(_alike(f, along) for f in frames):
        raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
    places = np.array(corners, np.float64)
    normal = np.cross(along[0], along[1])
    heights = places @ normal
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    even = _are_even(steps, _rounding(places, normal))
    aside = (places[order] - places[order].mean(axis=0)) @ np.stack([along[1], along[0]]).T
    tilt = _tilt(aside, steps, spacing)
    corner = places[order[0]]
    if tilt:  # the upright stack stands over the middle of the tilted one
        corner = corner - aside[0] @ np.stack([along[1], along[0]])
    count = len(steps) if even else round(float(steps.sum() / steps.min()))
    step = float(steps.sum() / count)
    at = np.arange(len(order), dtype=np.float64)
    if not even:
        at = np.round((heights[order] - heights[order[0]]) / step, _PART)
    affine, drift = _affine(corner, along, normal, step, spacing), aside / np.array(spacing[:2])
    gap = 0.0 if even else float(steps.max())
    return Geometry(tuple(int(k) for k in order), affine, drift, tilt, step, at, gap)


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


def _filled(frames: Sequence[Frame]) -> list[NDArray[np.float32]]:
    """The pixels of each slice; where there is no image, the darkest value of the whole volume."""
    known = [f for f in frames if f.padded is None or not f.padded.all()]
    if not known or all(frame.padded is None for frame in frames):
        return [frame.image.pixels for frame in frames]
    low = min(frame.image.pixels.min() for frame in known)
    return [
        f.image.pixels if f.padded is None else np.where(f.padded, low, f.image.pixels)
        for f in frames
    ]


def _without_copies(frames: Sequence[Frame]) -> list[int]:
    seen: dict[tuple[float, ...], Frame] = {}
    kept = []
    for number, frame in enumerate(frames):
        key = () if frame.position is None else tuple(np.round(frame.position, 3))
        known = seen.setdefault(key, frame) if key else frame
        if known is frame or not np.array_equal(known.image.pixels, frame.image.pixels):
            kept.append(number)
    return kept


def _rounding(places: Vector, normal: Vector) -> float:
    """mm by which heights may be wrong since all coordinates were written with one decimal."""
    tenths = places / _DECIMAL
    written = bool(np.abs(tenths - np.round(tenths)).max() < 1e-4)
    return float(_DECIMAL / 2 * np.abs(normal).sum()) if written else 0.0


def _are_even(steps: Vector, rounding: float) -> bool:
    """Whether slices are evenly apart; a gap that is too wide to be interpolated is refused."""
    usual = float(np.median(steps))
    if steps.min() <= 0.01 * max(usual, 1e-3):
        raise rule_codes.unusable(rule_codes.DUPLICATE_SLICES)
    parts = steps / steps.min()
    if np.ptp(steps) <= _UNEVEN * usual:
        return True
    heights, numbers = np.concatenate([[0.0], np.cumsum(steps)]), np.arange(len(steps) + 1.0)
    off = np.ptp(heights - np.polyval(np.polyfit(numbers, heights, 1), numbers))
    if off <= _FITTED * rounding and 2 * rounding <= _ROUNDED * usual:
        return True
    if steps.max() <= min(_GAP, _STRETCHED * steps.min()) + _HAIR:
        return False
    whole = np.abs(parts - np.round(parts)).max() <= _UNEVEN
    raise rule_codes.unusable(rule_codes.INCOMPLETE if whole else rule_codes.UNEVEN)


def _tilt(aside: Vector, steps: Vector, spacing: tuple[float, ...]) -> float:
    """Degrees by which the slices are pushed sideways, 0 where it is less than half a pixel."""
    way = aside[-1] - aside[0]
    if np.abs(way / np.array(spacing[:2])).max() <= _TILT:
        return 0.0
    return float(np.degrees(np.arctan2(np.linalg.norm(way), steps.sum())))


def _even(slices: Sequence[NDArray[Any]], at: Vector, labels: bool) -> list[NDArray[Any]]:
    """Slices at whole steps: between their two neighbours linearly, labels those of the nearer."""
    made = []
    for k in range(round(float(at[-1])) + 1):
        after = int(np.searchsorted(at, k))
        if at[after] == k:
            made.append(slices[after])
            continue
        share = float((k - at[after - 1]) / (at[after] - at[after - 1]))
        below, above = slices[after - 1], slices[after]
        near = below if share <= 0.5 else above
        made.append(near if labels else (1 - share) * below + share * above)
    return made


def _moved(values: NDArray[Any], by: Vector, labels: bool) -> NDArray[Any]:
    low = 0 if labels else values.min()
    moved = ndimage.shift(values, by, order=0 if labels else 1, mode="constant", cval=float(low))
    return np.asarray(moved, values.dtype)


def _moved_back(labels: NDArray[np.uint8], by: Vector) -> NDArray[np.uint8]:
    """Labels of an upright slice where it was taken; whole pixels, so that no edge is lost."""
    rows, columns = (int(v) for v in np.rint(by))
    height, width = labels.shape
    top, left = max(0, rows), max(0, columns)
    part = labels[top : height + min(0, rows), left : width + min(0, columns)]
    moved = np.zeros_like(labels)
    down, right = max(0, -rows), max(0, -columns)
    moved[down : down + part.shape[0], right : right + part.shape[1]] = part
    return moved


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
    """Divide series by plane, size and spacing, and where places repeat by what tells them apart.

    A multi-frame file is a stack of its own, or several by what its functional groups say.
    """
    groups: dict[tuple[Any, ...], list[Header]] = {}
    for header in headers:
        uid = header.keys["seriesinstanceuid"] or str(header.path)
        own = str(header.path) if header.frames > 1 else ""
        groups.setdefault((header.patient, uid, header.shape, own), []).append(header)
    return [stack for group in groups.values() for stack in _stacks(group)]


def _stacks(group: list[Header]) -> Iterator[Stack]:
    if group[0].frames > 1:
        for numbers in _of_file(group[0]):
            yield Stack((group[0],), tuple((group[0].path, k) for k in numbers))
        return
    for plane in _planes(group, lambda one: (one.orientation, one.spacing)):
        places = [header.place for header in plane]
        for numbers in _takes(places, [header.takes for header in plane], _TIMES):
            part = tuple(plane[k] for k in numbers)
            yield Stack(part, tuple((one.path, 0) for one in part))


# Orientations and spacings are the same up to rounding: writers cut them off at some digit.

_TURNED: Final = 1e-2  # difference of two unit vectors; geometry() refuses what is not parallel
_SPACED: Final = 1e-3  # relative
_TIMES: Final = tuple(name in TIMES for name in TAKES)


def _planes(
    group: Sequence[T], plane: Callable[[T], tuple[tuple[float, ...], tuple[float, ...]]]
) -> list[list[T]]:
    """Those of one orientation and spacing together, each compared with the first of its kind."""
    known: dict[tuple[Any, ...], int] = {}
    firsts: dict[tuple[int, int], list[Vector]] = {}
    parts: dict[tuple[int, int, int], list[T]] = {}
    for one in group:
        turned, spacing = plane(one)
        kind = len(turned), len(spacing)
        if (turned, spacing) not in known:
            with np.errstate(all="ignore"):
                key = np.array([*np.divide(turned, _TURNED), *np.log(spacing) / _SPACED])
            others = firsts.setdefault(kind, [])
            near = [k for k, other in enumerate(others) if np.all(np.abs(other - key) <= 1)]
            known[turned, spacing] = near[0] if near else len(others)
            others += [] if near else [key]
        parts.setdefault((*kind, known[turned, spacing]), []).append(one)
    return list(parts.values())


# Several volumes in one place: phases, echoes, diffusion weights, times.

_SAME: Final = 0.01  # of the usual distance of two slices is the same place
_JITTER: Final = 0.01  # mm to which coordinates of one place agree


def _takes(
    places: Sequence[Place | None], takes: Sequence[tuple[str, ...]], times: Sequence[bool]
) -> list[list[int]]:
    """Slices by number, divided until no place repeats, where something tells them apart."""
    everything = list(range(len(places)))
    heights = _heights(places)
    if heights is None:
        return [everything]
    level = _levels(heights)
    return list(_divided(everything, level, takes, times))


def _heights(places: Sequence[Place | None]) -> Vector | None:
    """Of each slice along the normal of the first; None where one does not say where it lies."""
    normal = None if places[0] is None else normal_of(places[0])
    corners = [None if place is None else place.position for place in places]
    if normal is None or any(corner is None for corner in corners):
        return None
    return np.asarray(np.array(corners, np.float64) @ normal, np.float64)


def _levels(heights: Vector) -> NDArray[np.int64]:
    """The number of each height's place, from below; jitter of coordinates is no other place."""
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    largest = float(steps.max(initial=0.0))  # a gap of many slices may be among them
    real = steps[steps > min(_JITTER, _SAME * largest)]
    usual = float(np.median(real)) if real.size else 0.0
    level = np.zeros(len(heights), np.int64)
    level[order[1:]] = np.cumsum(steps > _SAME * max(usual, _ONE))
    return level


def _divided(
    slices: list[int],
    level: NDArray[np.int64],
    takes: Sequence[tuple[str, ...]],
    times: Sequence[bool],
) -> Iterator[list[int]]:
    if _repeats(slices, level):
        for number, own in enumerate(times):
            parts: dict[str, list[int]] = {}
            for k in slices:
                parts.setdefault(takes[k][number], []).append(k)
            if _tells(list(parts.values()), slices, level, contiguous=own):
                for part in parts.values():
                    yield from _divided(part, level, takes, times)
                return
        for number in (k for k, own in enumerate(times) if own):
            if (in_time := _in_time(slices, level, [one[number] for one in takes])) is not None:
                yield from in_time
                return
    yield slices


def _repeats(slices: Sequence[int], level: NDArray[np.int64]) -> int:
    return len(slices) - len(np.unique(level[list(slices)]))


def _tells(
    parts: list[list[int]], slices: list[int], level: NDArray[np.int64], *, contiguous: bool
) -> bool:
    """Whether a division makes volumes of slices in one place, and does not tear any apart.

    Some scanners number each slice as an acquisition, and take one after the other: so a number or
    time counts only where its slices follow each other without a gap.
    """
    if len(parts) < 2 or sum(_repeats(p, level) for p in parts) >= _repeats(slices, level):
        return False
    volumes = [part for part in parts if len(part) > 1]
    if 2 * sum(map(len, volumes)) < len(slices):
        return False
    every = np.unique(level[slices])
    found = [np.searchsorted(every, np.unique(level[part])) for part in volumes]
    return not contiguous or all(one[-1] - one[0] + 1 == len(one) for one in found)


def _in_time(
    slices: list[int], level: NDArray[np.int64], times: Sequence[str]
) -> list[list[int]] | None:
    """The first, second and later slice of each place, if one volume was over before the next."""
    try:
        moments = {k: float(times[k]) for k in slices}
    except ValueError:
        return None
    of_place: dict[int, list[int]] = {}
    for k in sorted(slices, key=lambda k: moments[k]):
        of_place.setdefault(int(level[k]), []).append(k)
    if len({len(one) for one in of_place.values()}) != 1:
        return None
    parts = [list(part) for part in zip(*of_place.values(), strict=True)]
    ends = [(min(moments[k] for k in p), max(moments[k] for k in p)) for p in parts]
    over = all(one[1] < other[0] for one, other in pairwise(ends))
    return parts if over and len(of_place) > 1 else None


def _of_file(header: Header) -> list[list[int]]:
    """The frames of each stack of a multi-frame file (C.7.6.16.2.2, C.7.6.16.2.4)."""
    everything = list(range(header.frames))
    try:
        with quiet():
            whole = open_dicom(header.path).header
            shared = (whole.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
            groups = list(whole.get("PerFrameFunctionalGroupsSequence") or [])
            if len(groups) < header.frames:
                return [everything]
            stacks = [_stack_id(group, shared) for group in groups[: header.frames]]
            places = [place_of(whole, k) for k in everything]
            takes = [_frame_takes(group, shared) for group in groups[: header.frames]]
    except Exception:  # whoever reads the frames meets this again, and tells
        return [everything]
    by_stack: dict[str, list[int]] = {}
    for k in everything:
        by_stack.setdefault(stacks[k], []).append(k)
    longest = max(map(len, takes))
    takes = [one + ("",) * (longest - len(one)) for one in takes]
    times = [False] * len(_FRAME_TAKES) + [True] * (longest - len(_FRAME_TAKES))
    return [
        [plane[k] for k in take]
        for numbers in by_stack.values()
        for plane in _planes(numbers, lambda k: _turned(places[k]))
        for take in _takes([places[k] for k in plane], [takes[k] for k in plane], times)
    ]


def _turned(place: Place) -> tuple[tuple[float, ...], tuple[float, ...]]:
    turned = () if place.orientation is None else tuple(map(float, place.orientation.ravel()))
    return turned, place.spacing


# Paths to attributes of a frame's functional groups.
_FRAME_TAKES: Final = (
    ("FrameContentSequence", "TemporalPositionIndex"),
    ("MREchoSequence", "EffectiveEchoTime"),
    ("MRDiffusionSequence", "DiffusionBValue"),
    (
        "MRDiffusionSequence",
        "DiffusionGradientDirectionSequence",
        "DiffusionGradientOrientation",
    ),
    ("MRImageFrameTypeSequence", "FrameType"),
    ("MRImageFrameTypeSequence", "ComplexImageComponent"),
    ("CTImageFrameTypeSequence", "FrameType"),
    ("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase"),
    ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    ("MRModifierSequence", "InversionTimes"),
    ("CTXRayDetailsSequence", "KVP"),
)


def _found(group: Dataset, shared: Dataset, path: tuple[str, ...]) -> Any:
    for owner in (group, shared):
        for name in path[:-1]:
            items = owner.get(name) or []
            owner = items[0] if len(items) else Dataset()
        if owner.get(path[-1]) is not None:
            return owner.get(path[-1])
    return None


def _stack_id(group: Dataset, shared: Dataset) -> str:
    return str(_found(group, shared, ("FrameContentSequence", "StackID")) or "")


def _frame_takes(group: Dataset, shared: Dataset) -> tuple[str, ...]:
    """What tells frames in one place apart, then the frame's time and its place in each dimension.

    Acquisitions are not told apart by number: some scanners count each frame as one.
    """
    content = "FrameContentSequence"
    index = _found(group, shared, (content, "DimensionIndexValues"))
    index = [index] if isinstance(index, int | None) else index
    own = [_found(group, shared, path) for path in _FRAME_TAKES]
    time = _found(group, shared, (content, "FrameReferenceDateTime"))
    return tuple("" if one is None else str(one) for one in (*own, time, *index))


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
        mm between slices of the volume; 0 where headers do not tell.
    gap : float
        As in :class:`Geometry`.
    repeated : tuple
        Frames that lie in one place, place by place; a volume they make only if they are the same.
    """

    reason: str = ""
    tilt: float = 0.0
    step: float = 0.0
    gap: float = 0.0
    repeated: tuple[Frames, ...] = ()


def layout(stack: Stack) -> Layout:
    """Whether a stack of slices makes a volume, and how they lie.

    Two files in one place are no reason yet: whether they are the same, only their pixels tell.
    """
    try:
        with quiet():
            places = _places(stack)
    except Exception:  # whoever reads the frames meets this again, and tells
        return Layout()
    heights = _heights(places)
    try:
        if heights is None:
            geometry(places, places[0].spacing)  # which says why
            return Layout()
        at = _of_places(heights)
        repeated = [numbers for numbers in at if len(numbers) > 1]
        found = tuple(tuple(stack.frames[k] for k in numbers) for numbers in repeated)
        if repeated and (len(stack.headers) == 1 or not _coincide(places, repeated)):
            return Layout(rule_codes.DUPLICATE_SLICES)
        if len(at) == 1 < len(places):
            return Layout(repeated=found)
        made = geometry([places[numbers[0]] for numbers in at], places[0].spacing)
        return Layout(tilt=made.tilt, step=made.step, gap=made.gap, repeated=found)
    except DataError as error:
        return Layout(rule_codes.reason_of(error))


def _of_places(heights: Vector) -> list[list[int]]:
    """The slices of each place."""
    at: dict[int, list[int]] = {}
    for k, level in enumerate(_levels(heights)):
        at.setdefault(int(level), []).append(k)
    return list(at.values())


def _coincide(places: Sequence[Place], repeated: Sequence[Sequence[int]]) -> bool:
    """Whether slices of one height have their corners in one place too."""
    corners = [[places[k].position for k in numbers] for numbers in repeated]
    return all(np.ptp(np.array(one, np.float64), axis=0).max() <= _ONE for one in corners)


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
