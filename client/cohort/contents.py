"""Counts of the images in an index, in words of the standard."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from client.cohort.balance import Counts
from client.index.store import Index

_WORD: Final = re.compile(r"[A-Za-z0-9 _.,()/&+-]{1,64}")
_NUMBER: Final = re.compile(r"\d{5,}|\d{4}-\d{2}")  # what could be a date, an id or part of one
IMAGES: Final = (
    "reason = '' AND marked = '' AND rows > 0 AND format IN ('dicom', 'nifti', 'picture')"
)


class Range(BaseModel):
    """Pixels of a modality, as the modality means them (HU for CT)."""

    model_config = ConfigDict(extra="forbid")
    lowest: float = Field(description="of all images")
    highest: float = Field(description="of all images")
    typical_lowest: float = Field(description="median over images of each one's lowest pixel")
    typical_highest: float = Field(description="median over images of each one's highest pixel")


def number(index: Index, what: str) -> int:
    """One number of all images, as SQL counts it."""
    row = index.connection.execute(f"SELECT {what} FROM files WHERE {IMAGES}").fetchone()
    return int(row[0])


def distinct(index: Index, column: str) -> int:
    """Different values of a column, where there is one."""
    return number(index, f"count(DISTINCT nullif({column}, ''))")


def by(index: Index, column: str) -> Counts:
    """Images by the value of a column."""
    rows = index.connection.execute(
        f"SELECT {column}, count(*) FROM files WHERE {IMAGES} GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    counts: Counter[str] = Counter()
    for value, count in rows:
        counts[safe_word(str(value))] += count
    return dict(counts.most_common())


def safe_word(text: str) -> str:
    """A free text as it may be shown: "other" when it could hold an id or a date."""
    if not text:
        return "not stated"
    return text if _WORD.fullmatch(text) and not _NUMBER.search(text) else "other"


def spacings(index: Index) -> Counts:
    """Images by the distance of their pixels, mm."""
    counts: Counter[str] = Counter()
    rows = index.connection.execute(
        f"SELECT spacing, count(*) FROM files WHERE {IMAGES} GROUP BY 1"
    )
    for text, count in rows:
        sides = [float(side) for side in text.strip("[]").split(",") if side.strip()]
        counts[" x ".join(f"{side:.3g}" for side in sides)] += count
    return dict(counts.most_common())


def ranges(index: Index) -> dict[str, Range]:
    """The range of the pixels by modality."""
    rows = index.connection.execute(
        f"SELECT modality, min(low), max(high), count(*) FROM files WHERE {IMAGES} "
        "AND low IS NOT NULL GROUP BY 1 ORDER BY 1"
    ).fetchall()
    return {
        safe_word(modality): Range(
            lowest=low,
            highest=high,
            typical_lowest=_median(index, "low", modality, count),
            typical_highest=_median(index, "high", modality, count),
        )
        for modality, low, high, count in rows
    }


def _median(index: Index, column: str, modality: str, count: int) -> float:
    """The lower median, found by the database."""
    row = index.connection.execute(
        f"SELECT {column} FROM files WHERE {IMAGES} AND low IS NOT NULL AND modality = ? "
        f"ORDER BY 1 LIMIT 1 OFFSET ?",
        (modality, (count - 1) // 2),
    ).fetchone()
    return float(row[0])
