"""Prepare a frozen cohort for training: verify it, check it against the plan, preprocess it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pydicom

from fedward.errors import DataError, PolicyError
from fedward.plan.schema import Plan
from fedward.rule_codes import FIX, RuleCode
from fedward_client.cohort.check import is_refused, task_findings
from fedward_client.cohort.open import FrozenCohort, open_cohort
from fedward_client.cohort.patient_key import check_patient_key
from fedward_client.cohort.records import files_of
from fedward_client.cohort.selection import Kinds, deidentified, selected
from fedward_client.config import DatasetSection, SiteConfig
from fedward_client.data.channels import drops
from fedward_client.data.prepare import Means, doubts, prepare
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.kinds import ImageOptions
from fedward_client.data.readers.dicom.sniff import is_dicom
from fedward_client.data.sample import PreparedSite, Sample
from fedward_client.data.table_rows import rows_of
from fedward_client.data.transforms import Job, Outcome, prepare_in_worker
from fedward_client.worker_pool import Limits, WorkerPool

_GIB: Final = 1 << 30
Preparers = WorkerPool[Job, Outcome]


def preparers(limits: Limits | None = None) -> Preparers:
    """Processes that prepare images; none is started before there is an image to prepare."""
    return WorkerPool(prepare_in_worker, limits)


def cache_folder(config: SiteConfig) -> Path:
    """Where a site keeps prepared images."""
    return config.site.state / "cache"


def prepare_cohort(
    config: SiteConfig,
    name: str,
    which: str,
    plan: Plan,
    *,
    secret: bytes,
    cache: Path,
    crew: Preparers | None = None,
    least: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> PreparedSite:
    """Open a frozen cohort, make sure that it is unchanged and fits a plan, and prepare it.

    Parameters
    ----------
    config : SiteConfig
        The site.
    name : str
        The dataset.
    which : str
        The start of the cohort's hash, or "latest".
    plan : Plan
        The study. Patients are divided as it says; the division that the data brings is kept
        where it says ``split.given``.
    secret : bytes
        The site's.
    cache : Path
        Folder for prepared images (see :func:`cache_folder`), bounded by the site's `cache_gib`.
    crew : Crew, optional
        Of :func:`preparers`, to be used for several cohorts; without it there is one of its own.
    least : int
        Patients that the site's policy asks for, of those whose images the plan takes.
    note : callable, optional
        Hears of the progress, in words that name nobody.

    Returns
    -------
    PreparedSite
        Of the site's name, with the cohort's hash.

    Raises
    ------
    DataError
        There is no such cohort, a byte of it has changed, it cannot serve the plan, or the plan is
        private and the images name no patients (see ``images_are_patients`` in ``site.toml``).
    PolicyError
        The plan takes images of fewer patients than the site's policy asks for.
    OutputError
        The cache cannot be written, or has no room.
    """
    note(f"{config.site.name}: verifying the frozen cohort of {name}")
    cohort = open_cohort(config, name, which, secret=secret)
    dataset = config.dataset(name)
    check_units(plan, dataset, cohort.name)
    samples = fitting(cohort, plan, dataset.image_options(), least)
    allowed = dataset.images_are_patients
    check_patient_key(samples, plan, allowed, where=cohort.name)
    note(f"{config.site.name}: preparing {len(samples)} images of {cohort.name}")
    if crew is None:
        with preparers() as own:
            site = _prepare(config, cohort, samples, plan, cache, own)
    else:
        site = _prepare(config, cohort, samples, plan, cache, crew)
    _enough(site.patients.tolist(), least)  # of what could be prepared
    for one in (*doubts(site, plan), *drops(samples, plan.preprocessing)):
        note(f"{config.site.name}: {one}")
    return site


def check_units(plan: Plan, dataset: DatasetSection, where: str) -> None:
    """Hold the units of the plan's columns against those that the site states.

    Raises
    ------
    DataError
        One differs.
    """
    units = {name.casefold(): one.unit for name, one in dataset.table.items()}
    for number, column in enumerate(plan.table.column if plan.table else (), start=1):
        own = units.get(column.name.casefold(), "")
        if own and own != column.unit:
            raise DataError(
                RuleCode.TABLE_UNIT,
                values={"column": number},
                value=f"{own} for {column.name}",
                fix="Convert the column, correct its unit in site.toml, or ask for another plan",
                where=where,
            )


def _prepare(
    config: SiteConfig,
    cohort: FrozenCohort,
    samples: tuple[Sample, ...],
    plan: Plan,
    cache: Path,
    crew: Preparers,
) -> PreparedSite:
    room = round(config.site.cache_gib * _GIB)
    # Without the last look, a file that changes now would stay in the cache as the frozen one.
    means = Means(crew=crew, cache_bytes=room, verify=cohort.verify)
    site = prepare(config.site.name, samples, plan, cache, means)
    return replace(site, cohort=cohort.sha256)


_FITS: Final = {"task": RuleCode.COHORT_TASK, "classes": RuleCode.COHORT_CLASSES}


def _enough(patients: Iterable[str | int], least: int) -> None:
    """Hold the policy's number against the patients that a plan takes, not the frozen ones alone.

    A plan's patterns, or what its table takes, could leave one of them, and all that a study does
    would be about her.
    """
    if len(set(patients)) < least:
        raise PolicyError(RuleCode.PATIENTS, values={"limit": least}, fix=FIX)


def _taken(samples: Sequence[Sample], plan: Plan) -> list[str]:
    """The patients of samples, without those whose row the plan's table does not take."""
    if plan.table is None:
        return [sample.patient for sample in samples]
    rows = rows_of(plan.table, [sample.columns for sample in samples])
    return [s.patient for s, row in zip(samples, rows, strict=True) if not isinstance(row, str)]


