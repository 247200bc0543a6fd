"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes
    ----------
    name : str
        What was looked at.
    status : str
        ``pass``, ``warn`` or ``fail``.
    found : str
        What it is; no secret and no patient is ever in it.
    fix : str
        The next step; "" where none is needed.
    """

    name: str
    status: Status
    found: str
    fix: str = ""
