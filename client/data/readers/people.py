"""Whose the images of a folder are: a table's word, under the site's rules for odd ones."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from client.data import reasons
from client.data.label_options import LabelOptions, low
from client.data.patient_options import PatientOptions
from client.data.tables import Entry, Table, read_table
from fedward.errors import DataError

KEYS: Final = ("image", "file")
_IMAGE: Final = "\\image\\"  # before an image that stands for its patient


@dataclass(frozen=True)
class People:
    """What is known of the patients of a folder.

    Attributes
    ----------
    table : Table or None
        ``patients.csv``; without it, and without a column of patients beside the labels, each
        image counts as a patient.
    options : PatientOptions
        What missing and shared ids mean; a rule for studies or series is one for images here.
    named : bool
        Whether the table of labels names patients too.
    column : str
        The column of patients that the site names; "" where it names none.
    """

    table: Table | None = None
    options: PatientOptions = field(default_factory=PatientOptions)
    named: bool = False
    column: str = ""

    def beside(self, labels: Table) -> People:
        """The same beside a table of labels, in whose column of patients no cell may be empty.

        Raises
        ------
        DataError
            No table has the column that the site names.
        """
        self.check(labels)
        return replace(self, named=any(entry.patient for entry in labels.entries.values()))

    def check(self, *labels: Table) -> None:
        """Hold the tables against the column that the site names.

        Raises
        ------
        DataError
            None of them has it.
        """
        tables = [*labels, *([self.table] if self.table else [])]
        if self.column and low(self.column) not in [table.patients for table in tables]:
            raise DataError(
                "a table must have the column of patients that the site names",
                value=self.column,
                fix="Correct labels.patient_column",
                where="labels.patient_column",
            )

    def knows(self, patient: str) -> bool:
        """Whether :meth:`of` gave a patient's id, and not the image in place of a patient."""
        return bool(self.table or self.named) and not patient.startswith(_IMAGE)

    def find(self, keys: tuple[str, ...]) -> Entry | None:
        """What ``patients.csv`` says of an image."""
        return self.table.find(keys) if self.table else None

    def of(self, keys: tuple[str, ...], own: str = "") -> str:
        """The patient of an image: the label table's word, then ``patients.csv``, then the file.

        Parameters
        ----------
        keys : tuple of str
            What tables may call the image; its own name first.
        own : str
            The label table's word.

        Raises
        ------
        DataError
            "no patient id" or "shared patient id": by the rule the image is left out.
        """
        if not (own or self.table or self.named):
            return keys[0]
        word = unicodedata.normalize("NFC", own or self._listed(keys)).strip()
        nobody = self.options.nobody(word)
        rule = {"": "keep", "missing": self.options.missing, "shared": self.options.shared}[nobody]
        if rule == "keep":
            return word
        if rule in ("study", "series"):
            return _IMAGE + keys[0]
        raise reasons.unusable(
            reasons.NO_PATIENT if nobody == "missing" else reasons.SHARED_PATIENT
        )

    def _listed(self, keys: tuple[str, ...]) -> str:
        entry = self.find(keys)
        return "" if entry is None or entry.reason else entry.patient


def people_of(
    root: Path, options: PatientOptions | None = None, labels: LabelOptions | None = None
) -> People:
    """The patients of a folder, with its ``patients.csv`` where there is one.

    Raises
    ------
    DataError
        The table cannot be read.
    """
    path = root / "patients.csv"
    named = LabelOptions(patient_column=labels.patient_column if labels else "")
    table = read_table(path, KEYS, None, named) if path.is_file() else None
    return People(table, options or PatientOptions(), column=named.patient_column)
