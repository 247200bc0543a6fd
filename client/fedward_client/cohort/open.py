"""Open a frozen cohort after verifying that its files are unchanged."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedward.errors import DataError, OutputError
from fedward.plan.schema import Task
from fedward.rule_codes import RuleCode
from fedward_client.cohort.freeze import CohortFile, FileRecord, Item, cohorts_folder, load, save
from fedward_client.cohort.records import INSTANCE, FrozenLoad, Load, Piece, Series, Source
from fedward_client.config import SiteConfig
from fedward_client.data.channels import ChannelImage, Part
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.files import find
from fedward_client.data.options import BoxOptions
from fedward_client.data.readers.dicom.mask_references import MaskFile
from fedward_client.data.readers.dicom.masks import SegmentedFrame, SegmentedSeries, SegmentedVolume
from fedward_client.data.readers.dicom.nifti_masks import PlacedNiftiMask
from fedward_client.data.readers.dicom.reader import DicomFrame, DicomVolume
from fedward_client.data.readers.images import Picture, PictureMask
from fedward_client.data.readers.nifti import NiftiImage, NiftiMask
from fedward_client.data.readers.registry import READERS
from fedward_client.data.sample import Dataset, Sample
from fedward_client.index.extract import Extractor
from fedward_client.secret import Pseudonyms

# From how a sample was read, as a cohort file tells it, to what reads it again.


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
        return FrozenLoad(self._image(source), self.content(source))

    def mask(self, source: Source) -> FrozenLoad:
        """What reads a mask."""
        return FrozenLoad(self._mask(source), self.content(source))

    def _image(self, source: Source) -> Load:
        frames = self._frames(source.pieces)
        match source.kind:
            case "channels":
                parts = (Part(one.name, self._image(one.source), one.plane) for one in source.parts)
                return ChannelImage(tuple(parts))
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
                    RuleCode.MASK_PLACE,
                    fix="Freeze the dataset again",
                )
            return NiftiMask(frames[0][0], self.dimensions, self.paths[source.beside])
        return PictureMask(frames[0][0], self.paths[source.beside] if source.beside else None)

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

    def content(self, source: Source) -> str:
        """Digest of the files' content and of how they are read, wherever they lie."""
        series = None if source.series is None else self.series[source.series]
        pieces = [*source.pieces, *(series.slices if series else ())]
        parts: list[object] = [source.kind, self.dimensions, self.digests.get(source.beside)]
        parts += [(self.digests[piece.file], piece.frame) for piece in pieces]
        parts += [(one.name, one.plane, self.content(one.source)) for one in source.parts]
        if series is not None:
            parts += [
                (self.digests[s.file], s.kind, s.labels, s.threshold) for s in series.segmentations
            ]
            parts += series.instances
        return hashlib.sha256(repr(parts).encode()).hexdigest()


_CHUNK: Final = 1 << 20
_HASH: Final = re.compile(r"[0-9a-f]{4,64}")
_THREADS: Final = 4  # SHA-256 lets go of Python's lock; more would only wait for the disk


@dataclass(frozen=True)
class FrozenCohort:
    """A cohort to train on.

    Attributes
    ----------
    name : str
        The dataset's and the start of the hash.
    sha256 : str
        Of the content.
    task : Task
        What its labels are for.
    dataset : Dataset
        Samples, whose patients are keyed hashes and whose identities are of content alone.
    rehashed : int
        Files that were read again because their times or sizes had changed.
    root : Path
        Of the dataset.
    stamps : mapping
        Files with the size and the times with which their content was found right.
    """

    name: str
    sha256: str
    task: Task
    dataset: Dataset
    rehashed: int
    root: Path
    stamps: Mapping[Path, tuple[int, int, int]]

    def verify(self) -> None:
        """Look again whether every file is as it was when the cohort was opened.

        Raises
        ------
        DataError
            One is not.
        """
        changed = sum(not _is_as(path, stamp) for path, stamp in self.stamps.items())
        if changed:
            raise DataError(
                RuleCode.COHORT_STILL,
                value=f"of {len(self.stamps)} files {changed} changed",
                fix="Start again",
                where=self.name,
            )


def open_cohort(
    config: SiteConfig, name: str, which: str = "latest", *, secret: bytes
) -> FrozenCohort:
    """Open a frozen cohort and make sure that nothing of it has changed.

    Parameters
    ----------
    config : SiteConfig
        The site.
    name : str
        The dataset.
    which : str
        The start of the cohort's hash (4 digits or more), or "latest".
    secret : bytes
        The site's.

    Raises
    ------
    DataError
        There is no such cohort, or a file of it is gone or has another byte.
    """
    cohort = load(cohort_path(config.site.state, name, which))
    extract = Extractor(config.dataset(name).root, cohort.format, secret)
    paths, now = _verify(cohort, extract)
    if now != cohort.files:
        _remember(cohort, now, config.site.state)
    restorer = Restorer(
        paths,
        {key: record.sha256 for key, record in cohort.files.items()},
        cohort.series,
        cohort.task.dimensions,
        Pseudonyms(secret),
        _archive(cohort, extract.root),
    )
    samples = tuple(_sample(item, restorer, not cohort.per_image) for item in cohort.items)
    again = sum(now[key] != record for key, record in cohort.files.items())
    stamps = {paths[key]: (one.size, one.modified, one.changed) for key, one in now.items()}
    return FrozenCohort(
        cohort.name, cohort.sha256, cohort.task, Dataset(samples), again, extract.root, stamps
    )


