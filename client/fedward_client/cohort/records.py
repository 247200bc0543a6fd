"""Records of a cohort file: how each sample is read, with keyed hashes instead of names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedward_client.data.channels import ChannelImage
from fedward_client.data.readers.dicom.masks import (
    SegmentedFrame,
    SegmentedSeries,
    SegmentedVolume,
)
from fedward_client.data.readers.dicom.nifti_masks import PlacedNiftiMask
from fedward_client.data.readers.dicom.reader import DicomFrame, DicomVolume
from fedward_client.data.readers.images import Picture, PictureMask
from fedward_client.data.readers.nifti import NiftiImage, NiftiMask
from fedward_client.data.readers.npz import ArrayImage, ArrayMask
from fedward_client.data.sample import Sample
from fedward_client.secret import Pseudonyms

Load = Callable[[], Any]
INSTANCE: Final = "sopinstanceuid"


class Record(BaseModel):
    """Base of what a cohort file holds: nothing unknown inside, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Piece(Record):
    """A frame of a file, or a place in an archive."""

    file: str = Field(description="keyed hash of the file's path")
    frame: int = Field(default=0, ge=0)


class Segments(Record):
    """A DICOM segmentation or structure set and which of its segments is which class."""

    file: str
    kind: Literal["segmentation", "contours"]
    labels: tuple[tuple[int, int], ...]
    threshold: float = Field(gt=0, le=1, description="at which a fractional segment counts")


class Series(Record):
    """A stack of slices with its segmentations."""

    slices: tuple[Piece, ...]
    segmentations: tuple[Segments, ...]
    instances: tuple[str, ...] = Field(description="keyed hashes of SOPInstanceUIDs")


class Source(Record):
    """What an image or a mask is read from."""

    kind: Literal[
        "frame",
        "volume",
        "nifti",
        "placed-nifti",
        "picture",
        "array",
        "segmented-frame",
        "segmented-volume",
        "channels",
    ]
    pieces: tuple[Piece, ...] = Field(
        default=(), description="a NIfTI mask of a DICOM image: the mask, then the image's frames"
    )
    series: int | None = Field(default=None, description="place in the cohort's list of series")
    parts: tuple[ChannelRecord, ...] = Field(default=(), description="of named channels")
    beside: str = Field(
        default="",
        description="NIfTI masks of NIfTI images: the image in whose place they lie; masks in "
        "pictures: the image whose size they are resized to",
    )


class ChannelRecord(Record):
    """A named channel, and the plane of what it is read from."""

    name: str
    plane: int = Field(ge=0)
    source: Source


@dataclass(frozen=True)
class FrozenLoad:
    """Reads an image or a mask of a frozen cohort.

    Attributes
    ----------
    load : callable
        What reads it.
    content : str
        Digest of the files' content and of how they are read, wherever they lie.
    """

    load: Load
    content: str

    def __call__(self) -> Any:
        return self.load()

    def identity(self) -> str:
        """The digest."""
        return self.content


def files_of(sample: Sample, root: Path) -> tuple[Path, ...]:
    """The files that a sample's image and mask are read from, without repetition."""
    found = [path for part in (sample.load, sample.mask) if part for path in _files(part, root)]
    return tuple(dict.fromkeys(found))


def _files(part: Load, root: Path) -> list[Path]:
    match part:
        case FrozenLoad():
            return _files(part.load, root)
        case ChannelImage():
            return [path for one in part.parts for path in _files(one.load, root)]
        case ArrayImage() | ArrayMask():
            return [_archive(root)]
        case DicomVolume():
            return [path for path, _ in part.frames]
        case SegmentedVolume() | SegmentedFrame():
            return [f.path for f in part.series.files] + [path for path, _ in part.series.frames]
        case PlacedNiftiMask():
            return [part.path, *(path for path, _ in part.frames)]
        case NiftiMask():
            return [part.path, *([part.image] if part.image else [])]
        case PictureMask():
            return [part.path, *([part.image] if part.image else [])]
        case DicomFrame() | NiftiImage() | Picture():
            return [part.path]
    raise TypeError("a loader of no known kind")


def _archive(root: Path) -> Path:
    return root if root.is_file() else min(root.glob("*.npz"))


@dataclass
class Recorder:
    """Writes down how samples are read.

    Attributes
    ----------
    name : callable
        From a file to the keyed hash of its path.
    root : Path
        The dataset.
    hashed : Pseudonyms
        For whatever else names somebody.
    series : dict
        The series met so far, and each one's number.
    """

    name: Callable[[Path], str]
    root: Path
    hashed: Pseudonyms
    series: dict[SegmentedSeries, int] = field(default_factory=dict)

    def source(self, part: Load, place: int) -> Source:
        """How one image or mask is read; `place` is the sample's in an archive."""
        match part:
            case ChannelImage():
                records = (
                    ChannelRecord(
                        name=one.name, plane=one.plane, source=self.source(one.load, place)
                    )
                    for one in part.parts
                )
                return Source(kind="channels", parts=tuple(records))
            case ArrayImage() | ArrayMask():
                return Source(kind="array", pieces=(self._piece(_archive(self.root), place),))
            case DicomVolume():
                return Source(kind="volume", pieces=self._pieces(part.frames))
            case DicomFrame():
                return Source(kind="frame", pieces=(self._piece(part.path, part.frame),))
            case SegmentedVolume():
                return Source(kind="segmented-volume", series=self._number(part.series))
            case SegmentedFrame():
                one = (self._piece(part.path, part.frame),)
                return Source(kind="segmented-frame", pieces=one, series=self._number(part.series))
            case PlacedNiftiMask():
                pieces = (self._piece(part.path), *self._pieces(part.frames))
                return Source(kind="placed-nifti", pieces=pieces)
            case NiftiMask():
                beside = self.name(part.image) if part.image else ""
                return Source(kind="nifti", pieces=(self._piece(part.path),), beside=beside)
            case NiftiImage():
                return Source(kind="nifti", pieces=(self._piece(part.path),))
            case PictureMask():
                beside = self.name(part.image) if part.image else ""
                return Source(kind="picture", pieces=(self._piece(part.path),), beside=beside)
            case Picture():
                return Source(kind="picture", pieces=(self._piece(part.path),))
        raise TypeError("a loader of no known kind")

    def all_series(self) -> tuple[Series, ...]:
        """Every series that a source refers to, in the order of their numbers."""
        return tuple(
            Series(
                slices=self._pieces(one.frames),
                segmentations=tuple(
                    Segments(
                        file=self.name(f.path), kind=f.kind, labels=f.labels, threshold=f.threshold
                    )
                    for f in one.files
                ),
                instances=tuple(sorted(self.hashed(INSTANCE, uid) for uid in one.instances)),
            )
            for one in self.series
        )

    def _piece(self, path: Path, frame: int = 0) -> Piece:
        return Piece(file=self.name(path), frame=frame)

    def _pieces(self, frames: Sequence[tuple[Path, int]]) -> tuple[Piece, ...]:
        return tuple(self._piece(path, frame) for path, frame in frames)

    def _number(self, series: SegmentedSeries) -> int:
        return self.series.setdefault(series, len(self.series))
