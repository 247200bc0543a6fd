"""What a dataset holds, what was left out of it and why, and what is risky about it.

All of it is counts and words of the standard; a report names no person and no file.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from client.cohort.balance import Counts, balance
from client.cohort.build import usable, why_left_out, why_unreadable
from client.cohort.risks import Risk, find_risks, unlabelled_risks
from client.config import DatasetSection
from client.data import reasons
from client.data.split import split_by_patient
from client.data.types import Dataset, Sample
from client.index.extract import Extractor
from client.index.store import Index
from fedward.errors import DataError
from fedward.plan.schema import Split

_WORD: Final = re.compile(r"[A-Za-z0-9 _.,()/&+-]{1,64}")
_NUMBER: Final = re.compile(r"\d{5,}|\d{4}-\d{2}")  # what could be a date, an id or part of one
_IMAGES: Final = (
    "reason = '' AND marked = '' AND rows > 0 AND format IN ('dicom', 'nifti', 'picture')"
)


class Range(BaseModel):
    """Pixels of a modality, as the modality means them (HU for CT)."""

    model_config = ConfigDict(extra="forbid")
    lowest: float = Field(description="of all images")
    highest: float = Field(description="of all images")
    typical_lowest: float = Field(description="median over images of each one's lowest pixel")
    typical_highest: float = Field(description="median over images of each one's highest pixel")


class DatasetReport(BaseModel):
    """The answer of ``fedward-client data report``."""

    model_config = ConfigDict(extra="forbid")
    dataset: str
    files: int = Field(description="files in the dataset, whatever they are")
    instances: int = Field(description="files with an image that could be decoded; no masks")
    patients: int = Field(description="patients of these; outside DICOM those of the samples")
    studies: int
    series: int
    modality: Counts = Field(description="instances by modality; the next ones likewise")
    body_part: Counts
    manufacturer: Counts
    object_type: Counts
    transfer_syntax: Counts
    size: Counts = Field(description="rows x columns")
    spacing: Counts = Field(description="mm between rows x columns")
    intensity: dict[str, Range] = Field(description="range of the pixels by modality")
    samples: int = Field(description="images or volumes that a study could use")
    sample_patients: int = Field(description="patients of these")
    images_by_class: Counts = Field(
        description="samples of each class; of a segmentation those whose masks mark it (all "
        "slices of a series, if a DICOM mask of it marks any)"
    )
    patients_by_class: Counts = Field(description="patients with each class; likewise")
    pixels_by_class: Counts = Field(
        description="segmentation: pixels that the masks mark; none for contours"
    )
    split: Counts = Field(description="patients of each part, by the usual division")
    left_out: Counts = Field(description="files and rows that cannot serve, by reason")
    risks: list[Risk]


def make_report(
    name: str, dataset: DatasetSection, index: Index, extract: Extractor
) -> DatasetReport:
    """Count what is in an index, and what a study could make of it.

    Before there are labels or masks, that they are missing is a risk, and there are no samples.

    Raises
    ------
    DataError
        The dataset has a broken table of labels.
    """
    try:
        found = usable(dataset, index, extract)
        left_out = why_left_out(dataset, found, index, extract)
        risks = find_risks(dataset, found, index, extract, left_out)
    except DataError as error:
        if error.where not in (reasons.NO_TABLE, reasons.NO_MASKS):
            raise
        found, left_out = Dataset(()), why_unreadable(index)
        risks = unlabelled_risks(dataset, error, index, left_out)
    classes = balance(dataset, found.samples, index, extract)
    people = len({sample.patient for sample in found.samples})
    return DatasetReport(
        dataset=name, files=index.count(), instances=_number(index, "count(*)"),
        patients=_distinct(index, "patient") if extract.format == "dicom" else people,
        studies=_distinct(index, "study"),
        series=_distinct(index, "series"), modality=_by(index, "modality"),
        body_part=_by(index, "body_part"), manufacturer=_by(index, "manufacturer"),
        object_type=_by(index, "object_type"), transfer_syntax=_by(index, "syntax"),
        size=_by(index, "rows || ' x ' || columns"), spacing=_spacings(index),
        intensity=_ranges(index), samples=len(found.samples),
        sample_patients=people, images_by_class=classes.images, patients_by_class=classes.patients,
        pixels_by_class=classes.pixels,
        split=_split(found.samples), left_out=dict(sorted(left_out.items())),
        risks=risks,
    )  # fmt: skip


def _number(index: Index, what: str) -> int:
    row = index.connection.execute(f"SELECT {what} FROM files WHERE {_IMAGES}").fetchone()
    return int(row[0])


def _distinct(index: Index, column: str) -> int:
    return _number(index, f"count(DISTINCT nullif({column}, ''))")


def _by(index: Index, column: str) -> Counts:
    rows = index.connection.execute(
        f"SELECT {column}, count(*) FROM files WHERE {_IMAGES} GROUP BY 1 ORDER BY 2 DESC, 1"
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


def _spacings(index: Index) -> Counts:
    counts: Counter[str] = Counter()
    rows = index.connection.execute(
        f"SELECT spacing, count(*) FROM files WHERE {_IMAGES} GROUP BY 1"
    )
    for text, count in rows:
        sides = [float(side) for side in text.strip("[]").split(",") if side.strip()]
        counts[" x ".join(f"{side:.3g}" for side in sides)] += count
    return dict(counts.most_common())


def _ranges(index: Index) -> dict[str, Range]:
    rows = index.connection.execute(
        f"SELECT modality, min(low), max(high), count(*) FROM files WHERE {_IMAGES} "
        "AND low IS NOT NULL GROUP BY 1 ORDER BY 1"
    ).fetchall()
    return {
        safe_word(modality): Range(
            lowest=low, highest=high, typical_lowest=_median(index, "low", modality, count),
            typical_highest=_median(index, "high", modality, count),
        )
        for modality, low, high, count in rows
    }  # fmt: skip


def _median(index: Index, column: str, modality: str, count: int) -> float:
    """The lower median, found by the database."""
    row = index.connection.execute(
        f"SELECT {column} FROM files WHERE {_IMAGES} AND low IS NOT NULL AND modality = ? "
        f"ORDER BY 1 LIMIT 1 OFFSET ?", (modality, (count - 1) // 2),
    ).fetchone()  # fmt: skip
    return float(row[0])


def _split(samples: tuple[Sample, ...]) -> Counts:
    if len({sample.patient for sample in samples}) < 2:
        return {}
    patients = [sample.patient for sample in samples]
    parts = split_by_patient(patients, [sample.split for sample in samples], Split())
    return {part: len({patients[k] for k in indices}) for part, indices in parts.items()}
