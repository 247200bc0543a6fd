"""Risks of a dataset: leakage between parts, duplicates, ambiguous ids, burnt-in text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedward import rule_codes
from fedward.errors import DataError
from fedward_client.cohort.freeze import classes_of, is_tilted, is_uneven
from fedward_client.cohort.patient_key import FIX, PER_IMAGE
from fedward_client.cohort.records import files_of
from fedward_client.config import DatasetSection
from fedward_client.data.sample import Dataset, Sample, unnamed
from fedward_client.index.extract import Extractor
from fedward_client.index.store import Index

# The same pixels in several files: within a patient, between patients, between parts.

OF_IMAGES: Final = "reason = '' AND marked = '' AND pixels != ''"
_SHOWN: Final = f"{OF_IMAGES} AND low IS NOT high"  # an empty slice is nobody's


def copies(index: Index) -> int:
    """Files whose pixels another file has already."""
    row = index.connection.execute(
        f"SELECT coalesce(sum(n - 1), 0) FROM (SELECT count(*) AS n FROM files WHERE {_SHOWN} "
        "GROUP BY pixels HAVING n > 1)"
    ).fetchone()
    return int(row[0])


def shared(samples: Sequence[Sample], index: Index, extract: Extractor) -> int:
    """Images that two patients have, or two parts of the division that the data brings."""
    # Files that no sample uses yet may be used tomorrow; only DICOM files name their patient.
    rows = index.connection.execute(
        f"SELECT pixels FROM files WHERE {_SHOWN} GROUP BY pixels "
        "HAVING count(DISTINCT patient) > 1"
    )
    found = {str(row[0]) for row in rows}
    patients: dict[str, set[str]] = defaultdict(set)
    parts: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        for pixels in _pixels(sample, index, extract):
            patients[pixels].add(sample.patient)
            parts[pixels] |= {sample.split} if sample.split else set()
    found |= {pixels for by in (patients, parts) for pixels, of in by.items() if len(of) > 1}
    return len(found)


def _pixels(sample: Sample, index: Index, extract: Extractor) -> set[str]:
    """The hashes of a sample's decoded pixels, without those of its mask and of empty slices."""
    paths = files_of(replace(sample, mask=None), extract.root)
    return {index.pixels(extract.name(path), empty=False) for path in paths} - {""}


class Risk(BaseModel):
    """One kind of risk."""

    model_config = ConfigDict(extra="forbid")
    rule: str = Field(description="what should hold")
    count: int = Field(description="how often it does not")
    severity: Literal["high", "medium", "low"] = Field(
        description="high: spoils a study or a patient's privacy; medium: costs images; "
        "low: worth a look"
    )
    fix: str = Field(description="what to do")


def find_risks(
    dataset: DatasetSection,
    found: Dataset,
    index: Index,
    extract: Extractor,
    left_out: Counter[str],
) -> list[Risk]:
    """All risks that are there, none that is not."""
    risks = [
        _of_key(dataset, found),
        *_of_patients(dataset, found),
        *_of_classes(dataset, found),
        *_of_copies(found, index, extract),
        *_of_ids(dataset, index, left_out),
        *_of_people(index),
        *_of_parts(found),
        *_of_series(found, index),
        *_of_labels(dataset, left_out),
    ]
    return [risk for risk in risks if risk.count]


def unlabelled_risks(
    dataset: DatasetSection, error: DataError, index: Index, left_out: Counter[str]
) -> list[Risk]:
    """The risks of a dataset that nobody has labelled yet, as its files alone tell them."""
    what = "a table of labels" if error.where == rule_codes.NO_TABLE else "masks"
    missing = Risk(rule=f"the dataset has {what}", count=1, severity="high", fix=error.fix)
    others = [*_of_ids(dataset, index, left_out), *_of_people(index)]
    return [missing, *(risk for risk in others if risk.count)]


