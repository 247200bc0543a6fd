"""Label and patient tables (CSV or XLSX) beside the images."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from pathlib import Path
from typing import Final

import openpyxl

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.data.options import LabelOptions, low
from fedward_client.data.patient_columns import patient_column
from fedward_client.data.quiet import quiet
from fedward_client.data.sample import SplitName

SPLIT_NAMES: Final[dict[str, SplitName]] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Entry:
    """What a table says of one image: a label or the reason why there is none.

    `number` says that a workbook holds the key as a number: zeros before it are lost.
    """

    key: str
    label: tuple[int, ...] | None
    reason: str = ""
    patient: str = ""
    split: SplitName | None = None
    columns: dict[str, str] = field(default_factory=dict)
    number: bool = False


@dataclass(frozen=True)
class Table:
    """Entries by key.

    Attributes
    ----------
    column : str
        What the keys are, in lower case.
    entries : dict
        By key.
    patients : str
        The column (lower case) that names the patients; "" where there is none.
    """

    column: str
    entries: dict[str, Entry]
    patients: str = ""

    def find(self, keys: Iterable[str]) -> Entry | None:
        """The entry of the first key that the table has."""
        return next((self.entries[key] for key in keys if key in self.entries), None)


class _Number(str):
    """A cell that a workbook holds as a number."""

    __slots__ = ()


_DIGITS: Final = 15  # that a number in a workbook keeps


def as_number(text: str) -> str:
    """An id as a workbook would keep it as a number; "" for one that stays text."""
    with suppress(ValueError, OverflowError):
        if text.strip() and text.isascii():
            value = float(text)
            return str(int(value)) if value.is_integer() else ""
    return ""


def read_table(
    path: Path,
    columns: Sequence[str],
    task: Task | None,
    options: LabelOptions | None = None,
    *,
    patients: bool = True,
) -> Table:
    """Read a table keyed by the first of `columns` (lower case) that it has.

    Parameters
    ----------
    path : Path
        CSV with a header (comma, semicolon or tab; UTF-8 or Windows-1252), or XLSX.
    columns : sequence of str
        What keys may be.
    task : Task or None
        What the labels are for; None for a table without labels.
    options : LabelOptions, optional
        Its sheet, columns and words.
    patients : bool
        Whether it names the patients; False where the images do so themselves.

    Raises
    ------
    DataError
        The file cannot be read, has no key column, or names patients in two ways.
    """
    options = options or LabelOptions()
    header, rows = read_rows(path, options)
    lower = [low(name) for name in header]
    column, means = _key(path, lower, columns, options, alone=task is None)
    _check_columns(path, lower, options)
    taken = {column, *_labels(task, options)}
    place = lower.index("patient") if "patient" in lower else None
    if patients:
        place = patient_column(lower, rows, taken, options.patient_column, path.name)
    entries: dict[str, Entry] = {}
    for cells in rows:
        entry = _entry(column, header, lower, cells, place, task, options)
        if entry.key:
            known = entries.get(entry.key)
            entries[entry.key] = entry if known is None else _merged(known, entry, options)
    return Table(means, entries, "" if place is None else lower[place])


def _key(
    path: Path, lower: Sequence[str], columns: Sequence[str], options: LabelOptions, *, alone: bool
) -> tuple[str, str]:
    """The column of the keys, and what they are; the site says nothing of a table of patients."""
    key = low(options.key) or next((name for name in columns if name in lower), "")
    if not key or key not in lower:
        wanted = options.key or " or ".join(columns)
        raise DataError(
            f"needs a column {wanted}",
            where=path.name,
            fix="Name its key column so"
            + ("" if alone else ", or see labels.key, labels.sheet and labels.header in site.toml"),
        )
    means = low(options.means) or (key if key in columns else "file")
    return key, means


def _check_columns(path: Path, lower: Sequence[str], options: LabelOptions) -> None:
    """Columns that a site names must be there: a misspelt one would leave all images out."""
    beside = [one.column or name for name, one in options.beside.items()]
    named = [*options.columns, *([options.column] if options.column != "label" else []), *beside]
    if missing := [name for name in named if low(name) not in lower]:
        raise DataError(
            "the table must have the columns that site.toml names",
            value=missing[0],
            where=path.name,
            fix="Correct labels.column, labels.columns or [datasets.NAME.table]",
        )
    used = {low(name) for name in (*named, options.key, options.column, options.patient_column)}
    used -= {""}
    if twice := [name for name, n in Counter(lower).items() if n > 1 and name in used]:
        raise DataError(
            "a column that is used must be there once",
            value=twice[0],
            where=path.name,
            fix="Rename or remove one of them",
        )


def read_rows(path: Path, options: LabelOptions) -> tuple[list[str], list[list[str]]]:
    """The column names of a table, and its rows, which may be shorter.

    Raises
    ------
    DataError
        The file cannot be read, or has no header.
    """
    is_workbook = path.suffix.lower() in (".xlsx", ".xlsm")
    table = _workbook(path, options.sheet) if is_workbook else _separated(path, options.header)
    if options.header == 1:
        table = list(dropwhile(lambda row: not any(row), table))
    table = table[options.header - 1 :]
    if not table or not any(table[0]):
        raise DataError("must have a header row", where=path.name, fix="Add the column names")
    return table[0], [row for row in table[1:] if any(row)]


def _workbook(path: Path, sheet: str) -> list[list[str]]:
    """The rows of a sheet of a workbook, its first unless named, as text."""
    try:
        with quiet():
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            try:
                names = {low(one.title): one for one in book.worksheets}
                found = names.get(low(sheet)) if sheet else book.worksheets[0]
                rows = found and [[_text(cell) for cell in row] for row in found.values]
            finally:
                book.close()
    except Exception:
        # openpyxl raises nearly anything on a broken workbook, and its texts may quote a cell.
        raise DataError(
            "must be a readable XLSX workbook", where=path.name, fix="Save it again, or as CSV"
        ) from None
    if rows is None:
        raise DataError(
            "the workbook must have the sheet that site.toml names",
            value=sheet,
            where=path.name,
            fix="Correct labels.sheet",
        )
    return rows


def _text(cell: object) -> str:
    if cell is None:
        return ""
    # A workbook keeps 1 and an id made of digits as floating-point numbers.
    text = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
    return _Number(text) if isinstance(cell, int | float) else text


def _separated(path: Path, header: int) -> list[list[str]]:
    try:
        text = _decoded(path.read_bytes())
        lines = re.split(r"\r\n|\r|\n", text)
        names = next((line for line in lines[header - 1 :] if line.strip()), "")
        delimiter = max(",;\t", key=names.count)
        # Not str.splitlines, which ends a row at an ellipsis of Windows read as Latin-1, and at
        # what word processors put between paragraphs.
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (OSError, csv.Error):
        # The error's own text may quote a row.
        raise DataError(
            "must be a readable CSV file", where=path.name, fix="Save it as UTF-8 CSV"
        ) from None


def _decoded(raw: bytes) -> str:
    for encoding in ("utf-8-sig", "cp1252"):
        with suppress(UnicodeDecodeError):
            return raw.decode(encoding)
    return raw.decode("latin-1")  # to which any byte is a letter


def _entry(
    column: str,
    header: list[str],
    lower: list[str],
    cells: list[str],
    patient: int | None,
    task: Task | None,
    options: LabelOptions,
) -> Entry:
    padded = [c.strip() for c in cells] + [""] * (len(header) - len(cells))
    row = dict(zip(lower, padded, strict=False))
    label, reason = _label(row, task, options)
    taken = {column, "patient", "split", *_labels(task, options)}
    further = {
        name.strip(): value
        for name, low, value in zip(header, lower, padded, strict=False)
        if low not in taken
    }
    for name, one in options.beside.items():
        further[name] = one.of(row.get(low(one.column or name), ""))
    split = SPLIT_NAMES.get(row.get("split", "").lower())
    whose = "" if patient is None else padded[patient]
    place = lower.index(column)
    number = place < len(cells) and isinstance(cells[place], _Number)
    if number and len(row[column].lstrip("-")) > _DIGITS:  # the workbook has rounded it
        label, reason = None, rule_codes.NO_LABEL
    return Entry(row[column], label, reason, whose, split, further, number)


def _labels(task: Task | None, options: LabelOptions) -> set[str]:
    """Columns that hold labels, in lower case."""
    classes = {low(name) for name in task.classes} if task else set()
    return {"label", low(options.column), *map(low, options.columns), *classes}


def _label(
    row: dict[str, str], task: Task | None, options: LabelOptions
) -> tuple[tuple[int, ...] | None, str]:
    if task is None or not task.has_labels:
        return None, ""
    try:
        return options.label_of_row(row, task), ""
    except DataError as error:
        return None, rule_codes.reason_of(error)


def _merged(known: Entry, entry: Entry, options: LabelOptions) -> Entry:
    same = (known.patient, known.split) == (entry.patient, entry.split)
    # What is known beside the image must be said once: two rows that differ say nothing.
    both = {k: v if entry.columns.get(k) == v else "" for k, v in known.columns.items()}
    known = replace(known, columns=both)
    if same and options.rows == "add" and known.label is not None and entry.label is not None:
        return replace(known, label=tuple(map(max, known.label, entry.label)))
    # The same row twice is harmless; two rows that disagree are not.
    same = same and known.label == entry.label
    return known if same else Entry(known.key, None, rule_codes.CONFLICTING, known.patient)
