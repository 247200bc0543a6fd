"""DICOM segmentations and contours as label maps of the images that they reference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.errors import DataError
from fedward_client.data.files import file_identity
from fedward_client.data.readers.dicom.mask_references import MaskFile
from fedward_client.data.readers.dicom.pixels import Place, read_place
from fedward_client.data.readers.dicom.rtstruct import contour_parts
from fedward_client.data.readers.dicom.segmentation import Part, segment_parts
from fedward_client.data.readers.dicom.series import Slices, geometry

Frames = tuple[tuple[Path, int], ...]


@dataclass(frozen=True)
class SegmentedSeries:
    """The segmentations of a stack of slices, and the slices.

    Attributes
    ----------
    files : tuple of MaskFile
        All that are of the series.
    frames : tuple
        File and frame of each slice of the stack.
    instances : frozenset of str
        SOPInstanceUIDs of the whole series: what was made from one of these is of no other.
    """

    files: tuple[MaskFile, ...]
    frames: Frames
    instances: frozenset[str]

    def identity(self) -> str:
        """A digest of place, size and time of change of every file, when first asked for.

        Kept, since every slice of the series asks; whoever reads a dataset again asks anew.
        """
        kept: str | None = self.__dict__.get("_identity")
        if kept is None:
            files = {path: file_identity(path) for path in dict(self.frames)}
            parts = [f.identity() for f in self.files]
            parts += [f"{files[path]} {frame}" for path, frame in self.frames]
            kept = hashlib.sha256("\n".join(parts).encode()).hexdigest()
            object.__setattr__(self, "_identity", kept)
        return kept

    def __getstate__(self) -> dict[str, Any]:
        self.identity()  # another process must not look at every file again for each slice
        return self.__dict__


@dataclass(frozen=True)
class SegmentedFrame:
    """Reads the label map ``(H, W)`` of one frame; 0 where nothing is marked on it."""

    series: SegmentedSeries
    path: Path
    frame: int

    def __call__(self) -> NDArray[np.uint8]:
        found = _align(self.series)
        return found.labels(found.numbers[self.path, self.frame])

    def identity(self) -> str:
        """A digest of place, size and time of change of every file."""
        return f"{self.series.identity()} {file_identity(self.path, self.frame)}"


@dataclass(frozen=True)
class SegmentedVolume:
    """Reads the label map ``(x, y, z)`` of a series, in the grid of its volume."""

    series: SegmentedSeries

    def __call__(self) -> NDArray[np.uint8]:
        found = _align(self.series)
        kept: dict[tuple[float, ...], int] = {}
        for number, place in enumerate(found.places):
            if place.position is None:
                raise rule_codes.unusable(rule_codes.MASK_POSITION)
            kept.setdefault(tuple(np.round(place.position, 3)), number)
        chosen = list(kept.values())
        places = [found.places[k] for k in chosen]
        layout = geometry(places, places[0].spacing)
        volume, _ = layout.volume([found.labels(k) for k in chosen], labels=True)
        return np.ascontiguousarray(volume, np.uint8)

    def identity(self) -> str:
        """A digest of place, size and time of change of every file."""
        return self.series.identity()


@dataclass(frozen=True)
class _Asked:
    """A series, compared by its identity alone: that is quick, and another process has a copy."""

    identity: str
    series: SegmentedSeries = field(compare=False)


@dataclass(frozen=True)
class _Aligned:
    """Where each slice lies, in the order of the series' frames, and what is marked on it."""

    places: tuple[Place, ...]
    numbers: Mapping[tuple[Path, int], int]
    parts: tuple[tuple[Part, ...], ...]

    def labels(self, number: int) -> NDArray[np.uint8]:
        """The label map of a slice."""
        place = self.places[number]
        labels = np.zeros(place.shape, np.uint8)
        for part in self.parts[number]:
            # Where two classes overlap, the later one stands.
            np.maximum(labels, part.labels(place), out=labels)
        return labels


def _align(series: SegmentedSeries) -> _Aligned:
    """Find the slice of every frame and contour.

    Raises
    ------
    DataError
        Of the parts; and "position of mask differs": none belongs to any slice. An empty mask
        would be taken for a healthy patient.
    """
    found = _outcome(_Asked(series.identity(), series))
    if isinstance(found, str):
        raise rule_codes.unusable(found)
    return found


@lru_cache(maxsize=4)
def _outcome(asked: _Asked) -> _Aligned | str:
    # A failure is kept as well: every slice of the series would look for it again.
    try:
        return _find(asked.series)
    except DataError as error:
        return rule_codes.reason_of(error)


def _find(series: SegmentedSeries) -> _Aligned:
    places = [read_place(path, frame) for path, frame in series.frames]
    slices = Slices(places, series.frames)
    found: list[list[Part]] = [[] for _ in places]
    for file in series.files:
        for number, part in _parts(file, slices, series.instances):
            found[number].append(part)
    if not any(found):
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    numbers = {frame: k for k, frame in enumerate(series.frames)}
    return _Aligned(tuple(places), numbers, tuple(map(tuple, found)))


def _parts(file: MaskFile, slices: Slices, instances: frozenset[str]) -> Iterator[tuple[int, Part]]:
    if file.kind == "contours":
        yield from contour_parts(file, slices, instances)
    else:
        yield from segment_parts(file, slices, instances)
