"""Whether a dataset names its patients, and the consequences if it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fedward.errors import DataError
from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode
from fedward_client.cohort.finding import Finding, finding
from fedward_client.data.sample import Sample, unnamed

FIX: Final = (
    "Each image counts as a patient: one person may be in training and test, and a private study "
    "is refused. Name the patients (a column patient in the table of labels or in patients.csv, or "
    "labels.patient_column; a folder for each patient: patients.folder; npz: an array of "
    "patients). Only where each image is of another person, set images_are_patients = true"
)
PER_IMAGE: Final = (
    "images_are_patients is set: each image counts as a patient, and privacy holds per image. Be "
    "sure that no person has two"
)


def check_patient_key(
    samples: Sequence[Sample], plan: Plan, allowed: bool, *, fix: str = FIX, where: str = ""
) -> None:
    """Refuse a private study on images that name no patients, unless the site allows it.

    Parameters
    ----------
    samples : sequence of Sample
        What would be trained on.
    plan : Plan
        The study.
    allowed : bool
        The site's `images_are_patients`.

    Raises
    ------
    DataError
        The promise per patient would hold per image only.
    """
    count = unnamed(samples)
    if plan.privacy.on and count and not allowed:
        raise DataError(
            RuleCode.PATIENT_KEY,
            value=f"{count} of {len(samples)} images name no patient",
            fix=fix,
            where=where,
        )


def patient_key_finding(
    samples: Sequence[Sample], plan: Plan, allowed: bool, by: str = ""
) -> Finding:
    """The same as an answer of ``fedward-client data check``; `by` says what names the patients."""
    count = unnamed(samples)
    if not count:
        people = f"{len({sample.patient for sample in samples})} patients"
        found = f"every image names its patient{by and f' ({by})'}: {people}"
        return finding("patient key", "pass", found, "")
    found = f"high risk: {count} of {len(samples)} images name no patient, each counts as one"
    if not allowed:
        return finding("patient key", "fail" if plan.privacy.on else "warn", found, FIX)
    return finding("patient key", "warn", found, PER_IMAGE)
