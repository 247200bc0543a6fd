"""Report on a dataset: its contents, the left-out files by reason, and its risks.

All of it is counts and words of the standard; a report names no person and no file.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Split
from fedward_client.cohort.freeze import classes_of, usable, why_left_out, why_unreadable
from fedward_client.cohort.risks import Risk, find_risks, unlabelled_risks
from fedward_client.config import DatasetSection
from fedward_client.data.hints import label_hints
from fedward_client.data.readers.dicom.headers import Listen, unheard
from fedward_client.data.readers.dicom.mask_references import MaskFile
from fedward_client.data.readers.dicom.masks import SegmentedFrame, SegmentedSeries, SegmentedVolume
from fedward_client.data.readers.dicom.nifti_masks import PlacedNiftiMask
from fedward_client.data.readers.images import PictureMask
from fedward_client.data.readers.nifti import NiftiMask
from fedward_client.data.sample import Dataset, Sample, unnamed
from fedward_client.data.split import split_by_patient
from fedward_client.index.extract import Extractor
from fedward_client.index.store import Index

# How often each class occurs: by labels, or by what masks mark.

Counts = dict[str, int]


@dataclass
class Balance:
    """Samples, patients, and marked pixels of each class.

    Attributes
    ----------
    images, patients : dict
        By class. Of a segmentation: those whose masks mark it; all slices of a series count for
        what its DICOM masks mark anywhere.
    pixels : dict
        Segmentation with label maps: pixels that each class has in all masks together; contours
        count as none.
    """

    images: Counts
    patients: Counts
    pixels: Counts


def balance(
    dataset: DatasetSection, samples: Sequence[Sample], index: Index, extract: Extractor
) -> Balance:
    """Count the classes of samples."""
    marks, masks = _Marks(dataset, index, extract), dataset.masks_mark
    images: Counter[int] = Counter()
    patients: dict[int, set[str]] = defaultdict(set)
    for sample in samples:
        of = classes_of(dataset, sample.label, sample.boxes)
        for k in set(marks.classes(sample) if masks else of):
            images[k] += 1
            patients[k].add(sample.patient)
    names = list(enumerate(dataset.classes))
    pixels = {name: marks.pixels[k] for k, name in names} if marks.pixels else {}
    return Balance(
        {name: images[k] for k, name in names},
        {name: len(patients[k]) for k, name in names},
        pixels,
    )


@dataclass
class _Marks:
    """What masks mark, each file looked up once."""

    dataset: DatasetSection
    index: Index
    extract: Extractor
    pixels: Counter[int] = field(default_factory=Counter)
    of_series: dict[int, tuple[SegmentedSeries, frozenset[int]]] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)

    def classes(self, sample: Sample) -> frozenset[int]:
        """The classes that a sample's mask marks, 0 being the first."""
        match sample.mask:
            case SegmentedFrame() | SegmentedVolume() as mask:
                known = self.of_series.get(id(mask.series))
                if known is None:
                    found = frozenset(k for file in mask.series.files for k in self._of_file(file))
                    known = self.of_series[id(mask.series)] = (mask.series, found)
                return known[1]
            case NiftiMask() | PlacedNiftiMask() | PictureMask() as mask:
                return frozenset(self._of_map(mask.path))
            case _:
                return frozenset()

    def _of_file(self, file: MaskFile) -> Iterator[int]:
        labels = dict(file.labels)
        for number, count in self._marked(file.path).items():
            if number in labels and count:
                self._add(file.path, labels[number] - 1, count * (file.kind != "contours"))
                yield labels[number] - 1
        self.seen.add(file.path)

    def _of_map(self, path: Path) -> Iterator[int]:
        last = len(self.dataset.classes) - 1
        for value, count in self._marked(path).items():
            if last == 0 or value - 1 <= last:  # one class is all that is marked
                self._add(path, 0 if last == 0 else value - 1, count)
                yield 0 if last == 0 else value - 1
        self.seen.add(path)

    def _add(self, path: Path, label: int, count: int) -> None:
        if path not in self.seen and count:
            self.pixels[label] += count

    def _marked(self, path: Path) -> dict[int, int]:
        row = self.index.connection.execute(
            "SELECT marked FROM files WHERE path = ?", (self.extract.name(path),)
        ).fetchone()
        found = json.loads(row[0]) if row and row[0] else {}
        return {int(number): int(count) for number, count in found.items()}


