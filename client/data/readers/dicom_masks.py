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
from pydicom.pixels.utils import pixel_array

from client.data import reasons
from client.data.decode import Place, place_of, read_place
from client.data.files import file_identity
from client.data.quiet import quiet
from client.data.readers.dicom_volumes import geometry
from fedward.plan.schema import Task

_HALF: Final = 0.5  # of the largest value of a fractional segmentation counts as foreground
_NEAR: Final = 0.25  # of a pixel that a frame may be away from its image's place

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
class SegmentedFrame:
    """Reads the label map ``(H, W)`` of one frame; 0 where no segment has a frame for it."""

    files: tuple[SegmentationFile, ...]
    path: Path
    frame: int

    def __call__(self) -> NDArray[np.uint8]:
        return _labels(self.files, read_place(self.path, self.frame), self.frame)

    def identity(self) -> str:
        """A digest of place, size and time of change of every file."""
        parts = [file_identity(f.path, f.segments) for f in self.files]
        return "".join([*parts, file_identity(self.path, self.frame)])


@dataclass(frozen=True)
class SegmentedVolume:
    """Reads the label map ``(x, y, z)`` of a series, in the grid of its volume."""

    files: tuple[SegmentationFile, ...]
    frames: Frames

    def __call__(self) -> NDArray[np.uint8]:
        places: dict[tuple[float, ...], tuple[Place, int]] = {}
        for path, frame in self.frames:
            place = read_place(path, frame)
            if place.position is None:
                raise reasons.unusable(reasons.MASK_POSITION)
            places.setdefault(tuple(np.round(place.position, 3)), (place, frame))
        kept = list(places.values())
        layout = geometry([place for place, _ in kept], kept[0][0].spacing)
        maps = [_labels(self.files, place, frame) for place, frame in kept]
        volume, _ = layout.volume(maps, labels=True)
        return np.ascontiguousarray(volume, np.uint8)

    def identity(self) -> str:
        """A digest of place, size and time of change of every file."""
        parts = [file_identity(f.path, f.segments) for f in self.files]
        return "".join([*parts, *(file_identity(path, frame) for path, frame in self.frames)])


@dataclass(frozen=True)
class _Layer:
    """One frame of a segmentation: its segment, its place, the image it says it is of."""

    segment: int
    place: Place
    source: tuple[str, int] | None


def _labels(files: Sequence[SegmentationFile], place: Place, frame: int) -> NDArray[np.uint8]:
    labels = np.zeros(place.shape, np.uint8)
    for file in files:
        header, layers = _layers(file.path, file.path.stat().st_mtime_ns)
        of_class = dict(file.segments)
        for index, layer in enumerate(layers):
            label = of_class.get(layer.segment)
            if label is None or not _is_of(layer, place, frame):
                continue
            inside = _inside(file.path, header, index)
            if inside.shape != labels.shape:
                raise reasons.unusable(reasons.MASK_SHAPE)
            # Where two segments overlap, the later class stands.
            labels = np.where(inside, np.maximum(labels, label), labels).astype(np.uint8)
    return labels


@lru_cache(maxsize=8)
def _layers(path: Path, changed: int) -> tuple[Dataset, tuple[_Layer, ...]]:
    with quiet():
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            groups = header.PerFrameFunctionalGroupsSequence
            return header, tuple(_layer(header, group, k) for k, group in enumerate(groups))
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


def _is_of(layer: _Layer, place: Place, frame: int) -> bool:
    """Whether a frame is of this image: by reference where there is one, else by place."""
    if layer.source is not None:
        if layer.source != (place.instance, frame):
            return False
        if not _same_place(layer.place, place):
            raise reasons.unusable(reasons.MASK_POSITION)
        return True
    return _has_place(layer.place) and _has_place(place) and _same_place(layer.place, place)


def _has_place(place: Place) -> bool:
    return place.position is not None and place.orientation is not None


def _same_place(one: Place, other: Place) -> bool:
    """Whether two frames share their corner and their axes; True where either does not say."""
    if not (_has_place(one) and _has_place(other)):
        return True
    near = _NEAR * min(other.spacing)
    corner = np.allclose(one.position, other.position, atol=near)  # type: ignore[arg-type]
    turned = np.allclose(one.orientation, other.orientation, atol=1e-2)  # type: ignore[arg-type]
    return bool(corner and turned)


def _inside(path: Path, header: Dataset, index: int) -> NDArray[np.bool_]:
    with quiet():
        try:
            values: NDArray[Any] = np.asarray(pixel_array(path, index=index))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a decoder's panic is no Exception
            raise reasons.unusable(reasons.NOT_READABLE) from None
    if str(header.get("SegmentationType", "")).upper() == "FRACTIONAL":
        return values >= _HALF * int(header.get("MaximumFractionalValue", 255))
    return values > 0
