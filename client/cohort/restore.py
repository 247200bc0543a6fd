"""From how a sample was read, as a cohort file tells it, to what reads it again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.cohort.sources import INSTANCE, FrozenLoad, Load, Piece, Series, Source
from client.data.readers.dicom import DicomFrame, DicomVolume
from client.data.readers.dicom_mask_files import MaskFile
from client.data.readers.dicom_masks import SegmentedFrame, SegmentedSeries, SegmentedVolume
from client.data.readers.dicom_nifti import PlacedNiftiMask
from client.data.readers.nifti import NiftiImage, NiftiMask
from client.data.readers.pictures import Picture, PictureMask
from client.data.types import Sample
from client.secret import Pseudonyms
from fedward.errors import DataError


class _Instances(frozenset[str]):
    """UIDs of which only keyed hashes are known, and which can still be asked for one."""

    hashed: Pseudonyms

    def __contains__(self, uid: object) -> bool:
        return super().__contains__(self.hashed(INSTANCE, str(uid)))


@dataclass(frozen=True)
class Restorer:
    """Makes loaders again.

    Attributes
    ----------
    paths : mapping
        Where each file of the cohort lies, by the keyed hash of its path.
    digests : mapping
        SHA-256 of each file, by the same.
    series : sequence of Series
        As the cohort has them.
    dimensions : int
        Of the task.
    hashed : Pseudonyms
        For UIDs.
    archive : sequence of Sample
        Of an npz dataset: its samples, as the reader gives them.
    """

    paths: Mapping[str, Path]
    digests: Mapping[str, str]
    series: Sequence[Series]
    dimensions: int
    hashed: Pseudonyms
    archive: Sequence[Sample] = ()
    _built: dict[int, SegmentedSeries] = field(default_factory=dict)

    def image(self, source: Source) -> FrozenLoad:
        """What reads an image."""
        return FrozenLoad(self._image(source), self._content(source))

    def mask(self, source: Source) -> FrozenLoad:
        """What reads a mask."""
        return FrozenLoad(self._mask(source), self._content(source))

    def _image(self, source: Source) -> Load:
        frames = self._frames(source.pieces)
        match source.kind:
            case "volume":
                return DicomVolume(frames)
            case "frame":
                return DicomFrame(*frames[0])
            case "nifti":
                return NiftiImage(frames[0][0], self.dimensions)
            case "array":
                return self.archive[frames[0][1]].load
            case _:
                return Picture(frames[0][0])

    def _mask(self, source: Source) -> Load:
        frames = self._frames(source.pieces)
        if source.series is not None:
            series = self._series(source.series)
            return SegmentedFrame(series, *frames[0]) if frames else SegmentedVolume(series)
        if source.kind == "array":
            mask = self.archive[frames[0][1]].mask
            if mask is not None:
                return mask
        if source.kind == "placed-nifti":
            return PlacedNiftiMask(frames[0][0], frames[1:], self.dimensions)
        if source.kind == "nifti":
            if not source.beside:  # of a DICOM image, by a release that did not look at its place
                raise DataError(
                    "a frozen mask must be held against its image's place",
                    fix="Freeze the dataset again",
                )
            return NiftiMask(frames[0][0], self.dimensions, self.paths[source.beside])
        return PictureMask(frames[0][0])

    def _series(self, number: int) -> SegmentedSeries:
        # One object for all slices of a series: each holds the places of every one of them.
        if number not in self._built:
            self._built[number] = self._build(self.series[number])
        return self._built[number]

    def _build(self, series: Series) -> SegmentedSeries:
        instances = _Instances(series.instances)
        instances.hashed = self.hashed
        files = [
            MaskFile(self.paths[s.file], s.kind, s.labels, s.threshold)
            for s in series.segmentations
        ]
        return SegmentedSeries(tuple(files), self._frames(series.slices), instances)

    def _frames(self, pieces: Sequence[Piece]) -> tuple[tuple[Path, int], ...]:
        return tuple((self.paths[piece.file], piece.frame) for piece in pieces)

    def _content(self, source: Source) -> str:
        series = None if source.series is None else self.series[source.series]
        pieces = [*source.pieces, *(series.slices if series else ())]
        parts: list[object] = [source.kind, self.dimensions, self.digests.get(source.beside)]
        parts += [(self.digests[piece.file], piece.frame) for piece in pieces]
        if series is not None:
            parts += [
                (self.digests[s.file], s.kind, s.labels, s.threshold) for s in series.segmentations
            ]
            parts += series.instances
        return hashlib.sha256(repr(parts).encode()).hexdigest()
