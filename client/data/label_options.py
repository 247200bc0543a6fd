"""Where a table of labels lies and what its words mean, as a site says it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from client.data import labels, reasons
from client.data.mask_options import plain
from fedward.plan.schema import Task

TABLES: Final = ("labels.csv", "labels.xlsx")
SEPARATORS: Final = re.compile(r"[|;]")


@dataclass(frozen=True)
class LabelOptions:
    """How a table is read.

    Attributes
    ----------
    file : Path or None
        The table; None: ``labels.csv`` or ``labels.xlsx`` in the dataset.
    sheet : str
        Of a workbook; "": its first.
    header : int
        The row of the column names, from 1.
    key, means : str
        The column of the keys, and what they are (lower case); "": found by name.
    column : str
        The column of the label.
    patient_column : str
        The column that names the patients, of this table or of ``patients.csv``; "": found by
        name.
    columns : mapping
        Column of 0 and 1 to the name of its class.
    words : mapping
        Word of the table (any case) to the name of a class; others are names or numbers of classes.
    none : tuple of str
        Multi-label: words (any case) for none of the classes.
    unlabelled : tuple of str
        Words (any case) that leave an image without a label.
    yes, no : tuple of str
        Words (any case; "" is an empty cell) of a class's own column beside 1 and 0, yes and no,
        true and false.
    rows : str
        "agree": rows of one image must say the same; "add": multi-label, their classes add up.
    """

    file: Path | None = None
    sheet: str = ""
    header: int = 1
    key: str = ""
    means: str = ""
    column: str = "label"
    patient_column: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    none: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()
    rows: Literal["agree", "add"] = "agree"

    def label_of_row(self, row: Mapping[str, str], task: Task) -> tuple[int, ...]:
        """The label of a table row, whose column names are in lower case.

        Raises
        ------
        DataError
            "no label", "unknown class" or "conflicting labels".
        """
        found = {name: text for name, text in row.items() if name != "label"}
        of_class = {low(name): low(to) for name, to in self.columns.items()}
        for name in [*map(low, task.classes), *of_class]:
            if name in row:
                found[of_class.get(name, name)] = self._flag(row[name])
        if (column := low(self.column)) in row:
            if self._is_one(row[column], self.unlabelled):
                raise reasons.unusable(reasons.NO_LABEL)
            if task.multi_label and self._is_one(row[column], self.none):
                return labels.flags(set(), task)
            found["label"] = self._named(row[column], task)
        return labels.label_of_row(found, task)

    def table(self, root: Path) -> Path | None:
        """Where the table lies; None when there is none."""
        inside = (root / name for name in TABLES)
        return self.file or next((path for path in inside if path.is_file()), None)

    def class_of_folder(self, name: str, task: Task) -> int:
        """The class that a folder of images is of.

        Raises
        ------
        DataError
            "no label" or "unknown class".
        """
        if not name or self._is_one(name, self.unlabelled):
            raise reasons.unusable(reasons.NO_LABEL)
        known = {plain(word): to for word, to in self.words.items()}
        return labels.class_index(known.get(plain(name), name), task)

    def _flag(self, text: str) -> str:
        if self._is_one(text, self.unlabelled):
            raise reasons.unusable(reasons.NO_LABEL)
        return "1" if self._is_one(text, self.yes) else "0" if self._is_one(text, self.no) else text

    @staticmethod
    def _is_one(text: str, words: tuple[str, ...]) -> bool:
        return plain(text) in map(plain, words)

    def _named(self, text: str, task: Task) -> str:
        known = {plain(word): name for word, name in self.words.items()}
        if plain(text) in known or not task.multi_label:
            return known.get(plain(text), text)
        return "|".join(known.get(plain(part), part) for part in SEPARATORS.split(text))


def low(text: str) -> str:
    """A column's name as tables are searched for it."""
    return text.strip().lower()
