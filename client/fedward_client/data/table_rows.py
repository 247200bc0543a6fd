"""Rows of a table as numbers beside the images: how a plan's columns are encoded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Column, TableInput
from fedward.rule_codes import RuleCode

Cells = Mapping[str, str]
Row = NDArray[np.float32]
MISSING: Final = ("", "?", "-", "na", "n/a", "nan", "null", "none", "unknown")
"""What a cell says, in any case, where nothing is known, unless the plan lists it as a value."""


def encoded(table: TableInput, cells: Cells) -> Row:
    """One row of a table as the network reads it.

    Parameters
    ----------
    table : TableInput
        The plan's columns.
    cells : mapping
        Column, in any case, to what stands in the row. A column that is not there is missing.

    Returns
    -------
    NDArray
        ``(table.width,)`` float32, column after column: of a number one in −1 to 1; of a category
        one for each value, 1 where it is that one; then, where the value may be missing, 1 where
        it is.

    Raises
    ------
    DataError
        "value missing in table", "value outside the plan's range" or "unknown value in table".
    """
    found = {name.strip().casefold(): text.strip() for name, text in cells.items()}
    parts = [_numbers(column, found.get(column.name.casefold(), "")) for column in table.column]
    return np.array([number for part in parts for number in part], np.float32)


def _numbers(column: Column, text: str) -> list[float]:
    size = len(column.values) or 1
    values = [one.casefold() for one in column.values]
    word = text.casefold()
    if word in MISSING and word not in values:
        if not column.missing:
            raise rule_codes.unusable(rule_codes.VALUE_MISSING)
        return [0.0] * size + [1.0]
    end = [0.0] if column.missing else []
    if column.range is not None:
        return [_scaled(text, *column.range), *end]
    if word not in values:
        raise rule_codes.unusable(rule_codes.VALUE_UNKNOWN)
    return [*(float(word == one) for one in values), *end]


def _scaled(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise rule_codes.unusable(rule_codes.VALUE_UNKNOWN) from None
    if not (math.isfinite(value) and low <= value <= high):
        raise rule_codes.unusable(rule_codes.VALUE_RANGE)
    return 2 * (value - low) / (high - low) - 1


def rows_of(table: TableInput, cells: Sequence[Cells]) -> list[Row | str]:
    """The row of each image, or the reason why it is left out.

    Parameters
    ----------
    table : TableInput
        The plan's columns.
    cells : sequence of mapping
        Of each image, see :func:`encoded`.

    Raises
    ------
    DataError
        No image has a column that the plan names: a table without it is another table, not one
        whose every value is missing.
    """
    if (absent := absent_columns(table, cells)) and cells:
        raise DataError(
            RuleCode.TABLE_COLUMN,
            values={"column": table.column.index(absent[0]) + 1},
            value=absent[0].name,
            fix="Add the column to the table of labels, or name it in "
            "[datasets.NAME.table] of site.toml and freeze the dataset again",
            where="table",
        )
    return [_row(table, one) for one in cells]


def _row(table: TableInput, cells: Cells) -> Row | str:
    try:
        return encoded(table, cells)
    except DataError as error:
        return rule_codes.reason_of(error)


def absent_columns(table: TableInput, cells: Sequence[Cells]) -> list[Column]:
    """The plan's columns that no image has."""
    known = {name.strip().casefold() for one in cells for name in one}
    return [column for column in table.column if column.name.casefold() not in known]


def outcomes(column: Column, cells: Sequence[Cells]) -> Counter[str]:
    """How many images give a column's value, and how many do not, by reason."""
    alone, found = TableInput(column=(column,)), Counter[str]()
    for one in cells:
        row = _row(alone, one)
        if isinstance(row, str):
            found[row] += 1
        else:
            found["missing" if column.missing and row[-1] else "given"] += 1
    return found
