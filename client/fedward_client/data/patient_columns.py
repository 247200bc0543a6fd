"""Find the column of a table that names the patients."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from fedward.errors import DataError
from fedward_client.data.options import low

# Compared without case, blanks and marks: `Patient ID`, `patient_id` and `PatientID` are one.
PATIENT_COLUMNS: Final = (
    "patient",
    "patientid",
    "patientkey",
    "patientnumber",
    "patientno",
    "subject",
    "subjectid",
    "participant",
    "participantid",
    "case",
    "caseid",
    "pid",
)


def patient_column(
    lower: Sequence[str],
    rows: Sequence[Sequence[str]],
    taken: Collection[str],
    named: str,
    table: str,
) -> int | None:
    """The place of the column that names the patients; None where there is none.

    Parameters
    ----------
    lower : sequence of str
        The column names in lower case.
    rows : sequence
        The cells; a row may be shorter than the header.
    taken : collection of str
        Columns (lower case) that mean something else: the key, labels, classes.
    named : str
        The column that the site names; it leads where the table has it.
    table : str
        The table's file name, for messages.

    Raises
    ------
    DataError
        Two columns of such a name divide the images in different ways.
    """
    if named and low(named) in lower:
        return lower.index(low(named))
    places = [
        k
        for word in PATIENT_COLUMNS
        for k, name in enumerate(lower)
        if bare(name) == word and name not in taken
    ]
    filled = [k for k in places if any(cell(row, k) for row in rows)] or places[:1]
    for other in filled[1:]:
        pairs = {(cell(row, filled[0]), cell(row, other)) for row in rows}
        if not len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}):
            raise DataError(
                "columns that name the patients must agree",
                value=f"{lower[filled[0]]}, {lower[other]}",
                where=table,
                fix="Name the one that counts by labels.patient_column, or remove the other",
            )
    return filled[0] if filled else None


def bare(name: str) -> str:
    """A column's name without case, blanks and marks."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def cell(row: Sequence[str], place: int) -> str:
    """A cell of a row that may be too short."""
    return row[place].strip() if place < len(row) else ""
