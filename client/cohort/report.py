"""What a dataset holds, what was left out of it and why, and what is risky about it.

All of it is counts and words of the standard; a report names no person and no file.
"""

from __future__ import annotations

from collections import Counter

from pydantic import BaseModel, ConfigDict, Field

from client.cohort.balance import Counts, balance
from client.cohort.build import usable, why_left_out, why_unreadable
from client.cohort.contents import Range, by, distinct, number, ranges, spacings
from client.cohort.risks import Risk, find_risks, unlabelled_risks
from client.config import DatasetSection
from client.data import reasons
from client.data.readers.dicom_headers import Listen, unheard
from client.data.split import split_by_patient
from client.data.types import Dataset, Sample, unnamed
from client.index.extract import Extractor
from client.index.store import Index
from fedward.errors import DataError
from fedward.plan.schema import Split


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
        if error.where not in (reasons.NO_TABLE, reasons.NO_MASKS):
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
