"""Label and patient tables (CSV or XLSX) that lie beside the images."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import openpyxl

from client.data import labels, reasons
from client.data.quiet import quiet
from client.data.types import SplitName
from fedward.errors import DataError
from fedward.plan.schema import Task

SPLIT_NAMES: Final[dict[str, SplitName]] = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation",
    "validation": "validation", "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What a table says of one image: a label or the reason why there is none."""

    key: str
    label: tuple[int, ...] | None
    reason: str = ""
    patient: str = ""
    split: SplitName | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Entries by key; `column` is the header (lower case) that the keys come from."""

    column: str
    entries: dict[str, Entry]

    def find(self, keys: Iterable[str]) -> Entry | None:
        """The entry of the first key that the table has."""
        return next((self.entries[key] for key in keys if key in self.entries), None)


def read_table(path: Path, columns: Sequence[str], task: Task | None) -> Table:
    """Read a table keyed by the first of `columns` (lower case) that it has.

    Parameters
    ----------
    path : Path
        CSV with a header (comma, semicolon or tab; UTF-8 or Latin-1), or XLSX (its first sheet).
    task : Task or None
        What the labels are for; None for a table without labels.

    Raises
    ------
    DataError
        The file cannot be read or has no key column.
    """
    header, rows = _rows(path)
    lower = [name.strip().lower() for name in header]
    column = next((name for name in columns if name in lower), None)
    if column is None:
        raise DataError(
            f"needs a column {' or '.join(columns)}", where=path.name, fix="Name its key column so"
        )
    entries: dict[str, Entry] = {}
    for cells in rows:
        entry = _entry(column, header, lower, cells, task)
        if entry.key:
            known = entries.get(entry.key)
            entries[entry.key] = entry if known is None else _merged(known, entry)
    return Table(column, entries)


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    table = _workbook(path) if path.suffix.lower() == ".xlsx" else _separated(path)
    if not table:
        raise DataError("must have a header row", where=path.name, fix="Add the column names")
    return table[0], table[1:]


def _workbook(path: Path) -> list[list[str]]:
    """The filled rows of a workbook's first sheet, as text."""
    try:
        with quiet():
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            try:
                rows = [[_text(cell) for cell in row] for row in book.worksheets[0].values]
            finally:
                book.close()
    except Exception:
        # openpyxl raises nearly anything on a broken workbook, and its texts may quote a cell.
        raise DataError(
            "must be a readable XLSX workbook", where=path.name, fix="Save it again, or as CSV"
        ) from None
    return [row for row in rows if any(row)]


def _text(cell: object) -> str:
    if cell is None:
        return ""
    # A workbook keeps 1 and an id made of digits as floating-point numbers.
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _separated(path: Path) -> list[list[str]]:
    try:
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        first = text.split("\n", 1)[0]
        delimiter = max(",;\t", key=first.count)
        return [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if any(row)]
    except (OSError, csv.Error):
        # The error's own text may quote a row.
        raise DataError(
            "must be a readable CSV file", where=path.name, fix="Save it as UTF-8 CSV"
        ) from None


def _entry(
    column: str, header: list[str], lower: list[str], cells: list[str], task: Task | None
) -> Entry:
    padded = [c.strip() for c in cells] + [""] * (len(header) - len(cells))
    row = dict(zip(lower, padded, strict=False))
    label, reason = _label(row, task)
    taken = {column, "label", "patient", "split"}
    taken |= {name.lower() for name in task.classes} if task else set()
    further = {
        name.strip(): value
        for name, low, value in zip(header, lower, padded, strict=False)
        if low not in taken
    }
    split = SPLIT_NAMES.get(row.get("split", "").lower())
    return Entry(row[column], label, reason, row.get("patient", ""), split, further)


def _label(row: dict[str, str], task: Task | None) -> tuple[tuple[int, ...] | None, str]:
    if task is None or task.kind != "classification":
        return None, ""
    try:
        return labels.label_of_row(row, task), ""
    except DataError as error:
        return None, reasons.reason_of(error)


def _merged(known: Entry, entry: Entry) -> Entry:
    # The same row twice is harmless; two rows that disagree are not.
    same = (known.label, known.patient) == (entry.label, entry.patient)
    return known if same else Entry(known.key, None, reasons.CONFLICTING, known.patient)
