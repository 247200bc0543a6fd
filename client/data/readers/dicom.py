"""Trees of DICOM files, as an archive exports them.

Files are found by what they are, not by suffix. Labels come from ``labels.csv``, keyed by one of
SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID, AccessionNumber, PatientID or file (or from
``labels.xlsx``); masks from ``masks/`` (PNG or NIfTI, named by the image's file stem or
SOPInstanceUID; volumes by series UID) or from DICOM segmentations anywhere in the tree. In a 2D
task each frame is an image; in a 3D task each stack of slices of a series is a volume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.data import reasons
from client.data.decode import read_frame
from client.data.files import file_identity, stem, table_keys, walk
from client.data.readers.dicom_files import is_dicom
from client.data.readers.dicom_headers import KEYS, Header, read_headers
from client.data.readers.dicom_masks import (
    SegmentationFile,
    SegmentedFrame,
    SegmentedSeries,
    SegmentedVolume,
    read_segmentation,
)
from client.data.readers.dicom_volumes import stack
from client.data.readers.nifti import NiftiMask, is_nifti
from client.data.readers.pictures import PictureMask, is_picture
from client.data.tables import Entry, Table, read_table
from client.data.types import Dataset, Image, LeftOut, Sample
from fedward.errors import DataError
from fedward.plan.schema import Task

_TABLES: Final = ("labels.csv", "labels.xlsx", "patients.csv")
Frames = tuple[tuple[Path, int], ...]


@dataclass(frozen=True)
class DicomFrame:
    """Reads one frame."""

    path: Path
    frame: int = 0

    def __call__(self) -> Image:
        return read_frame(self.path, self.frame).image

    def identity(self) -> str:
        """A digest of place, size and time of change."""
        return file_identity(self.path, self.frame)


@dataclass(frozen=True)
class DicomVolume:
    """Reads a series as a volume: sorted by position, turned to RAS like a NIfTI image."""

    frames: Frames

    def __call__(self) -> Image:
        return stack([read_frame(path, frame) for path, frame in self.frames])

    def identity(self) -> str:
        """A digest of place, size and time of change of every file."""
        return "".join(file_identity(path, frame) for path, frame in self.frames)


def read(root: Path, task: Task) -> Dataset:
    """Read a DICOM tree.

    Raises
    ------
    DataError
        A classification task finds no table of labels, a segmentation task no masks of any kind.
    """
    base = root / "images" if (root / "images").is_dir() else root
    files = [f for f in walk(base, without=("masks",)) if f.name not in _TABLES]
    headers, found, left_out = read_headers(files, root, task)
    masks = _masks(root, task, found, left_out)
    samples: list[Sample] = []
    for name, item in _items(root, base, headers, masks, task):
        if isinstance(item, Sample):
            samples.append(item)
        else:
            left_out.append(LeftOut(item, name))
    return Dataset(tuple(samples), tuple(left_out))


@dataclass(frozen=True)
class _Masks:
    """Mask files by name, and segmentations by the series that they refer to."""

    named: dict[str, Path]
    segmented: dict[str, tuple[SegmentationFile, ...]]


def _items(
    root: Path, base: Path, headers: list[Header], masks: _Masks, task: Task
) -> Iterator[tuple[str, Sample | str]]:
    table = _table(root, task)
    keys = table_keys([h.path for h in headers], (root, base))
    stacks = _series(headers) if task.dimensions == 3 or masks.segmented else []
    series = _segmented_series(stacks, masks)
    groups = [(h,) for h in headers] if task.dimensions == 2 else stacks
    for group in groups:
        first = group[0]
        name = first.path.relative_to(root).as_posix()
        if table is not None:
            yield from ((name, item) for item in _labelled(group, keys, table, task))
        else:
            yield from ((name, item) for item in _masked(group, masks, series, task))


def _series(headers: list[Header]) -> list[tuple[Header, ...]]:
    """The slices of each volume: a series may hold several stacks, in other planes or times."""
    groups: dict[tuple[str, ...], list[Header]] = {}
    for header in headers:
        uid = header.keys["seriesinstanceuid"] or str(header.path)
        # A multi-frame object is a stack of its own.
        own = str(header.path) if header.frames > 1 else ""
        groups.setdefault((header.patient, uid, header.plane, own), []).append(header)
    return [part for group in groups.values() for part in _takes(group)]


def _takes(group: list[Header]) -> Iterator[tuple[Header, ...]]:
    # Some scanners number each slice as an acquisition, so it counts only where places repeat.
    places = [header.position for header in group if header.position]
    if len(set(places)) == len(places) or len({header.take for header in group}) == 1:
        yield tuple(group)
        return
    takes: dict[str, list[Header]] = {}
    for header in group:
        takes.setdefault(header.take, []).append(header)
    yield from (tuple(take) for take in takes.values())


def _table(root: Path, task: Task) -> Table | None:
    if task.kind == "segmentation":
        return None
    table = next((root / n for n in _TABLES[:2] if (root / n).is_file()), None)
    if table is None:
        raise DataError(
            "DICOM files for classification need a labels.csv or labels.xlsx",
            fix="Write one with a column PatientID, StudyInstanceUID, SeriesInstanceUID, "
            "SOPInstanceUID, AccessionNumber or file, and a column label",
        )
    return read_table(table, KEYS, task)


def _masks(root: Path, task: Task, found: list[Path], left_out: list[LeftOut]) -> _Masks:
    if task.kind == "classification":
        return _Masks({}, {})
    inside = walk(root / "masks") if (root / "masks").is_dir() else []
    named = {stem(f): f for f in inside if is_picture(f) or is_nifti(f)}
    objects = [*found, *(f for f in inside if f not in named.values() and is_dicom(f))]
    segmented: dict[str, tuple[SegmentationFile, ...]] = {}
    for path in objects:
        try:
            one = read_segmentation(path, task)
            segmented[one.series] = (*segmented.get(one.series, ()), one)
        except DataError as error:
            left_out.append(LeftOut(reasons.reason_of(error), path.relative_to(root).as_posix()))
    if not named and not objects:
        raise DataError(
            "DICOM files for segmentation need masks",
            fix="Put PNG or NIfTI masks named by file stem or SOPInstanceUID into a folder masks, "
            "or DICOM segmentations anywhere",
        )
    return _Masks(named, segmented)


def _frames(group: tuple[Header, ...]) -> Frames:
    return tuple((h.path, k) for h in group for k in range(h.frames))


def _loads(group: tuple[Header, ...], task: Task) -> Iterator[DicomFrame | DicomVolume]:
    frames = _frames(group)
    if task.dimensions == 3:
        yield DicomVolume(frames)
    else:
        yield from (DicomFrame(path, frame) for path, frame in frames)


def _labelled(
    group: tuple[Header, ...], keys: dict[Path, tuple[str, ...]], table: Table, task: Task
) -> Iterator[Sample | str]:
    entries = [_entry(header, keys[header.path], table) for header in group]
    found = [e for e in entries if e is not None]
    distinct = {(e.label, e.reason) for e in found}
    if not found:
        yield reasons.NO_LABEL
    elif len(distinct) > 1:
        yield reasons.CONFLICTING
    elif found[0].label is None:
        yield found[0].reason or reasons.NO_LABEL
    else:
        entry = found[0]
        columns = entry.columns | _columns(group)
        for load in _loads(group, task):
            yield Sample(group[0].patient, load, entry.label, split=entry.split, columns=columns)


def _entry(header: Header, files: tuple[str, ...], table: Table) -> Entry | None:
    if table.column == "file":
        return table.find(files)
    value = header.keys[table.column]
    return table.find([value]) if value else None


def _columns(group: tuple[Header, ...]) -> dict[str, str]:
    return {"synthetic": "yes"} if any(h.synthetic for h in group) else {}


def _segmented_series(
    stacks: list[tuple[Header, ...]], masks: _Masks
) -> dict[Path, SegmentedSeries]:
    """The segmented stack of slices that each file belongs to."""
    found: dict[Path, SegmentedSeries] = {}
    instances: dict[str, set[str]] = {}
    for part in stacks:
        of_series = instances.setdefault(part[0].keys["seriesinstanceuid"], set())
        of_series |= {header.keys["sopinstanceuid"] for header in part}
    for part in stacks:
        uid = part[0].keys["seriesinstanceuid"]
        if uid in masks.segmented:
            one = SegmentedSeries(masks.segmented[uid], _frames(part), frozenset(instances[uid]))
            found |= dict.fromkeys([header.path for header in part], one)
    return found


def _masked(
    group: tuple[Header, ...], masks: _Masks, series: dict[Path, SegmentedSeries], task: Task
) -> Iterator[Sample | str]:
    if group[0].path in series:
        yield from _segmented(group, series[group[0].path], task)
        return
    header, volume = group[0], task.dimensions == 3
    names = (
        [header.keys["seriesinstanceuid"], header.path.parent.name]
        if volume
        else [header.keys["sopinstanceuid"], stem(header.path)]
    )
    mask = next((masks.named[name] for name in names if name in masks.named), None)
    if mask is None or (volume and not is_nifti(mask)):
        yield reasons.NO_MASK
    elif not volume and header.frames > 1:
        yield reasons.MASK_SHAPE  # one mask cannot serve several frames
    else:
        read_mask = NiftiMask(mask, task.dimensions) if is_nifti(mask) else PictureMask(mask)
        load = next(_loads(group, task))
        yield Sample(header.patient, load, mask=read_mask, columns=_columns(group))


def _segmented(
    group: tuple[Header, ...], series: SegmentedSeries, task: Task
) -> Iterator[Sample | str]:
    for load in _loads(group, task):
        mask: SegmentedVolume | SegmentedFrame
        if isinstance(load, DicomVolume):
            mask = SegmentedVolume(series)
        else:
            mask = SegmentedFrame(series, load.path, load.frame)
        yield Sample(group[0].patient, load, mask=mask, columns=_columns(group))
