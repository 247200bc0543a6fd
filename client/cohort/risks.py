"""What could spoil a study that uses a dataset, found before it does."""

from __future__ import annotations

from collections import Counter, defaultdict

from pydantic import BaseModel, ConfigDict, Field

from client.config import DatasetSection
from client.data import reasons
from client.data.types import Dataset
from client.index.store import Index

_OF_IMAGES = "reason = '' AND pixels != ''"


class Risk(BaseModel):
    """One kind of risk."""

    model_config = ConfigDict(extra="forbid")
    rule: str = Field(description="what should hold")
    count: int = Field(description="how often it does not")
    fix: str = Field(description="what to do")


def find_risks(
    dataset: DatasetSection, found: Dataset, index: Index, left_out: Counter[str]
) -> list[Risk]:
    """All risks that are there, none that is not."""
    risks = [
        *_of_patients(dataset, found), *_of_copies(index), *_of_ids(index),
        Risk(
            rule="every image has a label", count=left_out[reasons.NO_LABEL],
            fix="Complete the table, or accept that they are left out",
        ),
        Risk(
            rule="every label and every mask has an image", count=left_out[reasons.NO_IMAGE],
            fix="Export the missing images",
        ),
        Risk(
            rule="the rows of one image agree", count=left_out[reasons.CONFLICTING],
            fix="Decide which label holds; they are left out until then",
        ),
    ]  # fmt: skip
    return [risk for risk in risks if risk.count]


def _of_patients(dataset: DatasetSection, found: Dataset) -> list[Risk]:
    labels: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for sample in found.samples:
        labels[sample.patient] |= {sample.label} if sample.label is not None else set()
    missing = max(0, dataset.minimum_patients - len({s.patient for s in found.samples}))
    return [
        Risk(
            rule="all images of a patient have the same label",
            count=sum(len(of) > 1 for of in labels.values()),
            fix="Right for findings that come and go; else see the table",
        ),
        Risk(
            rule=f"there are at least {dataset.minimum_patients} patients", count=missing,
            fix="Bring more patients, or lower minimum_patients",
        ),
    ]  # fmt: skip


def _of_copies(index: Index) -> list[Risk]:
    """The same pixels twice; between patients it leaks from training into the test."""
    one = index.connection.execute
    within, across = one(
        "SELECT coalesce(sum(n - 1), 0), coalesce(sum(p > 1), 0) FROM (SELECT count(*) AS n, "
        f"count(DISTINCT patient) AS p FROM files WHERE {_OF_IMAGES} GROUP BY pixels HAVING n > 1)"
    ).fetchone()
    return [
        Risk(
            rule="no two files show the same pixels", count=int(within),
            fix="Take the copies out",
        ),
        Risk(
            rule="no two patients share an image, or a test would leak", count=int(across),
            fix="Find out whose images these are; one person may have two ids",
        ),
    ]  # fmt: skip


def _of_ids(index: Index) -> list[Risk]:
    def count(condition: str) -> int:
        row = index.connection.execute(f"SELECT count(*) FROM files WHERE {condition}").fetchone()
        return int(row[0])

    return [
        Risk(
            rule="a patient id stands for one patient", count=count("nobody = 'shared'"),
            fix="Give each patient an id of its own; these count as one patient",
        ),
        Risk(
            rule="every image names its patient", count=count("nobody = 'missing' AND rows > 0"),
            fix="Fill in PatientID; they are left out until then",
        ),
        Risk(
            rule="no text is burnt into the pixels",
            count=count("burned_in = 'YES' AND rows > 0"),
            fix="Look at these images; a name in the pixels can be learnt",
        ),
    ]  # fmt: skip
