"""Picture folders.

* classification: ``CLASS/*.png`` (also ``train/CLASS/*.png`` and so on), or a table of labels with
  a column ``image`` or ``file``, a column ``label`` or one 0/1 column per class, optionally
  ``patient`` and ``split``;
* segmentation: ``images/`` and ``masks/`` with the same stems.

``patients.csv`` (``image``, ``patient``) names the patients; without any such column each image
counts as one (:mod:`client.data.patient_columns` has the usual names of the column).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data import labels, reasons
from client.data.files import folders, stem, table_keys, walk
from client.data.label_options import TABLES, LabelOptions
from client.data.patient_options import PatientOptions
from client.data.readers.people import KEYS, People, people_of
from client.data.readers.pictures import Picture, PictureMask, is_picture
from client.data.tables import SPLIT_NAMES, Entry, read_table
from client.data.types import Dataset, Image, LeftOut, Sample, SplitName
from fedward.errors import DataError
from fedward.plan.schema import Task

Item = tuple[Path, Sample | str]


def read(
    root: Path,
    task: Task,
    options: LabelOptions | None = None,
    patients: PatientOptions | None = None,
) -> Dataset:
    """Read a picture folder.

    Parameters
    ----------
    root : Path
        The folder.
    task : Task
        What its labels or masks are for.
    options : LabelOptions, optional
        Where the table of labels lies, and what its words mean.
    patients : PatientOptions, optional
        What missing and shared patient ids of a table mean.

    Raises
    ------
    DataError
        The folder has none of the known layouts, or a table cannot be read.
    """
    options = options or LabelOptions()
    people = people_of(root, patients, options)
    if task.kind == "segmentation":
        people.check()
        return collect(root, _pairs(root, people))
    if options.table(root) is not None:
        return labelled(root, root, is_picture, Picture, people, task, options)
    people.check()
    return collect(root, _classes(root, people, task, options))


def collect(root: Path, items: Iterator[Item]) -> Dataset:
    """Samples apart from what was left out."""
    samples: list[Sample] = []
    left_out: list[LeftOut] = []
    for path, item in items:
        if isinstance(item, Sample):
            samples.append(item)
        else:
            left_out.append(LeftOut(item, path.relative_to(root).as_posix()))
    return Dataset(tuple(samples), tuple(left_out))


def labelled(
    root: Path,
    base: Path,
    wanted: Callable[[Path], bool],
    loader: Callable[[Path], Callable[[], Image]],
    people: People,
    task: Task,
    options: LabelOptions,
) -> Dataset:
    """Images under `base` with the labels of a table (of `root`, unless the site names one)."""
    table = read_table(options.table(root) or root / TABLES[0], KEYS, task, options)
    people = people.beside(table)
    files = [f for f in walk(base, without=("masks",)) if wanted(f)]
    keys = table_keys(files, (root, base))
    used: set[str] = set()

    def items() -> Iterator[Item]:
        for file in files:
            entry = table.find(keys[file])
            used.add(entry.key if entry else "")
            yield file, _labelled(file, keys[file], entry, loader, people)

    taken = collect(root, items())
    idle = tuple(LeftOut(reasons.NO_IMAGE, key) for key in table.entries if key not in used)
    return Dataset(taken.samples, taken.left_out + idle)


def _labelled(
    file: Path,
    keys: tuple[str, ...],
    entry: Entry | None,
    loader: Callable[[Path], Callable[[], Image]],
    people: People,
) -> Sample | str:
    if entry is None or entry.label is None:
        return entry.reason if entry and entry.reason else reasons.NO_LABEL
    try:
        patient = people.of(keys, entry.patient)
    except DataError as error:
        return reasons.reason_of(error)
    return Sample(
        patient,
        loader(file),
        entry.label,
        split=entry.split,
        columns=entry.columns,
        patient_known=people.knows(patient),
    )


def pairs(
    images: Path,
    masks: Path,
    wanted: Callable[[Path], bool],
    build: Callable[[Path, Path], tuple[Callable[[], Image], Callable[[], NDArray[np.uint8]]]],
    people: People,
) -> Iterator[Item]:
    """Images with the mask of the same place and stem."""
    files = [f for f in walk(images) if wanted(f)]
    keys = table_keys(files, (images.parent, images))
    names = Counter(_place(f, images) for f in files)
    by_name: dict[Path, list[Path]] = {}
    for mask in (f for f in walk(masks) if wanted(f)):
        by_name.setdefault(_place(mask, masks), []).append(mask)
    for file in files:
        found = by_name.get(_place(file, images), [])
        if not found:
            yield file, reasons.NO_MASK
        elif len(found) > 1 or names[_place(file, images)] > 1:
            yield file, reasons.DUPLICATE
        else:
            yield file, _pair(file, keys[file], build(file, found[0]), people)
    for name in sorted(set(by_name) - set(names)):
        yield by_name[name][0], reasons.NO_IMAGE


def _place(file: Path, root: Path) -> Path:
    return file.relative_to(root).with_name(stem(file))


def _pair(
    file: Path,
    keys: tuple[str, ...],
    parts: tuple[Callable[[], Image], Callable[[], NDArray[np.uint8]]],
    people: People,
) -> Sample | str:
    try:
        patient = people.of(keys)
    except DataError as error:
        return reasons.reason_of(error)
    entry = people.find(keys)
    split, columns = (entry.split, entry.columns) if entry else (None, {})
    known = people.knows(patient)
    return Sample(
        patient, parts[0], mask=parts[1], split=split, columns=columns, patient_known=known
    )


def _pairs(root: Path, people: People) -> Iterator[Item]:
    if not ((root / "images").is_dir() and (root / "masks").is_dir()):
        raise DataError(
            "a segmentation folder must hold images/ and masks/",
            fix="Put masks of the same stem into masks/",
            where=reasons.NO_MASKS,
        )
    return pairs(
        root / "images",
        root / "masks",
        is_picture,
        lambda image, mask: (Picture(image), PictureMask(mask)),
        people,
    )


def _classes(root: Path, people: People, task: Task, options: LabelOptions) -> Iterator[Item]:
    files = [f for f in walk(root) if is_picture(f)]
    keys = table_keys(files, (root,))
    names = {folder.name.lower() for folder in folders(root)}
    divided = bool(names) and names <= set(SPLIT_NAMES)
    for file in files:
        parts = file.relative_to(root).parts[:-1]
        split: SplitName | None = SPLIT_NAMES[parts[0].lower()] if divided and parts else None
        yield file, _of_class(file, keys[file], parts[divided:], split, people, task, options)


def _of_class(
    file: Path,
    keys: tuple[str, ...],
    parts: tuple[str, ...],
    split: SplitName | None,
    people: People,
    task: Task,
    options: LabelOptions,
) -> Sample | str:
    try:
        index = options.class_of_folder(parts[0] if parts else "", task)
        patient = people.of(keys)
    except DataError as error:
        return reasons.reason_of(error)
    label = labels.flags({index}, task) if task.multi_label else (index,)
    known = people.knows(patient)
    return Sample(patient, Picture(file), label, split=split, patient_known=known)