# Counts of the images in an index, in words of the standard.

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
        counts[" x ".join(f"{side:.3g}" for side in sides) or "not stated"] += count
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
    intent: Counts = Field(default={}, description="for presentation, or for processing")
    burned_in: Counts = Field(default={}, description="by `BurnedInAnnotation`")
    identity_removed: Counts = Field(default={}, description="by `PatientIdentityRemoved`")
    visual_features: Counts = Field(default={}, description="by `RecognizableVisualFeatures`")
    deidentification: Counts = Field(
        default={}, description="by whether the method is stated (`DeidentificationMethod`)"
    )
    object_type: Counts
    transfer_syntax: Counts
    size: Counts = Field(description="rows x columns")
    spacing: Counts = Field(description="mm between rows x columns")
    slice_distance: Counts = Field(description="samples by mm between slices: DICOM volumes")
    intensity: dict[str, Range] = Field(description="range of the pixels by modality")
    samples: int = Field(description="images or volumes that a study could use")
    sample_patients: int = Field(description="patients of these")
    images_are_patients: bool = Field(
        default=False, description="images name no patients, and each counts as one"
    )
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
    hints: list[str] = Field(
        default=[],
        description="how masks are told from images; labels that do not fit: columns and words "
        "found, and sought",
    )


def make_report(
    name: str,
    dataset: DatasetSection,
    index: Index,
    extract: Extractor,
    listen: Listen = unheard,
) -> DatasetReport:
    """Count what is in an index, and what a study could make of it.

    Before there are labels or masks, that they are missing is a risk, and there are no samples.
    `listen` hears how many headers are read, and of how many.

    Raises
    ------
    DataError
        The dataset has a broken table of labels.
    """
    try:
        found = usable(dataset, index, extract, listen)
        left_out = why_left_out(dataset, found, index, extract)
        risks = find_risks(dataset, found, index, extract, left_out)
    except DataError as error:
        if error.where not in (rule_codes.NO_TABLE, rule_codes.NO_MASKS):
            raise
        found, left_out = Dataset(()), why_unreadable(index)
        risks = unlabelled_risks(dataset, error, index, left_out)
    classes = balance(dataset, found.samples, index, extract)
    people = len({sample.patient for sample in found.samples})
    return DatasetReport(
        dataset=name,
        files=index.count(),
        instances=number(index, "count(*)"),
        patients=distinct(index, "patient") if extract.format == "dicom" else people,
        studies=distinct(index, "study"),
        series=distinct(index, "series"),
        modality=by(index, "modality"),
        body_part=by(index, "body_part"),
        manufacturer=by(index, "manufacturer"),
        intent=by(index, "intent"),
        burned_in=by(index, "burned_in"),
        identity_removed=by(index, "identity_removed"),
        visual_features=by(index, "visual_features"),
        deidentification=by(index, "CASE method WHEN 1 THEN 'stated' ELSE '' END"),
        object_type=by(index, "object_type"),
        transfer_syntax=by(index, "syntax"),
        size=by(index, "rows || ' x ' || columns"),
        spacing=spacings(index),
        slice_distance=_distances(found.samples),
        intensity=ranges(index),
        samples=len(found.samples),
        sample_patients=people,
        images_are_patients=unnamed(found.samples) > 0,
        images_by_class=classes.images,
        patients_by_class=classes.patients,
        pixels_by_class=classes.pixels,
        split=_split(found.samples),
        left_out=dict(sorted(left_out.items())),
        risks=risks,
        hints=[
            *found.notes,
            *label_hints(
                dataset.root,
                extract.format,
                dataset.as_task(),
                dataset.label_options(),
                left_out,
            ),
        ],
    )


def _distances(samples: tuple[Sample, ...]) -> Counts:
    told = (sample.columns.get("slice_distance") for sample in samples)
    return dict(Counter(mm for mm in told if mm).most_common())


def _split(samples: tuple[Sample, ...]) -> Counts:
    if len({sample.patient for sample in samples}) < 2:
        return {}
    patients = [sample.patient for sample in samples]
    parts = split_by_patient(patients, [sample.split for sample in samples], Split())
    return {part: len({patients[k] for k in indices}) for part, indices in parts.items()}