def cohort_path(state: Path, name: str, which: str = "latest") -> Path:
    """The record of a frozen cohort of a dataset.

    Parameters
    ----------
    state : Path
        The site's state folder.
    name : str
        The dataset.
    which : str
        The start of the cohort's hash (4 digits or more), or "latest".

    Raises
    ------
    DataError
        There is no such cohort, or more than one.
    """
    if which != "latest" and not _HASH.fullmatch(which):
        raise DataError(
            'a cohort is named by "latest" or the start of its hash',
            value=which[:70],
            where=name,
            fix="Give 4 to 64 of its hexadecimal digits",
        )
    start = "" if which == "latest" else which[:12]
    of_name = re.compile(re.escape(f"{name}-{start}") + r"[0-9a-f]*\.json")
    folder = cohorts_folder(state)
    found = [p for p in folder.iterdir() if of_name.fullmatch(p.name)]
    if len(which) > 12:
        found = [path for path in found if load(path).sha256.startswith(which)]
    if not found:
        raise DataError(RuleCode.COHORT_FROZEN, fix="Freeze it", where=name)
    if which != "latest" and len(found) > 1:
        raise DataError("a hash must mean one cohort", fix="Give more digits", where=name)
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def _verify(
    cohort: CohortFile, extract: Extractor
) -> tuple[dict[str, Path], dict[str, FileRecord]]:
    """Where the cohort's files lie, and what they are now."""
    paths = _places(cohort.files, extract)
    with ThreadPoolExecutor(_THREADS) as pool:
        keys = list(paths)
        found = pool.map(lambda key: _look(paths[key], cohort.files[key]), keys)
        now = {key: record for key, record in zip(keys, found, strict=True) if record}
    gone = len(cohort.files) - len(paths)
    changed = len(paths) - len(now)
    if gone or changed:
        raise DataError(
            RuleCode.COHORT_CHANGED,
            value=f"of {len(cohort.files)} files {changed} changed, {gone} gone",
            fix="Freeze it again, or restore the files",
            where=cohort.name,
        )
    return paths, now


def _places(wanted: Mapping[str, FileRecord], extract: Extractor) -> dict[str, Path]:
    root = extract.root
    files: Iterable[Path] = [root] if root.is_file() else find(root)
    named = ((extract.name(path), path) for path in files)
    return {name: path for name, path in named if name in wanted}


def _look(path: Path, known: FileRecord) -> FileRecord | None:
    """The file as it is, read again only where its times or size differ; None: other content."""
    try:
        now = _stamp(path)
        if now == (known.size, known.modified, known.changed):
            return known
        if now[0] != known.size or _digest(path) != known.sha256 or _stamp(path) != now:
            return None
    except OSError:
        return None
    return FileRecord(sha256=known.sha256, size=now[0], modified=now[1], changed=now[2])


def _is_as(path: Path, stamp: tuple[int, int, int]) -> bool:
    try:
        return _stamp(path) == stamp
    except OSError:
        return False


def _stamp(path: Path) -> tuple[int, int, int]:
    info = path.stat()
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _remember(cohort: CohortFile, now: dict[str, FileRecord], state: Path) -> None:
    """So that a tree that was copied is read whole once, not at every start."""
    path = cohorts_folder(state) / f"{cohort.name}.json"
    with suppress(OutputError, OSError):  # without it the next start is slower, nothing else
        save(cohort.model_copy(update={"files": now}), state, modified=path.stat().st_mtime_ns)


def _archive(cohort: CohortFile, root: Path) -> tuple[Sample, ...]:
    if not READERS[cohort.format].archive:
        return ()
    boxes = BoxOptions(source="masks")  # all that an archive can tell of boxes
    return read_dataset(DatasetSpec(root, cohort.format, boxes=boxes), cohort.task).samples


def _sample(item: Item, restorer: Restorer, patient_known: bool) -> Sample:
    return Sample(
        item.patient,
        restorer.image(item.image),
        item.label,
        mask=restorer.mask(item.mask) if item.mask is not None else None,
        boxes=item.boxes,
        split=item.split,
        columns=item.columns
        | {name: "yes" for name in ("synthetic", "tilted", "uneven") if getattr(item, name)},
        patient_known=patient_known,
    )
