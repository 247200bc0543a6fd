"""The simulated hospitals' images: one dataset, divided among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from client.cohort.patient_key import check_patient_key
from client.cohort.training import Preparers
from client.data.preprocess import Means, prepare
from client.data.types import PreparedSite, Sample, unnamed
from fedward.errors import DataError
from fedward.plan.schema import Plan
from fedward.protocol import SITE_NAME
from simulation.classes import check_labels
from simulation.left_out import Missed, by_site, summary, with_missed
from simulation.options import Options
from simulation.partition import parse_partition, partition
from simulation.pool import cores
from simulation.prepare import check_count
from simulation.reading import read
from simulation.watch import WatchedCrew, unprepared

Note = Callable[[str], None]
_FIX: Final = (
    "Name the patients (a column patient in the table of labels or in patients.csv, or "
    "--patient-column; npz: an array of patients), or give --images-are-patients: privacy then "
    "holds per image"
)


@dataclass
class Divided:
    """Hospitals made of one dataset.

    Attributes
    ----------
    sites : list of PreparedSite
        Each with its own counts of what was left out.
    missed : list of Missed
        All that was left out, by name; stays on this machine.
    """

    sites: list[PreparedSite] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)


def divided_sites(plan: Plan, options: Options, crew: Preparers, note: Note) -> Divided:
    """One dataset divided among hospitals, and what was left out of it.

    Raises
    ------
    DataError
        The data cannot be read or divided, a class has no image, or nothing of a hospital can be
        used; the message names the hospital. The plan is private and the images name no patients.
    PlanError
        The plan needs more hospitals.
    """
    how = parse_partition(options.partition)
    note("reading the data")
    dataset = read(options, how, plan.task)
    check_patient_key(dataset.samples, plan, options.images_are_patients, fix=_FIX, where="--data")
    if images := unnamed(dataset.samples):
        note(f"high risk: {images} images name no patient, and each counts as one")
    count = options.sites or plan.participation.sites
    parts = partition(dataset.samples, options.partition, count, options.seed)
    _check_names(parts)
    check_count(plan, len(parts))
    check_labels(plan, dataset.samples)
    plan = with_seed(plan, options.seed)
    found = Divided(missed=by_site(dataset.left_out, parts if how.kind == "folders" else ()))
    for name, samples in parts.items():
        note(f"preparing {name}: {len(samples)} images")
        _prepare(found, name, samples, plan, options, crew)
    if found.missed:
        note(summary(found.missed))
    return found


def with_seed(plan: Plan, seed: int) -> Plan:
    """The plan with a division into training, validation and test that follows a run's seed too.

    Seed 0 keeps the division of ``split.seed``. Figures of several seeds then differ by who is
    tested, and not only by weights and batches. A division that the data bring stays.
    """
    split = plan.split.model_copy(update={"seed": (plan.split.seed + seed) % 2**63})
    return plan.model_copy(update={"split": split})


def _prepare(
    found: Divided,
    name: str,
    samples: tuple[Sample, ...],
    plan: Plan,
    options: Options,
    crew: Preparers,
) -> None:
    data = options.data or Path()
    watched = WatchedCrew(crew)
    means = Means(cores(), watched, options.cache_bytes)
    try:
        site = prepare(name, samples, plan, options.out / "cache", means)
    except DataError as error:
        raise DataError(error.rule, value=error.value, fix=error.fix, where=name) from None
    lost = unprepared(site, samples, plan, data, watched)
    synthetic = (data / "synthetic.json").is_file() or site.synthetic
    found.sites.append(replace(with_missed(site, found.missed), synthetic=synthetic))
    found.missed += lost


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if not re.fullmatch(SITE_NAME, name):
            raise DataError(
                "a site's name has letters, digits, blanks, `.`, `_` or `-`, 64 at most",
                value=name,
                fix="Rename the folder or the column's value",
                where="--partition",
            )
