"""How a partition is written: ``folders``, ``iid``, ``dirichlet:0.5`` and so on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedward.errors import DataError

Kind = Literal["folders", "iid", "dirichlet", "shards", "quantity", "column"]
FORMS = "folders, iid, dirichlet:ALPHA, shards:K, quantity:ALPHA or column:NAME"


@dataclass(frozen=True)
class Partition:
    """How patients are divided among sites; see :func:`parse_partition`.

    Attributes
    ----------
    kind : str
        The first word.
    alpha : float or None
        Concentration of the Dirichlet distribution: small is uneven.
    shards : int or None
        Shards that each site takes.
    column : str or None
        Column of the label table whose values are the sites.
    """

    kind: Kind
    alpha: float | None = None
    shards: int | None = None
    column: str | None = None


def parse_partition(text: str) -> Partition:
    """Read ``folders``, ``iid``, ``dirichlet:0.5``, ``shards:2``, ``quantity:1``, ``column:A``.

    Raises
    ------
    DataError
        It is none of these, or its number is not above 0.
    """
    how, colon, value = text.partition(":")
    match how, colon:
        case (("folders" | "iid"), ""):
            return Partition(how)
        case (("dirichlet" | "quantity"), ":"):
            return Partition(how, alpha=_above_zero(text, value))
        case "shards", ":":
            return Partition(how, shards=_whole(text, value))
        case "column", ":" if value.strip():
            return Partition(how, column=value.strip())
    raise _unknown("a partition must have a known form", text)


def _above_zero(text: str, value: str) -> float:
    try:
        alpha = float(value)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise _unknown("ALPHA must be a number above 0", text)
    return alpha


def _whole(text: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and int(value[:9]) > 0 and len(value) < 9):
        raise _unknown("K must be a whole number above 0", text)
    return int(value)


def _unknown(rule: str, text: str) -> DataError:
    return partition_error(rule, text, f"Write {FORMS}")


def partition_error(rule: str, value: object = None, fix: str = "") -> DataError:
    """The error for a partition that cannot be made."""
    return DataError(rule, value=value, fix=fix, where="partition")
