"""DICOM segmentations as label maps of the images that they refer to (PS3.3, A.51 and C.8.20)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from client.data import reasons
from client.data.decode import Place, place_of, read_place
from client.data.files import file_identity
from client.data.quiet import quiet
from client.data.readers.dicom_files import check_inflated
from client.data.readers.dicom_volumes import geometry
from client.data.stored import check_length, open_dicom, stored_values
from fedward.plan.schema import Task

_HALF: Final = 0.5  # of the largest value of a fractional segmentation counts as foreground
_NEAR: Final = 0.25  # of a pixel that a frame may be away from its image's place
_PARALLEL: Final = 0.999  # cosine of the normals of two planes that count as parallel

Segments = tuple[tuple[int, int], ...]
Frames = tuple[tuple[Path, int], ...]


@dataclass(frozen=True)
class SegmentationFile:
    """A segmentation that serves the task.

    Attributes
    ----------
    path : Path
        The file.
    series : str
        SeriesInstanceUID of the images it refers to.
    segments : tuple
        Pairs of a segment's number and its label, 1 being the task's first class.
    """

    path: Path
    series: str
    segments: Segments


def read_segmentation(path: Path, task: Task) -> SegmentationFile:
    """What a segmentation is of, without its pixels.

    A segment is the class of its label (any case); where nothing matches, the only segment of a
    file is the only class of a task.

    Raises
    ------
    DataError
        "unknown class in mask", or "not readable".
    """
    with quiet():
        try:
            check_inflated(path)
            header = pydicom.dcmread(path, stop_before_pixels=True)
            series = str(header.ReferencedSeriesSequence[0].SeriesInstanceUID)
            found = [(int(s.SegmentNumber), str(s.SegmentLabel)) for s in header.SegmentSequence]
        except Exception as error:
            raise reasons.unusable(reasons.reason_of(error)) from None
    names = [name.lower() for name in task.classes]
    matched = [(n, names.index(t.strip().lower()) + 1) for n, t in found if _known(t, names)]
    if not matched and len(found) == len(names) == 1:
        matched = [(found[0][0], 1)]
    if not matched:
        raise reasons.unusable(reasons.MASK_CLASS)
    return SegmentationFile(path, series, tuple(matched))


def _known(label: str, names: Sequence[str]) -> bool:
    return label.strip().lower() in names


@dataclass(frozen=True)
class SegmentedSeries:
    """The segmentations of a stack of slices, and the slices.

    Attributes
    ----------
    files : tuple of SegmentationFile
        All that refer to the series.
    frames : tuple
        File and frame of each slice of the stack.
    instances : frozenset of str
        SOPInstanceUIDs of the whole series: a frame made from one of these is of no other.
    """

    files: tuple[SegmentationFile, ...]
    frames: Frames
    instances: frozenset[str]

    def identity(self) -> str:
        """A digest of place, size and time of change of every file."""
        parts = [file_identity(f.path, f.segments) for f in self.files]
        return "".join([*parts, *(file_identity(path, frame) for path, frame in self.frames)])


@dataclass(frozen=True)
class SegmentedFrame:
    """Reads the label map ``(H, W)`` of one frame; 0 where no segment has a frame for it."""

    series: SegmentedSeries
    path: Path
    frame: int

    def __call__(self) -> NDArray[np.uint8]:
        series = self.series
        parts = _aligned(series, series.identity())
        return _labels(parts, series.frames.index((self.path, self.frame)))

    def identity(self) -> str:
        """A digest of place, size and time of change of every file."""
        return self.series.identity() + file_identity(self.path, self.frame)


@dataclass(frozen=True)
class SegmentedVolume:
    """Reads the label map ``(x, y, z)`` of a series, in the grid of its volume."""

    series: SegmentedSeries

    def __call__(self) -> NDArray[np.uint8]:
        parts = _aligned(self.series, self.series.identity())
        kept: dict[tuple[float, ...], int] = {}
        for number, place in enumerate(parts.places):
            if place.position is None:
                raise reasons.unusable(reasons.MASK_POSITION)
            kept.setdefault(tuple(np.round(place.position, 3)), number)
        chosen = list(kept.values())
        places = [parts.places[k] for k in chosen]
        layout = geometry(places, places[0].spacing)
        volume, _ = layout.volume([_labels(parts, k) for k in chosen], labels=True)
        return np.ascontiguousarray(volume, np.uint8)

    def identity(self) -> str:
        """A digest of place, size and time of change of every file."""
        return self.series.identity()


@dataclass(frozen=True)
class _Layer:
    """One frame of a segmentation: its segment, its place, the image it says it is of."""

    segment: int
    place: Place
    source: tuple[str, int] | None


@dataclass(frozen=True)
class _Aligned:
    """For each slice, in the order of the series' frames: file, frame in it, and label."""

    places: tuple[Place, ...]
    parts: tuple[tuple[tuple[Path, int, int], ...], ...]


