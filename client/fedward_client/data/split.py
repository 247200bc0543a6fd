"""Division of a site's images by patient: repeatable, and independent of file order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedward.errors import DataError
from fedward.plan.schema import Split
from fedward.rule_codes import RuleCode
from fedward_client.data.sample import SPLITS, SplitName


def split_by_patient(
    patients: Sequence[str],
    given: Sequence[SplitName | None],
    split: Split,
    strata: Sequence[int] | None = None,
) -> dict[SplitName, NDArray[np.int64]]:
    """Divide images into train, validation and test without dividing a patient.

    Parameters
    ----------
    patients : sequence of str
        The patient of each image, ``(N,)``.
    given : sequence of str or None
        The part that the data itself brings for each image; used when ``split.given``. A patient
        found in several parts goes wholly to the first of test, validation, train. A part that
        the data does not bring at all is taken from the rest by its share.
    split : Split
        Shares, seed, and whether `given` counts.
    strata : sequence of int, optional
        The class of each image; patients are spread over the parts evenly by (highest) class.

    Returns
    -------
    dict
        Each part's ascending image indices, int64; together all of ``range(N)``.

    Raises
    ------
    DataError
        There are fewer than two patients to divide, or the data leaves none to train on.

    Notes
    -----
    Patients are put in the order of SHA-256 of seed and key, so neither the order of the images
    nor Python's hash seed matters. From three patients on, every part with a share has one.
    """
    part = _given_parts(patients, given) if split.given else {}
    stratum = _strata(patients, strata)
    pool = sorted(
        (p for p in stratum if part.get(p, "train") == "train"),
        key=lambda p: (stratum[p], _rank(p, split.seed)),
    )
    brought = set(part.values())
    test = 0.0 if "test" in brought else split.test
    validation = 0.0 if "validation" in brought else split.validation
    _check(len(stratum), len(pool), test + validation)
    tests, validations = _counts(len(pool), test, validation)
    chosen = _every(pool, tests)
    rest = [p for p in pool if p not in chosen]
    assigned: list[tuple[SplitName, Iterable[str]]] = [
        ("train", pool),
        ("test", chosen),
        ("validation", _every(rest, validations)),
    ]
    for name, members in assigned:
        part |= dict.fromkeys(members, name)
    parts = [part[p] for p in patients]
    return {
        name: np.array([i for i, is_in in enumerate(parts) if is_in == name], dtype=np.int64)
        for name in SPLITS
    }


def _rank(patient: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{patient}".encode("utf-8", "surrogateescape")).digest()


def _given_parts(
    patients: Sequence[str], given: Sequence[SplitName | None]
) -> dict[str, SplitName]:
    first: list[SplitName] = ["test", "validation", "train"]
    part: dict[str, SplitName] = {}
    for patient, name in zip(patients, given, strict=True):
        if name is not None:
            part[patient] = min(part.get(patient, name), name, key=first.index)
    return part


def _strata(patients: Sequence[str], strata: Sequence[int] | None) -> dict[str, int]:
    highest: dict[str, int] = {}
    for patient, stratum in zip(patients, strata or [0] * len(patients), strict=True):
        highest[patient] = max(stratum, highest.get(patient, stratum))
    return highest


def _check(patients: int, pool: int, shares: float) -> None:
    if pool == 0:
        raise DataError(
            RuleCode.TRAINING_PATIENTS,
            values={"patients": patients},
            fix="Add patients, or set split.given to false",
        )
    if patients == 1 and shares > 0:
        raise DataError(
            RuleCode.TWO_PATIENTS,
            fix="Add patients, or set split.validation and split.test to 0",
        )


def _counts(n: int, test: float, validation: float) -> tuple[int, int]:
    """Patients of test and validation: rounded shares, at least one each while one can train."""
    tests = min(max(round(n * test), test > 0), n - 1)
    validations = min(max(round(n * validation), validation > 0), n - 1 - tests)
    if validation > 0 and validations == 0 and tests > 1:
        tests, validations = tests - 1, 1
    return tests, validations


def _every(ordered: Sequence[str], count: int) -> set[str]:
    """`count` of `ordered`, evenly spaced, so that each stratum gives its share within one."""
    n = len(ordered)
    return {
        p for i, p in enumerate(ordered) if (i + 1) * count // max(n, 1) > i * count // max(n, 1)
    }
