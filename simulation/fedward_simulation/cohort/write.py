"""Write a whole synthetic cohort to a folder."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from fedward.errors import DataError, OutputError
from fedward.plan.schema import TaskKind
from fedward_simulation.cohort.dicom import Place, dataset
from fedward_simulation.cohort.facts import (
    CLASSES,
    NOTE,
    CohortFacts,
    HospitalFacts,
    has_masks,
    readme,
)
from fedward_simulation.cohort.phantom import draw_anatomy
from fedward_simulation.cohort.scanner import SCANNERS, Scanner, take

MARKER = "synthetic.json"


def write_cohort(
    out: Path, seed: int, kind: TaskKind, patients: int = 60, hospitals: int = 4
) -> CohortFacts:
    """Write synthetic hospitals as DICOM files; the same arguments give the same bytes.

    Parameters
    ----------
    out : Path
        A new or empty folder. It gets ``synthetic.json`` and one folder a hospital with
        ``README.txt``, ``images/*.dcm`` and ``labels.csv`` or ``masks/*.png``.
    seed : int
        What everything random follows from.
    kind : str
        A kind of task: with labels (clear or opacity) or with masks (lungs).
    patients : int
        Patients of each hospital; at least 2.
    hospitals : int
        Number of hospitals; the four scanners are reused in turn beyond four.

    Raises
    ------
    DataError
        There would be too few patients or hospitals.
    OutputError
        The folder is not empty or cannot be written.
    """
    _check(seed, patients, hospitals)
    try:
        _make_empty(out)
        facts = CohortFacts(
            kind, seed, tuple(_hospital(out, seed, kind, patients, n) for n in range(hospitals))
        )
        # Last, so that a cohort with a marker is a whole one.
        (out / "README.txt").write_text(f"{NOTE}\n", "utf-8")
        (out / MARKER).write_text(facts.to_json(), "utf-8")
    except OSError as error:
        rule, fix = "the cohort's folder must be writable", "Check its rights and the space left"
        raise OutputError(rule, value=out.name, fix=fix) from error
    return facts


def _check(seed: int, patients: int, hospitals: int) -> None:
    given = (("seed", seed, 0), ("patients", patients, 2), ("hospitals", hospitals, 1))
    for name, value, least in given:
        if value < least:
            fix = "Choose a larger number"
            raise DataError(f"a cohort needs at least {least}", value=value, fix=fix, where=name)


def _make_empty(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        fix = "Choose a new folder, or empty this one"
        raise OutputError("the cohort's folder must be empty", value=out.name, fix=fix)


def _hospital(out: Path, seed: int, kind: TaskKind, patients: int, number: int) -> HospitalFacts:
    name, scanner = f"hospital-{number + 1}", SCANNERS[number % len(SCANNERS)]
    folder = out / name
    for sub in ("images", "masks") if has_masks(kind) else ("images",):
        (folder / sub).mkdir(parents=True)
    diseased = _diseased(np.random.default_rng([seed, number]), scanner, patients)
    images = 0
    for patient in range(patients):
        random = np.random.default_rng([seed, number, patient + 1])
        place = Place(f"{kind} {seed}", name, patient + 1, 0)
        images += _patient(folder, kind, scanner, place, bool(diseased[patient]), random)
    facts = HospitalFacts(name, scanner, patients, int(diseased.sum()), images)
    if not has_masks(kind):
        (folder / "labels.csv").write_text(_labels(name, diseased.tolist()), "utf-8")
    (folder / "README.txt").write_text(readme(facts, kind), "utf-8")
    return facts


def _diseased(random: np.random.Generator, scanner: Scanner, patients: int) -> NDArray[np.bool_]:
    count = min(max(round(scanner.prevalence * patients), 1), patients - 1)
    return random.permutation(patients) < count


def _patient(
    folder: Path,
    kind: TaskKind,
    scanner: Scanner,
    place: Place,
    diseased: bool,
    random: np.random.Generator,
) -> int:
    anatomy = draw_anatomy(random, diseased)
    count = int(random.integers(1, scanner.most_images + 1))
    for number in range(1, count + 1):
        at = Place(place.cohort, place.hospital, place.patient, number)
        pixels, mask = take(anatomy, scanner, random)
        file = folder / "images" / f"{at.stem}.dcm"
        dataset(pixels, scanner, at).save_as(file, enforce_file_format=True)
        if has_masks(kind):
            Picture.fromarray(mask).save(folder / "masks" / f"{at.stem}.png")
    return count


def _labels(hospital: str, diseased: list[bool]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["PatientID", "label"])
    for number, ill in enumerate(diseased, start=1):
        table.writerow([Place("", hospital, number, 0).patient_id, CLASSES[ill]])
    return text.getvalue()