@lru_cache(maxsize=4)
def _aligned(series: SegmentedSeries, changed: str) -> _Aligned:
    """Find the slice of every frame.

    Raises
    ------
    DataError
        "position of mask differs": a frame lies in the plane of a slice but not on it, or no
        frame belongs to any slice; an empty mask would be taken for a healthy patient.
    """
    places = tuple(read_place(path, frame) for path, frame in series.frames)
    found: list[list[tuple[Path, int, int]]] = [[] for _ in places]
    for file in series.files:
        of_class = dict(file.segments)
        for index, layer in enumerate(_layers(file.path, file.path.stat().st_mtime_ns)):
            label = of_class.get(layer.segment)
            if label is None:
                continue
            for number in _slices_of(layer, places, series):
                found[number].append((file.path, index, label))
    if not any(found):
        raise reasons.unusable(reasons.MASK_POSITION)
    return _Aligned(places, tuple(map(tuple, found)))


def _slices_of(layer: _Layer, places: tuple[Place, ...], series: SegmentedSeries) -> list[int]:
    """The slices that a frame is of: by the image it names if that is here, else by place."""
    named = layer.source is not None and layer.source[0] in series.instances
    found = [
        number
        for number, (place, (_, frame)) in enumerate(zip(places, series.frames, strict=True))
        if (layer.source == (place.instance, frame) if named else _in_plane(layer.place, place))
    ]
    for number in found:
        if not (_same_place(layer.place, places[number], must_say=not named)):
            raise reasons.unusable(reasons.MASK_POSITION)
    return found


def _in_plane(one: Place, other: Place) -> bool:
    """Whether a frame lies in the plane of a slice, wherever in it and however turned."""
    if one.position is None or other.position is None or other.orientation is None:
        return False
    normal = np.cross(other.orientation[0], other.orientation[1])
    if one.orientation is not None:
        turned = np.cross(one.orientation[0], one.orientation[1])
        if abs(float(turned @ normal)) < _PARALLEL:
            return False
    away = abs(float((one.position - other.position) @ normal))
    return away <= _NEAR * min(other.spacing)


def _labels(aligned: _Aligned, number: int) -> NDArray[np.uint8]:
    shape = aligned.places[number].shape
    labels = np.zeros(shape, np.uint8)
    for path, index, label in aligned.parts[number]:
        inside = _inside(path, index)
        if inside.shape != shape:
            raise reasons.unusable(reasons.MASK_SHAPE)
        # Where two segments overlap, the later class stands.
        labels = np.where(inside, np.maximum(labels, label), labels).astype(np.uint8)
    return labels


@lru_cache(maxsize=8)
def _layers(path: Path, changed: int) -> tuple[_Layer, ...]:
    with quiet():
        try:
            check_inflated(path)
            whole = pydicom.dcmread(path)
            check_length(whole)
            groups = whole.PerFrameFunctionalGroupsSequence
            return tuple(_layer(whole, group, k) for k, group in enumerate(groups))
        except Exception:
            raise reasons.unusable(reasons.NOT_READABLE) from None


def _layer(header: Dataset, group: Dataset, index: int) -> _Layer:
    shared = header.SharedFunctionalGroupsSequence[0]
    owner = group if "SegmentIdentificationSequence" in group else shared
    number = int(owner.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
    return _Layer(number, place_of(header, index), _source(group))


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


def _has_place(place: Place) -> bool:
    return place.position is not None and place.orientation is not None


def _same_place(one: Place, other: Place, *, must_say: bool) -> bool:
    """Whether two frames share corner, axes and spacing; `must_say`: both have to tell."""
    if not (_has_place(one) and _has_place(other)):
        return not must_say
    near = _NEAR * min(other.spacing)
    corner = np.allclose(one.position, other.position, atol=near)  # type: ignore[arg-type]
    turned = np.allclose(one.orientation, other.orientation, atol=1e-2)  # type: ignore[arg-type]
    return bool(corner and turned and np.allclose(one.spacing, other.spacing, rtol=1e-2))


def _inside(path: Path, index: int) -> NDArray[np.bool_]:
    with quiet():
        try:
            opened = open_dicom(path)
            values: NDArray[Any] = stored_values(opened, index)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a decoder's panic is no Exception
            raise reasons.unusable(reasons.NOT_READABLE) from None
    header = opened.header
    if str(header.get("SegmentationType", "")).upper() == "FRACTIONAL":
        return values >= _HALF * int(header.get("MaximumFractionalValue", 255))
    return values > 0