def _of_key(dataset: DatasetSection, found: Dataset) -> Risk:
    allowed = dataset.images_are_patients
    return Risk(
        rule="the data say whose each image is",
        count=unnamed(found.samples),
        severity="high",
        fix=PER_IMAGE if allowed else FIX,
    )


def _of_labels(dataset: DatasetSection, left_out: Counter[str]) -> list[Risk]:
    names = "masks.suffix" if dataset.as_task().has_masks else "labels.key"
    return [
        Risk(
            rule="every image has a label",
            count=left_out[rule_codes.NO_LABEL],
            severity="medium",
            fix="Complete the table, or accept that they are left out",
        ),
        Risk(
            rule="every label and every mask has an image",
            count=left_out[rule_codes.NO_IMAGE],
            severity="medium",
            fix="Its name may not be the image's: see the hints above, and set "
            f"{names} in site.toml. Or its image is not here, or is left out itself: `data report "
            "--files` names what fits nothing, and what to export",
        ),
        Risk(
            rule="the name of a mask means one image, and that of an image one mask",
            count=left_out[rule_codes.AMBIGUOUS],
            severity="medium",
            fix="Lay masks as the images lie, or name them by UID; they are left out until then",
        ),
        Risk(
            rule="the rows of one image agree",
            count=left_out[rule_codes.CONFLICTING],
            severity="medium",
            fix="Decide which label holds; they are left out until then",
        ),
    ]


def _of_patients(dataset: DatasetSection, found: Dataset) -> list[Risk]:
    labels: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for sample in found.samples:
        labels[sample.patient] |= {sample.label} if sample.label is not None else set()
    missing = max(0, dataset.minimum_patients - len(labels))
    return [
        Risk(
            rule="all images of a patient have the same label",
            count=sum(len(of) > 1 for of in labels.values()),
            severity="low",
            fix="Right for findings that come and go; else see the table",
        ),
        Risk(
            rule=f"there are at least {dataset.minimum_patients} patients",
            count=missing,
            severity="high",
            fix="Bring more patients, or lower minimum_patients",
        ),
    ]


def _of_classes(dataset: DatasetSection, found: Dataset) -> Iterator[Risk]:
    if dataset.masks_mark:
        return
    patients: dict[int, set[str]] = defaultdict(set)
    for sample in found.samples:
        for k in classes_of(dataset, sample.label, sample.boxes):
            patients[k].add(sample.patient)
    few = [k for k in range(len(dataset.classes)) if len(patients[k]) < dataset.minimum_patients]
    empty = sum(not patients[k] for k in few)
    yield Risk(
        rule="every class has patients",
        count=empty,
        severity="high",
        fix="Check the spelling of the class in the table, or bring some",
    )
    yield Risk(
        rule=f"every class has at least {dataset.minimum_patients} patients",
        count=len(few) - empty,
        severity="low",
        fix="Expect unsure figures for it, or bring more patients",
    )


def _of_copies(found: Dataset, index: Index, extract: Extractor) -> list[Risk]:
    """The same pixels twice; between patients or parts it leaks from training into the test."""
    return [
        Risk(
            rule="no two files show the same pixels",
            count=copies(index),
            severity="low",
            fix="Take the copies out",
        ),
        Risk(
            rule="no two patients or parts share an image, or a test would leak",
            count=shared(found.samples, index, extract),
            severity="high",
            fix="Take the copies out, or find out whose they are; one person may have two ids",
        ),
    ]


def _of_series(found: Dataset, index: Index) -> list[Risk]:
    row = index.connection.execute(
        f"SELECT count(*) FROM (SELECT 1 FROM files WHERE {OF_IMAGES} AND series != '' "
        "GROUP BY series HAVING count(DISTINCT spacing) > 1)"
    ).fetchone()
    tilted = sum(map(is_tilted, found.samples))
    return [
        Risk(
            rule="the images of a series have one spacing",
            count=int(row[0]),
            severity="low",
            fix="Volumes are divided by it; see that none falls apart",
        ),
        Risk(
            rule="no volume is of a leaning gantry",
            count=tilted,
            severity="low",
            fix="A plan leaves them out, or sets them upright (preprocessing.gantry_tilt)",
        ),
        Risk(
            rule="the slices of a volume are evenly apart",
            count=sum(map(is_uneven, found.samples)),
            severity="low",
            fix="They are resampled to their smallest distance; where slices are missing, "
            "export the series again",
        ),
    ]