def fitting(
    cohort: FrozenCohort, plan: Plan, options: ImageOptions | None = None, policy_least: int = 0
) -> tuple[Sample, ...]:
    """The samples of a cohort that a plan accepts, and the site's options let through.

    Raises
    ------
    PolicyError
        They are of fewer patients than the site's policy asks for.
    DataError
        Task or classes are not the plan's, none is of its modalities, or there are fewer patients
        than it wants; or the site refuses what is not de-identified.
    """
    for one in task_findings(cohort.task, plan):
        if one.status == "fail":
            raise DataError(
                _FITS[one.name],
                value=one.found,
                fix=one.fix,
                where=cohort.name,
            )
    samples = _of_modality(cohort, plan)
    least = plan.participation.minimum_patients
    if not samples:
        raise DataError(
            RuleCode.COHORT_MODALITY,
            value=f"none of {', '.join(plan.task.modality)}",
            where=cohort.name,
            fix="Freeze another dataset, or change task.modality",
        )
    kinds = Kinds()
    samples = deidentified(samples, options or ImageOptions(), kinds, cohort.name)
    samples = selected(samples, plan, kinds)
    if policy_least:  # first, so that none and one are refused alike
        _enough(_taken(samples, plan), policy_least)
    if not samples:
        raise DataError(
            RuleCode.COHORT_SELECTED,
            value="none",
            where=cohort.name,
            fix="Freeze another dataset, or change the plan's images",
        )
    patients = len({s.patient for s in samples if not is_refused(s, plan)})
    if patients < least:
        raise DataError(
            RuleCode.PLAN_PATIENTS,
            values={"least": least},
            value=patients,
            fix="Bring more patients",
            where=cohort.name,
        )
    return samples


def _of_modality(cohort: FrozenCohort, plan: Plan) -> tuple[Sample, ...]:
    """Those that the plan accepts; what states no modality (NIfTI, pictures) is accepted."""
    wanted: set[str] = set(plan.task.modality)
    samples = cohort.dataset.samples
    if "any" in wanted or set(cohort.task.modality) <= wanted:
        return samples
    return tuple(s for s in samples if _modality(files_of(s, cohort.root)[0]) in {*wanted, ""})


def _modality(path: Path) -> str:
    if not is_dicom(path):
        return ""
    with quiet():
        tags = pydicom.dcmread(
            path, stop_before_pixels=True, specific_tags=["Modality"], force=True
        )
    return str(tags.get("Modality") or "").strip()
