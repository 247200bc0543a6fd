"""Reader for folders of DICOM files, as exported by an archive.

Files are found by what they are, not by suffix. Labels come from ``labels.csv``, keyed by one of
SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID, AccessionNumber, PatientID or file (or from
``labels.xlsx``); masks from ``masks/`` (PNG or NIfTI; see
:mod:`fedward_client.data.readers.dicom.mask_names`), from such files beside their images or from
DICOM segmentations and structure sets anywhere in the tree; boxes from a table, keyed by
SOPInstanceUID or file, from text files, or around what masks mark. In a 2D task each frame is an
image; in a 3D task each stack of slices is a volume.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.data.box_tables import BoxSource
from fedward_client.data.files import MASK_FOLDERS, file_identity, folder_of, table_keys, walk
from fedward_client.data.label_tables import Entry, Table, as_number, read_table
from fedward_client.data.mask_suffix import in_words
from fedward_client.data.one_folder import OneFolder
from fedward_client.data.options import (
    BOX_TABLES,
    TABLES,
    BoxOptions,
    LabelOptions,
    MaskOptions,
    PatientOptions,
    low,
)
from fedward_client.data.readers.dicom.headers import KEYS, Header, Listen, read_headers, unheard
from fedward_client.data.readers.dicom.kinds import ImageOptions
from fedward_client.data.readers.dicom.mask_names import by_name
from fedward_client.data.readers.dicom.mask_references import (
    MaskFile,
    link,
    of_several_readers,
    read_mask_file,
)
from fedward_client.data.readers.dicom.masks import SegmentedFrame, SegmentedSeries, SegmentedVolume
from fedward_client.data.readers.dicom.masks_beside import masks_beside
from fedward_client.data.readers.dicom.nifti_masks import PlacedNiftiMask
from fedward_client.data.readers.dicom.pixels import read_frame
from fedward_client.data.readers.dicom.series import Frames, Stack, layout, single, stack, stacks
from fedward_client.data.readers.dicom.sniff import is_dicom
from fedward_client.data.readers.images import PictureMask, is_picture
from fedward_client.data.readers.nifti import is_nifti
from fedward_client.data.sample import Dataset, Image, LeftOut, Sample

_TABLES: Final = (*TABLES, *BOX_TABLES, "patients.csv")
_NAMELESS: Final = (
    rule_codes.NOT_DICOM,
    rule_codes.DUPLICATE,
)  # no image, or one that is there already


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
    """Reads a series as a volume: sorted by position, turned to RAS like a NIfTI image.

    Attributes
    ----------
    frames : tuple
        File and frame of each slice.
    repeated : tuple
        Those that lie in one place, place by place: unless they are the same there is no volume.
    """

    frames: Frames
    repeated: tuple[Frames, ...] = ()

    def __call__(self) -> Image:
        return stack([read_frame(path, frame) for path, frame in self.frames])

    def identity(self) -> str:
        """A digest of place, size and time of change of every file."""
        return "".join(file_identity(path, frame) for path, frame in self.frames)


def read(
    root: Path,
    task: Task,
    options: MaskOptions | None = None,
    patients: PatientOptions | None = None,
    labels: LabelOptions | None = None,
    listen: Listen = unheard,
    images: ImageOptions | None = None,
    boxes: BoxOptions | None = None,
) -> Dataset:
    """Read a DICOM tree.

    Parameters
    ----------
    root : Path
        The tree.
    task : Task
        What its labels or masks are for.
    options : MaskOptions, optional
        What segments mean.
    patients : PatientOptions, optional
        What missing and shared patient ids mean.
    labels : LabelOptions, optional
        Where the table of labels lies, and what its words mean.
    listen : callable, optional
        Hears how many headers are read, and of how many.
    images : ImageOptions, optional
        Which images are taken.
    boxes : BoxOptions, optional
        Where boxes are.

    Raises
    ------
    DataError
        A classification task finds no table of labels, a segmentation task no masks of any kind,
        a detection neither.
    """
    boxes = boxes or BoxOptions()
    base = root / "images" if (root / "images").is_dir() else root
    table = label_table(root, task, labels or LabelOptions())
    apart = ("masks",) if task.has_labels else MASK_FOLDERS
    files = [f for f in walk(base, without=apart) if f.name not in _TABLES]
    for place in (labels.file if labels else None, boxes.file):
        if place is not None:
            files = [f for f in files if f.name != place.name or not f.samefile(place)]
    headers, found, left_out = read_headers(files, root, task, patients, listen, images)
    words = Options(options or MaskOptions(), patients or PatientOptions())
    masks = _masks(root, base, task, found, headers, words, left_out)
    samples: list[Sample] = []
    items = _items(root, base, headers, masks, task, table)
    if task.has_boxes:
        items = _boxed(root, headers, BoxSource.of(root, base, task, boxes), left_out)
    for name, item in items:
        if isinstance(item, Sample):
            samples.append(item)
        else:
            left_out.append(LeftOut(item, name))
    return Dataset(tuple(samples), tuple(left_out), masks.notes)


@dataclass(frozen=True)
class Options:
    """What a site says of masks and patients."""

    masks: MaskOptions
    patients: PatientOptions


@dataclass(frozen=True)
class _Masks:
    """Masks by image file (or why a name tells none), segmentations by their series, series of
    which several readers drew one class, whether pictures are resized to their image, and what is
    told of how masks were found."""

    named: Mapping[Path, Path | str]
    segmented: dict[str, tuple[MaskFile, ...]]
    several: frozenset[str] = frozenset()
    resize: bool = False
    notes: tuple[str, ...] = ()


def _items(
    root: Path, base: Path, headers: list[Header], masks: _Masks, task: Task, table: Table | None
) -> Iterator[tuple[str, Sample | str]]:
    keys = table_keys([h.path for h in headers], (root, base))
    numbers = alike(headers, table)
    found = stacks(headers) if task.dimensions == 3 or masks.segmented else []
    series = _segmented_series(found, masks)
    groups = [single(h) for h in headers] if task.dimensions == 2 else found
    for group in groups:
        name = group.headers[0].path.relative_to(root).as_posix()
        if table is not None:
            items = _labelled(group, keys, table, task, numbers)
        else:
            items = _masked(group, masks, series, task)
        yield from ((name, item) for item in _laid_out(items, group, task))


def _laid_out(items: Iterator[Sample | str], group: Stack, task: Task) -> Iterator[Sample | str]:
    """The same, without volumes that cannot be made."""
    for item in items:
        if isinstance(item, str) or task.dimensions != 3:
            yield item
            continue
        found = layout(group)
        flags = {"tilted": found.tilt, "uneven": found.gap}
        more = {name: "yes" for name, value in flags.items() if value}
        if found.step:
            more["slice_distance"] = f"{found.step:.3g}"
        load = DicomVolume(group.frames, found.repeated)
        yield found.reason or replace(item, load=load, columns={**item.columns, **more})


def _boxed(
    root: Path,
    headers: list[Header],
    source: BoxSource,
    left_out: list[LeftOut],
) -> Iterator[tuple[str, Sample | str]]:
    """Each image with its boxes; a file of several frames is left out."""
    names = table_keys([one.path for one in headers], (root, source.base))
    keys = {one.path: (*names[one.path], one.keys["sopinstanceuid"]) for one in headers}
    left_out += source.idle(keys.values())
    for header in headers:
        name, group = header.path.relative_to(root).as_posix(), single(header)
        if header.frames > 1:
            yield name, rule_codes.WRONG_SHAPE
            continue
        try:
            rows = source.rows(header.path, keys[header.path], partial(tuple, header.shape))
        except DataError as error:
            yield name, rule_codes.reason_of(error)
            continue
        (load,) = _loads(group, source.task)
        yield name, Sample(header.patient, load, boxes=rows, columns=_columns(group))


def label_table(root: Path, task: Task, options: LabelOptions) -> Table | None:
    """The table of labels of a DICOM tree; None for a task of masks or boxes.

    Raises
    ------
    DataError
        There is none, or it cannot be read.
    """
    if not task.has_labels:
        return None
    table = options.table(root)
    if table is None:
        raise DataError(
            "DICOM files for classification need a labels.csv or labels.xlsx",
            fix="Write one with a column PatientID, StudyInstanceUID, SeriesInstanceUID, "
            "SOPInstanceUID, AccessionNumber or file, and a column label",
            where=rule_codes.NO_TABLE,
        )
    if options.key and not options.means and low(options.key) not in KEYS:
        raise DataError(
            "a site that names the key column of its table must say what it holds",
            value=options.key,
            fix="Set labels.means to PatientID, AccessionNumber, "
            "StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID or file",
            where="labels.means",
        )
    return read_table(table, KEYS, task, options, patients=False)


def _masks(
    root: Path,
    base: Path,
    task: Task,
    found: list[Path],
    headers: list[Header],
    options: Options,
    left_out: list[LeftOut],
) -> _Masks:
    if not task.has_masks:
        return _Masks({}, {})
    folder, suffix = folder_of(root, MASK_FOLDERS), options.masks.suffix
    notes: tuple[str, ...] = ()
    inside = walk(folder) if folder else []
    named = [f for f in inside if is_picture(f) or is_nifti(f)]
    objects = [*found, *(f for f in sorted({*inside} - {*named}) if is_dicom(f))]
    if folder is None and (beside := _beside(base, task, suffix, needed=not objects)):
        folder, named, suffix = base, [*beside.masks], beside.suffix
        left_out[:] = [one for one in left_out if root / one.name not in {*named}]
        if suffix != options.masks.suffix:
            notes = (in_words(suffix, len(named)),)
    if not named and not objects:
        raise DataError(
            "DICOM files for segmentation need masks",
            fix="Put PNG or NIfTI masks named by file stem or SOPInstanceUID into a folder masks, "
            "or DICOM segmentations or structure sets anywhere",
            where=rule_codes.NO_MASKS,
        )
    others = [root / one.name for one in left_out if one.reason not in _NAMELESS]
    matched = by_name(named, folder or base, headers, others, base, task.dimensions, suffix)
    left_out += [LeftOut(why, path.relative_to(root).as_posix()) for path, why in matched.idle]
    read = []
    for path in objects:
        try:
            read.append(read_mask_file(path, task, options.masks, options.patients))
        except DataError as error:
            left_out.append(LeftOut(rule_codes.reason_of(error), path.relative_to(root).as_posix()))
    segmented, idle = link(read, headers)
    left_out += [LeftOut(rule_codes.NO_IMAGE, f.path.relative_to(root).as_posix()) for f in idle]
    merge = options.masks.several == "merge"
    several = frozenset() if merge else of_several_readers(read, segmented)
    return _Masks(matched.of, segmented, several, options.masks.resize, notes)


def _beside(base: Path, task: Task, suffix: str, *, needed: bool) -> OneFolder | None:
    """Masks among the images; None where names tell none and others are there."""
    try:
        return masks_beside(walk(base), base, task.dimensions, suffix)
    except DataError:
        if needed:
            raise
        return None


def _loads(group: Stack, task: Task) -> Iterator[DicomFrame | DicomVolume]:
    if task.dimensions == 3:
        yield DicomVolume(group.frames)
    else:
        yield from (DicomFrame(path, frame) for path, frame in group.frames)


def _labelled(
    group: Stack,
    keys: dict[Path, tuple[str, ...]],
    table: Table,
    task: Task,
    numbers: Mapping[str, int],
) -> Iterator[Sample | str]:
    entries = [entry_of(header, keys[header.path], table, numbers) for header in group.headers]
    found = [e for e in entries if e is not None]
    distinct = {(e.label, e.reason) for e in found}
    if not found:
        yield rule_codes.NO_LABEL
    elif len(distinct) > 1:
        yield rule_codes.CONFLICTING
    elif found[0].label is None:
        yield found[0].reason or rule_codes.NO_LABEL
    else:
        entry, patient = found[0], group.headers[0].patient
        columns = entry.columns | _columns(group)
        for load in _loads(group, task):
            yield Sample(patient, load, entry.label, split=entry.split, columns=columns)


def entry_of(
    header: Header, files: tuple[str, ...], table: Table, numbers: Mapping[str, int]
) -> Entry | None:
    """What a table says of a file, known as `files`; `numbers` is of :func:`alike`."""
    if table.column == "file":
        return table.find(files)
    value = header.keys[table.column]
    found = table.find([value]) if value else None
    # 000123, 123 and 1.23E2 are one number, and a workbook does not tell whose row it is.
    return None if found and found.number and numbers[found.key] > 1 else found


def alike(headers: list[Header], table: Table | None) -> Mapping[str, int]:
    """How many of the keys that images have a workbook would keep as the same number."""
    if table is None or table.column == "file":
        return Counter()
    return Counter(as_number(value) for value in {h.keys[table.column] for h in headers})


def _columns(group: Stack) -> dict[str, str]:
    return {"synthetic": "yes"} if any(h.synthetic for h in group.headers) else {}


def _segmented_series(found: list[Stack], masks: _Masks) -> dict[tuple[Path, int], SegmentedSeries]:
    """The segmented stack of slices that each frame belongs to."""
    instances: dict[str, set[str]] = {}
    for part in found:
        of_series = instances.setdefault(part.headers[0].keys["seriesinstanceuid"], set())
        of_series |= {header.keys["sopinstanceuid"] for header in part.headers}
    series: dict[tuple[Path, int], SegmentedSeries] = {}
    for part in found:
        uid = part.headers[0].keys["seriesinstanceuid"]
        if uid in masks.segmented:
            one = SegmentedSeries(masks.segmented[uid], part.frames, frozenset(instances[uid]))
            series |= dict.fromkeys(part.frames, one)
    return series


def _masked(
    group: Stack, masks: _Masks, series: dict[tuple[Path, int], SegmentedSeries], task: Task
) -> Iterator[Sample | str]:
    if group.headers[0].keys["seriesinstanceuid"] in masks.several:
        yield rule_codes.SEVERAL_READERS
    elif group.frames[0] in series:
        yield from _segmented(group, series, task)
    else:
        yield from _named(group, masks, task)


def _named(group: Stack, masks: _Masks, task: Task) -> Iterator[Sample | str]:
    header = group.headers[0]
    mask = masks.named.get(header.path, rule_codes.NO_MASK)
    if isinstance(mask, str):
        yield mask
    elif task.dimensions == 2 and header.frames > 1:
        yield rule_codes.MASK_SHAPE  # one mask cannot serve several frames
    else:
        read_mask = (
            PlacedNiftiMask(mask, group.frames, task.dimensions)
            if is_nifti(mask)
            else PictureMask(mask, header.path if masks.resize else None)
        )
        load = next(_loads(group, task))
        yield Sample(header.patient, load, mask=read_mask, columns=_columns(group))


def _segmented(
    group: Stack, series: dict[tuple[Path, int], SegmentedSeries], task: Task
) -> Iterator[Sample | str]:
    patient = group.headers[0].patient
    for load in _loads(group, task):
        mask: SegmentedVolume | SegmentedFrame
        if isinstance(load, DicomVolume):
            mask = SegmentedVolume(series[load.frames[0]])
        else:
            one = (load.path, load.frame)
            mask = SegmentedFrame(series[one], *one)
        yield Sample(patient, load, mask=mask, columns=_columns(group))
