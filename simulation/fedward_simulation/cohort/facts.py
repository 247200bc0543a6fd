"""What a synthetic cohort is, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from fedward.plan.schema import TaskKind
from fedward.tasks.registry import TASKS
from fedward_simulation.cohort.scanner import Scanner

CLASSES = ("clear", "opacity")
NOTE = (
    "SYNTHETIC: every image here was computed from a phantom. No patient, hospital or scanner "
    "behind it exists."
)


@dataclass(frozen=True)
class HospitalFacts:
    """One hospital of a cohort.

    Attributes
    ----------
    name : str
        Its folder.
    scanner : Scanner
        How its images were taken.
    patients, diseased, images : int
        How many there are.
    """

    name: str
    scanner: Scanner
    patients: int
    diseased: int
    images: int

    @property
    def prevalence(self) -> float:
        """Share of its patients with opacities."""
        return self.diseased / self.patients


@dataclass(frozen=True)
class CohortFacts:
    """A written cohort."""

    kind: TaskKind
    seed: int
    hospitals: tuple[HospitalFacts, ...]

    @property
    def patients(self) -> int:
        """Patients over all hospitals."""
        return sum(hospital.patients for hospital in self.hospitals)

    @property
    def images(self) -> int:
        """Images over all hospitals."""
        return sum(hospital.images for hospital in self.hospitals)

    def to_json(self) -> str:
        """The text of ``synthetic.json``."""
        value: dict[str, Any] = {
            "synthetic": True,
            "note": NOTE,
            "kind": self.kind,
            "seed": self.seed,
            "patients": self.patients,
            "images": self.images,
            "classes": ["lung"] if has_masks(self.kind) else list(CLASSES),
            "hospitals": [
                {**asdict(h), "prevalence": round(h.prevalence, 4)} for h in self.hospitals
            ],
        }
        return json.dumps(value, indent=2) + "\n"


def has_masks(kind: TaskKind) -> bool:
    """Whether a cohort for such a task has masks, and no table of labels."""
    return TASKS[kind].target == "masks"


def readme(facts: HospitalFacts, kind: TaskKind) -> str:
    """The text of a hospital's ``README.txt``."""
    scanner = facts.scanner
    packed = "RLE-compressed" if scanner.compressed else "uncompressed"
    labels = (
        "masks/ holds, for each image, a PNG of the same stem: 1 in the lungs, 0 elsewhere."
        if has_masks(kind)
        else "labels.csv says for each PatientID whether the lungs are clear or show an opacity."
    )
    return (
        f"{NOTE}\n\n{facts.name}: {facts.patients} patients, {facts.diseased} with opacities, "
        f"{facts.images} images.\n{scanner.modality}, {scanner.bits} bits stored, "
        f"{scanner.photometric}, {packed}, {scanner.rows} x {scanner.columns} pixels of "
        f"{scanner.spacing:g} mm, value = stored x {scanner.slope:g} + {scanner.intercept:g}.\n"
        f"{labels}\n"
    )
