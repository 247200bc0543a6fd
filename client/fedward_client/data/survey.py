"""What an unknown folder of images seems to hold, for a first draft of plan and configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from fedward.errors import DataError
from fedward.tasks.registry import TASKS
from fedward_client.data.files import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    folder_of,
    folders,
    table_keys,
    walk,
)
from fedward_client.data.label_tables import SPLIT_NAMES, read_rows
from fedward_client.data.options import SEPARATORS, TABLES, LabelOptions, low
from fedward_client.data.patient_columns import PATIENT_COLUMNS, bare, cell
from fedward_client.data.readers.registry import Format

_LABELLED, _MASKED = (
    next(name for name, spec in TASKS.items() if spec.target == target)
    for target in ("labels", "masks")
)
_TABLE_SUFFIXES: Final = (".csv", ".tsv", ".xlsx", ".xlsm")
_OTHER_TABLES: Final = ("patients.csv",)
_LABEL_NAMES: Final = ("label", "class", "diagnosis", "dx", "finding", "findinglabels", "category")
_NEGATIVE: Final = (
    "no",
    "normal",
    "negative",
    "healthy",
    "benign",
    "clear",
    "control",
    "other",
    "0",
)
_NOTHING: Final = ("no finding", "no findings", "none", "nothing")
_DICOM_KEYS: Final = (
    "sopinstanceuid",
    "seriesinstanceuid",
    "studyinstanceuid",
    "accessionnumber",
    "patientid",
    "file",
)
_MOST_CLASSES: Final = 30  # values of a column beyond which it is no label
_LOOK_AT: Final = 20  # masks whose values are looked at
_FEWEST: Final = 5  # folders that may be patients
_CLASS: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _+/-]{0,63}")


@dataclass(frozen=True)
class Survey:
    """What a folder seems to hold.

    Attributes
    ----------
    root : Path
        The folder, or the npz file.
    format : str
        Its data format.
    kind : str
        ``task.kind``; "" where nothing tells.
    dimensions : int
        2 or 3.
    classes : tuple of str
        As a plan may name them, in its order; () where nothing tells.
    multi_label : bool
        Whether an image may carry several classes.
    labels : LabelOptions
        Where the table of labels lies, which columns count, and what words mean that a plan
        cannot use as names of classes.
    hospitals : tuple of str
        Sub-folders that are a hospital's dataset each.
    seen : tuple of str
        Columns of the table, for messages.
    patient_folder : int
        Which folder on an image's path seems to be its patient, from 1; 0: none.
    """

    root: Path
    format: Format
    kind: str = ""
    dimensions: int = 2
    classes: tuple[str, ...] = ()
    multi_label: bool = False
    labels: LabelOptions = field(default_factory=LabelOptions)
    hospitals: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    patient_folder: int = 0

    def in_hospital(self, name: str) -> Path:
        """The folder of a hospital; the whole where there are none."""
        return self.root / name if name else self.root


def survey(root: Path, format: Format | None = None, column: str = "") -> Survey:
    """Look at a folder.

    Parameters
    ----------
    root : Path
        The folder, or an npz file.
    format : str, optional
        Its format, where it holds several kinds of files.
    column : str
        The table's column of labels; "" for one of a usual name.

    Raises
    ------
    DataError
        It is not there or of no known kind, or its table cannot be read.
    """
    from fedward_client.data.dataset import detect  # which tells hints from here

    if not root.exists():
        raise DataError("the data must exist", value=root.name, fix="Check the path and the mount")
    if root.is_file():
        return _archive(Survey(root, format or detect(root)))
    hospitals = _hospitals(root)
    places = [root / name for name in hospitals] or [root]
    found = [_one(Survey(one, format or detect(one)), column) for one in places]
    first = next((one for one in found if one.classes), found[0])
    levels = {patient_folder(one) for one in found}
    names = sorted({name for one in found for name in one.classes}, key=_order)
    if first.kind == _MASKED:
        names = max((list(one.classes) for one in found), key=len)
    return replace(
        first,
        root=root,
        classes=tuple(names),
        hospitals=hospitals,
        patient_folder=levels.pop() if len(levels) == 1 else 0,
    )


def patient_folder(found: Survey) -> int:
    """Which folder on the way to an image may be its patient, from 1; 0 where nothing says so.

    It is the first one that all images have and that is neither the same for all, nor a part, nor a
    class. Where the table has a column of patients, or there are few such folders, none is.
    """
    root, named = found.root, {bare(name) for name in found.seen}
    if found.format not in ("folders", "nifti") or (root / _OTHER_TABLES[0]).is_file():
        return 0
    if named & set(PATIENT_COLUMNS):
        return 0
    from fedward_client.data.readers.images import is_picture
    from fedward_client.data.readers.nifti import is_nifti

    base = folder_of(root, IMAGE_FOLDERS) or root
    wanted = is_nifti if found.format == "nifti" else is_picture
    files = [file.relative_to(base).parts[:-1] for file in walk(base) if wanted(file)]
    other = {*SPLIT_NAMES, *map(low, found.classes), *map(low, found.labels.words)}
    for level in range(min(map(len, files), default=0)):
        names = {parts[: level + 1] for parts in files}
        words = {low(parts[-1]) for parts in names}
        if len(words) > 1 and not words <= other:
            return level + 1 if len(names) >= _FEWEST else 0
    return 0


def _hospitals(root: Path) -> tuple[str, ...]:
    """The sub-folders, where each is a dataset by itself and the folder is none."""
    subs = folders(root)
    if len(subs) < 2 or table_of(root) or folder_of(root, IMAGE_FOLDERS):
        return ()
    if {sub.name.lower() for sub in subs} <= set(SPLIT_NAMES):
        return ()
    if not all(_is_dataset(sub) for sub in subs):
        inner = [{one.name.lower() for one in folders(sub)} for sub in subs]
        if len(set.intersection(*inner)) < 2:
            return ()
    return tuple(sub.name for sub in subs)


def _is_dataset(folder: Path) -> bool:
    """Whether a folder has labels of its own."""
    return table_of(folder) is not None or folder_of(folder, MASK_FOLDERS) is not None


def table_of(folder: Path) -> Path | None:
    """The table of labels of a folder: one of the usual name, or the only one that is there."""
    usual = [folder / name for name in TABLES if (folder / name).is_file()]
    if usual or not folder.is_dir():
        return usual[0] if usual else None
    others = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in _TABLE_SUFFIXES and path.name.lower() not in _OTHER_TABLES
    ]
    return others[0] if len(others) == 1 else None


def _one(found: Survey, column: str) -> Survey:
    """One dataset: with masks, with a table, or with a folder for each class."""
    from fedward_client.data.dataset import masks_beside

    root = found.root
    base, masks = folder_of(root, IMAGE_FOLDERS), folder_of(root, MASK_FOLDERS)
    found = replace(found, dimensions=_dimensions(base or root, found.format))
    table = table_of(root)
    if masks is not None and (base is not None or found.format == "dicom"):
        return replace(found, kind=_MASKED, classes=_mask_classes(walk(masks)))
    for dimensions in (2, 3) if found.format == "dicom" else (found.dimensions,):
        if table is None and (beside := masks_beside(root, found.format, dimensions=dimensions)):
            classes = _mask_classes(beside.masks)
            return replace(found, kind=_MASKED, classes=classes, dimensions=dimensions)
    if table is not None:
        return _of_table(found, table, column)
    if found.format == "folders":
        return _named(replace(found, kind=_LABELLED), _class_folders(root))
    return found


def _class_folders(root: Path) -> list[str]:
    subs = folders(root)
    if subs and {sub.name.lower() for sub in subs} <= set(SPLIT_NAMES):
        subs = [inner for sub in subs for inner in folders(sub)]
    names = sorted({sub.name for sub in subs})
    known = {low(name) for name in (*IMAGE_FOLDERS, *MASK_FOLDERS, "image", "mask", "label")}
    return [] if known & {low(name) for name in names} else names


def _dimensions(base: Path, format: Format) -> int:
    if format != "nifti":
        return 2
    import nibabel as nib

    from fedward_client.data.readers.nifti import is_nifti

    first = next((path for path in walk(base) if is_nifti(path)), None)
    try:
        header = nib.load(first).header if first else None
    except Exception:
        return 3  # its reader tells what is wrong with it
    shape = [side for side in header.get_data_shape() if side > 1] if header else []
    return 3 if len(shape) >= 3 else 2


def _mask_classes(masks: Sequence[Path]) -> tuple[str, ...]:
    from fedward_client.data.readers.images import PictureMask, is_mask
    from fedward_client.data.readers.nifti import NiftiMask, is_nifti

    values: set[int] = set()
    files = [path for path in masks if is_mask(path) or is_nifti(path)]
    for path in files[:_LOOK_AT]:
        read = NiftiMask(path, 3) if is_nifti(path) else PictureMask(path)
        try:
            values |= set(np.unique(read()).tolist()) - {0}
        except DataError:
            continue  # told when the dataset is read
    if values != set(range(1, len(values) + 1)) or len(values) < 2:
        return ("foreground",)
    return tuple(f"class-{place}" for place in sorted(values))


def _archive(found: Survey) -> Survey:
    with np.load(found.root, allow_pickle=False) as arrays:
        names = [name for name in arrays.files if name.endswith(("labels", "masks"))]
        kind = _MASKED if any(name.endswith("masks") for name in names) else _LABELLED
        targets = [arrays[name] for name in names if name.endswith(("masks", "labels"))]
    if not targets:
        return found
    found = replace(found, kind=kind)
    if kind == _MASKED:
        most = max(int(one.max(initial=0)) for one in targets)
        dimensions = 3 if targets[0].ndim == 4 else 2
        count = most if most <= _MOST_CLASSES else 1
        names = [f"class-{k}" for k in range(1, count + 1)] if count > 1 else ["foreground"]
        return replace(found, classes=tuple(names), dimensions=dimensions)
    wide = targets[0].ndim == 2 and targets[0].shape[1] > 1
    count = targets[0].shape[1] if wide else max(int(one.max(initial=0)) for one in targets) + 1
    return replace(found, classes=tuple(f"class-{k}" for k in range(count)), multi_label=wide)


def _of_table(found: Survey, table: Path, column: str) -> Survey:
    """Which column names the image, which the label."""
    header, rows = read_rows(table, LabelOptions())
    lower = [low(name) for name in header]
    columns = {name: [cell(row, k) for row in rows] for k, name in enumerate(lower) if name}
    key = key_column(found.root, found.format, columns)
    usual = table.name in TABLES
    options = LabelOptions(file=None if usual else table)
    if key and key not in ("image", "file", *_DICOM_KEYS):
        options = replace(options, key=header[lower.index(key)])
    found = replace(found, kind=_LABELLED, labels=options, seen=tuple(header))
    rest = {
        name: values
        for name, values in columns.items()
        if name not in (key, "split") and bare(name) not in PATIENT_COLUMNS
    }
    if column and low(column) not in columns:
        return found
    label = low(column) or label_column(rest)
    if not label:
        flags = [name for name, values in rest.items() if _are_flags(values)]
        return _of_flags(found, [header[lower.index(name)] for name in flags], rest)
    found = replace(found, labels=replace(options, column=header[lower.index(label)]))
    words = [word for word in columns[label] if word]
    if any(SEPARATORS.search(word) for word in words):
        parts = {part.strip() for word in words for part in SEPARATORS.split(word)} - {""}
        nothing = tuple(sorted(part for part in parts if part.lower() in _NOTHING))
        options = replace(found.labels, none=nothing)
        found = replace(found, multi_label=True, labels=options)
        return _named(found, parts - set(nothing))
    return _named(found, words)


def _of_flags(found: Survey, flags: Sequence[str], rest: dict[str, list[str]]) -> Survey:
    if len(flags) < 2:
        return found
    marks = [[value in ("1", "1.0") for value in rest[low(name)]] for name in flags]
    one_each = all(sum(row) == 1 for row in zip(*marks, strict=True))
    return replace(found, classes=tuple(flags), multi_label=not one_each)


def key_column(root: Path, format: Format, columns: Mapping[str, Sequence[str]]) -> str:
    """The column (lower case) that names the images of a folder; "" without one."""
    if format == "dicom":
        return next((name for name in _DICOM_KEYS if name in columns), "")
    known = {key for keys in image_keys(root).values() for key in keys}
    hits = Counter({name: sum(v in known for v in values) for name, values in columns.items()})
    best = hits.most_common(1)
    return best[0][0] if best and best[0][1] else ""


def image_keys(root: Path) -> dict[Path, tuple[str, ...]]:
    """What a table may call each file of a folder."""
    base = folder_of(root, IMAGE_FOLDERS) or root
    return table_keys(walk(root), (root, base))


def label_column(rest: Mapping[str, Sequence[str]]) -> str:
    """The column of labels: one of a usual name, else the only one of few different words."""
    for usual in _LABEL_NAMES:
        for name in rest:
            if bare(name) == usual:
                return name
    few = [
        name
        for name, values in rest.items()
        if 2 <= len(set(values) - {""}) <= min(_MOST_CLASSES, len(values) // 4)
        and not _are_flags(values)
    ]
    return few[0] if len(few) == 1 else ""


def _are_flags(values: Iterable[str]) -> bool:
    return set(values) - {""} <= {"0", "1", "0.0", "1.0"} and any(values)


def _named(found: Survey, words: Iterable[str]) -> Survey:
    """Classes from the words of the data; what a plan cannot name so gets a name that it can."""
    names: dict[str, str] = {}
    for word in sorted(set(words)):
        if low(word) not in map(low, names):
            names[word] = word if _CLASS.fullmatch(word) else _plain_name(word)
    classes = tuple(sorted(dict.fromkeys(names.values()), key=_order))
    means = {word: name for word, name in names.items() if word != name}
    return replace(found, classes=classes, labels=replace(found.labels, words=means))


def _plain_name(word: str) -> str:
    return (re.sub(r"[^A-Za-z0-9 _+/-]+", "-", word).strip(" -_+/") or "class")[:64]


def _order(name: str) -> tuple[bool, str]:
    """Of two classes the last is the positive one."""
    return low(name) not in _NEGATIVE and low(name) not in _NOTHING, name