def _of_parts(found: Dataset) -> list[Risk]:
    """The division that the data brings may tear a patient apart."""
    parts: dict[str, set[str]] = defaultdict(set)
    for sample in found.samples:
        parts[sample.patient] |= {sample.split} if sample.split else set()
    return [
        Risk(
            rule="no patient is in two parts of the division that the data brings",
            count=sum(len(of) > 1 for of in parts.values()),
            severity="high",
            fix="Correct the table's split; such a patient goes to the test part as a whole",
        )
    ]


def _of_people(index: Index) -> list[Risk]:
    """One person under two ids, or two under one."""

    def several(what: str, by: str) -> int:
        row = index.connection.execute(
            f"SELECT count(*) FROM (SELECT 1 FROM files WHERE {OF_IMAGES} AND {by} != '' AND "
            f"{what} != '' GROUP BY {by} HAVING count(DISTINCT {what}) > 1)"
        ).fetchone()
        return int(row[0])

    leak = "If they are one person, give one id: the test would leak"
    return [
        Risk(
            rule="one name and birth date has one patient id",
            count=several("patient", "person"),
            severity="high",
            fix=leak,
        ),
        Risk(
            rule="a patient has one birth date",
            count=several("born", "patient"),
            severity="high",
            fix="The id may be shared: list it in patients.shared_ids",
        ),
        Risk(
            rule="a study is of one patient",
            count=several("patient", "study"),
            severity="high",
            fix=leak,
        ),
        Risk(
            rule="ids differ by more than case, blanks, marks, leading zeros and issuer",
            count=several("patient", "alike"),
            severity="medium",
            fix=leak,
        ),
    ]


_FATE: Final = {
    "leave-out": "they are left out",
    "refuse": "nothing is frozen until then",
    "study": "until then each study or image counts as a patient",
    "keep": "these count as one patient",
    "series": "until then each series or image counts as a patient",
}


def _of_ids(dataset: DatasetSection, index: Index, left_out: Counter[str]) -> list[Risk]:
    def count(condition: str, reason: str = "") -> int:
        row = index.connection.execute(f"SELECT count(*) FROM files WHERE {condition}").fetchone()
        # Of ids that stand in a table and not in the files, the index knows nothing.
        return max(int(row[0]), left_out[reason] if reason else 0)

    return [
        Risk(
            rule="a patient id stands for one patient",
            severity="high",
            count=count("nobody = 'shared'", rule_codes.SHARED_PATIENT),
            fix=f"Give each patient an id; {_FATE[dataset.patients.shared]}",
        ),
        Risk(
            rule="every image names its patient",
            severity="medium",
            count=count("nobody = 'missing' AND marked = '' AND rows > 0", rule_codes.NO_PATIENT),
            fix=f"Fill in its id; {_FATE[dataset.patients.missing]}",
        ),
        Risk(
            rule="no text is burnt into the pixels",
            count=count("burned_in = 'YES' AND marked = '' AND rows > 0"),
            severity="high",
            fix="Look at these images; a name in the pixels can be learnt. "
            "deidentification.burned_in leaves them out or refuses them",
        ),
        Risk(
            rule="no image says that its patient's identity was not removed",
            severity="medium",
            count=count("identity_removed = 'NO' AND marked = '' AND rows > 0"),
            fix="De-identify them where a rule here asks for it; deidentification.identity holds "
            "it",
        ),
        Risk(
            rule="no image shows a face or other features that identify",
            severity="high",
            count=count("visual_features = 'YES' AND marked = '' AND rows > 0"),
            fix="Deface them; deidentification.visual_features leaves them out or refuses them",
        ),
    ]
