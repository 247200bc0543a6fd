"""What to change where labels or masks do not fit: what is there, and what is sought.

Names of columns and words of labels stay at the hospital; no key of an image is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward.suggest import nearest
from fedward_client.data.files import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    folder_of,
    folders,
    stem,
    walk,
)
from fedward_client.data.label_tables import read_rows
from fedward_client.data.labels import FLAGS
from fedward_client.data.mask_suffix import endings
from fedward_client.data.options import LabelOptions, low, plain
from fedward_client.data.patient_columns import cell, patient_column
from fedward_client.data.readers.registry import READERS, Format
from fedward_client.data.survey import image_keys, key_column, label_column, table_of

_MOST: Final = 12  # words that are told one by one
_SUBFOLDERS: Final = 20  # beyond which they are no classes, and may be named after patients


def label_hints(
    root: Path,
    format: Format,
    task: Task,
    options: LabelOptions,
    left_out: Mapping[str, int],
) -> list[str]:
    """Sentences about labels or masks that do not fit; none where nothing was left out for them.

    Parameters
    ----------
    root, format : Path, str
        The dataset.
    task : Task
        What the labels or masks are for.
    options : LabelOptions
        How a table of labels is read.
    left_out : mapping
        Counts by reason.
    """
    reasons = {rule_codes.NO_LABEL, rule_codes.UNKNOWN_CLASS, rule_codes.NO_IMAGE}
    reasons |= {rule_codes.NO_MASK, rule_codes.AMBIGUOUS}
    if not root.is_dir():
        return []
    found: list[str] = []
    with suppress(DataError):  # it has been told what is wrong with a table
        if rule_codes.NO_PATIENT in left_out and not READERS[format].names_patients:
            found += _of_patients(root, options)
        if not reasons & {*left_out} or task.has_boxes:
            return found
        if task.has_masks:
            found += _of_masks(root, format, task, left_out)
        elif table := options.table(root):
            found += _of_table(table, root, format, task, options)
        else:
            found += _of_folders(root, task)
    return found


def _of_patients(root: Path, options: LabelOptions) -> Iterator[str]:
    """What ``patients.csv`` lacks, where images have no patient."""
    if not (table := root / "patients.csv").is_file():
        return
    header, rows = read_rows(table, LabelOptions())
    columns = {low(name): [cell(row, k) for row in rows] for k, name in enumerate(header) if name}
    key = next((name for name in ("image", "file") if name in columns), "")
    place = patient_column([*columns], rows, {key}, options.patient_column, table.name)
    if place is None:
        yield (
            f"{table.name} has the columns {', '.join(filter(None, header))}, and none is called "
            "patient: set labels.patient_column"
        )
    known = {name for names in image_keys(root).values() for name in names}
    if count := sum(name not in known for name in columns[key]):
        yield (
            f"{count} of {len(rows)} rows of {table.name} name no image: its column `{key}` must "
            "have paths within the dataset, or names of files that are there once"
        )


def _of_masks(root: Path, format: Format, task: Task, left_out: Mapping[str, int]) -> Iterator[str]:
    """Endings that many masks have beyond their image's name, or images beyond their mask's."""
    if format == "dicom" and rule_codes.AMBIGUOUS in left_out:
        yield (
            "a mask whose name several images have is nobody's: lay masks/ out as the images are, "
            "or name each mask by the UID of its image"
        )
    folder, base = folder_of(root, MASK_FOLDERS), folder_of(root, IMAGE_FOLDERS) or root
    if folder is None or rule_codes.NO_IMAGE not in left_out:
        return
    files = walk(base, without=(folder.name,))
    if format == "dicom" and task.dimensions == 3:
        files = sorted({path.parent for path in files})
    masks = [_named(path, folder, format) for path in walk(folder)]
    images = [_named(path, base, format) for path in files]
    if told := _endings(masks, images, left_out[rule_codes.NO_IMAGE]):
        word = told[0][0]
        yield (
            f"names of masks end in {_counted(told)} beyond their image's: set masks.suffix = "
            f'"{word}"' + (", or the one that is meant" if len(told) > 1 else "")
        )
    if format != "dicom" and (told := _endings(images, masks, left_out.get(rule_codes.NO_MASK, 0))):
        yield (
            f"names of images end in {_counted(told)} beyond their mask's: make each a channel, "
            "[datasets.NAME.channels.CHANNEL] with that suffix"
        )


def _named(path: Path, base: Path, format: Format) -> Path:
    """Where a file lies and its name; of DICOM the name alone, as trees differ."""
    return Path(stem(path)) if format == "dicom" else path.relative_to(base).with_name(stem(path))


def _endings(names: list[Path], others: list[Path], idle: int) -> list[tuple[str, int]]:
    """The commonest; not of names that fit as they are, nor of a single one: that may be a name."""
    found = endings(names, others).most_common(3)
    return [(word, count) for word, count in found if 1 < count <= idle]


def _counted(words: list[tuple[str, int]]) -> str:
    return ", ".join(f"{word} ({count})" for word, count in words)


def _of_folders(root: Path, task: Task) -> Iterator[str]:
    if table := table_of(root):
        yield (
            f'the table of labels may be {table.name}: set labels.file = "{table.name}" and the '
            "names of its columns (`fedward-simulate init` writes them), or call it labels.csv"
        )
    names = [one.name for one in folders(root)]
    wrong = [name for name in names if low(name) not in map(low, task.classes)]
    if not names or not wrong or len(names) > _SUBFOLDERS:
        yield "there is no labels.csv, and no folder for each class"
        return
    yield f"sub-folders are {', '.join(names)}; the classes are {', '.join(task.classes)}"
    yield from _nearly(wrong, task)


def _of_table(
    table: Path, root: Path, format: Format, task: Task, options: LabelOptions
) -> Iterator[str]:
    header, rows = read_rows(table, options)
    columns = {low(name): [cell(row, k) for row in rows] for k, name in enumerate(header) if name}
    yield from _of_key(table, root, format, options, header, columns)
    column, classes = low(options.column), [*map(low, task.classes)]
    if column not in columns and not all(name in columns for name in classes):
        meant = label_column(columns) or nearest(options.column, columns)
        yield (
            f"{table.name} has the columns {', '.join(filter(None, header))}; sought is "
            f"`{options.column}`, or a column for each of {', '.join(task.classes)}"
            + (f'. Did you mean labels.column = "{_written(header, meant)}"?' if meant else "")
        )
        return
    if column in columns:
        yield from _of_words(columns[column], task, options)
    else:
        yield from _of_flags([word for name in classes for word in columns[name]], options)


def _of_key(
    table: Path,
    root: Path,
    format: Format,
    options: LabelOptions,
    header: list[str],
    columns: Mapping[str, list[str]],
) -> Iterator[str]:
    """Whether another column names the images."""
    best = key_column(root, format, columns)
    now = low(options.key) or next((name for name in ("image", "file") if name in columns), "")
    if format != "dicom" and best and best != now:
        yield (
            f"the column that names images in {table.name} seems to be "
            f'`{_written(header, best)}`: set labels.key = "{_written(header, best)}"'
        )


def _of_words(values: list[str], task: Task, options: LabelOptions) -> Iterator[str]:
    unknown: Counter[str] = Counter()
    for word, count in Counter(values).items():
        try:
            options.label_of_row({low(options.column): word}, task)
        except DataError as error:
            if word and rule_codes.reason_of(error) == rule_codes.UNKNOWN_CLASS:
                unknown[word] += count
    if not unknown:
        return
    told = [f"{word} ({count})" for word, count in unknown.most_common(_MOST)]
    more = f" and {len(unknown) - _MOST} more" if len(unknown) > _MOST else ""
    yield (
        f"words without a class: {', '.join(told)}{more}; the classes are "
        f"{', '.join(task.classes)}. Say what each means in labels.words"
        + (", or in labels.none if it means none of them" if task.multi_label else "")
        + ", or that it is no label in labels.unlabelled"
    )
    yield from _nearly(list(unknown), task)


def _of_flags(values: list[str], options: LabelOptions) -> Iterator[str]:
    """Words of the classes' own columns that mean neither 1 nor 0."""
    known = {*map(plain, (*options.yes, *options.no, *options.unlabelled)), *FLAGS}
    unknown = Counter(plain(word) for word in values if plain(word) not in known)
    if unknown:
        told = [f"{word or 'empty'} ({n})" for word, n in unknown.most_common(_MOST)]
        yield (
            f"words in the columns of classes that are neither 1 nor 0: {', '.join(told)}. Say "
            'which mean 1 in labels.yes and which 0 in labels.no ("" is an empty cell), or that '
            "they are no label in labels.unlabelled"
        )


def _nearly(words: list[str], task: Task) -> Iterator[str]:
    pairs = [(word, nearest(word, task.classes)) for word in words[:_MOST]]
    meant = [f'"{word}" = "{name}"' for word, name in pairs if name]
    if meant:
        yield f"did you mean labels.words = {{ {', '.join(meant)} }}?"


def _written(header: list[str], name: str) -> str:
    return next((one for one in header if low(one) == name), name)
