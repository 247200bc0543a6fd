"""The simulated hospitals' images: one dataset, divided among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Final, Literal

from fedward.errors import DataError
from fedward.plan.schema import Plan, Task
from fedward.protocol import SITE_NAME
from fedward_client.cohort.patient_key import check_patient_key
from fedward_client.cohort.selection import only_selected
from fedward_client.cohort.training import Preparers
from fedward_client.data.channels import drops
from fedward_client.data.dataset import DatasetSpec, hints, read_dataset
from fedward_client.data.files import folders
from fedward_client.data.options import LabelOptions, PatientOptions
from fedward_client.data.prepare import Means, doubts, prepare
from fedward_client.data.sample import Dataset, PreparedSite, Sample, unnamed
from fedward_client.data.survey import table_of
from fedward_simulation.classes import check_labels
from fedward_simulation.left_out import Missed, by_site, summary, with_missed
from fedward_simulation.options import Options
from fedward_simulation.partition import FORMS, Partition, parse_partition, partition
from fedward_simulation.pool import cores
from fedward_simulation.prepare import check_count
from fedward_simulation.watch import WatchedCrew, unprepared

# Read the dataset that is to be divided; what is wrong is said in the command line's words.

_NUMBERED = re.compile(r"sub-folder (\d+) of \d+ \(by name\)")
_COLUMN, _FOLDER = "labels.patient_column", "patients.folder"
_OPTIONS = {"format": "--format", _COLUMN: "--patient-column", _FOLDER: "--patient-folder"}
_SHOWN: Final = 6
_FEW: Final = 5  # images, of which no hospital could be trained and tested
_MADE = FORMS.removeprefix("folders, ")
_OF_A_DATASET = frozenset(
    {
        "images",
        "masks",
        "labels",
        "imagestr",
        "labelstr",
        "train",
        "val",
        "valid",
        "validation",
        "test",
    }
)


def read(options: Options, how: Partition, task: Task) -> Dataset:
    """The dataset, read as its division wants it.

    Raises
    ------
    DataError
        It cannot be read; the message names the folder or the option.
    """
    data = options.data or Path()
    _check(data, options, how, task)
    with _in_our_words(data, how, task):
        return read_dataset(_spec(data, options, how), task)


def _spec(data: Path, options: Options, how: Partition) -> DatasetSpec:
    sites: Literal["none", "folders"] = "folders" if how.kind == "folders" else "none"
    own = options.dataset
    labels = own.label_options() if own else LabelOptions()
    if options.patient_column:
        labels = replace(labels, patient_column=options.patient_column)
    patients = own.patients.options() if own else PatientOptions()
    if options.patient_folder or options.patient_column:
        patients = replace(patients, folder=options.patient_folder)
    if own is None:
        return DatasetSpec(data, options.format, sites, patients=patients, labels=labels)
    return DatasetSpec(
        data,
        options.format or own.format,
        sites,
        masks=own.masks.options(),
        patients=patients,
        labels=labels,
        boxes=own.boxes.options(),
        images=own.image_options(),
        channels=own.channel_options(),
    )


def _check(data: Path, options: Options, how: Partition, task: Task) -> None:
    if not data.exists():
        raise DataError(
            "the data must exist",
            value=data.name,
            fix="Check the path and the mount",
            where="--data",
        )
    if options.patient_column and options.patient_folder:
        raise DataError(
            "one thing must name the patients",
            value=f"--patient-column and {_OPTIONS[_FOLDER]}",
            fix="Leave one of the two out",
            where=_OPTIONS[_FOLDER],
        )
    natural = how.kind in ("folders", "column")
    if natural and options.sites is not None:
        raise DataError(
            "with folders and column:NAME there are as many hospitals as the data have",
            value=f"--sites {options.sites}",
            fix="Leave --sites out, or choose another partition",
            where="--partition",
        )
    if how.kind == "folders" and _is_one(data, task):
        raise DataError(
            "with folders each sub-folder is a hospital, and these are classes or parts of one "
            "dataset",
            value=", ".join(_subs(data)[:_SHOWN]),
            fix=f"Choose --partition {_MADE}",
            where="--partition",
        )
    if how.kind == "folders" and not _subs(data):
        raise DataError(
            "with folders the data must be a folder with a sub-folder per hospital",
            value=data.name,
            fix=f"Make sub-folders, or choose --partition {_MADE}",
            where="--partition",
        )


def _subs(data: Path) -> list[str]:
    return [sub.name for sub in folders(data)] if data.is_dir() else []


@contextmanager
def _in_our_words(data: Path, how: Partition, task: Task) -> Iterator[None]:
    """A reader speaks of ``site.toml`` and numbers sub-folders; here are options and names."""
    try:
        yield
    except DataError as error:
        fix = _fix(error)
        if how.kind != "folders" and _of_hospitals(data, task):
            fix = f"{fix}. If each sub-folder is a hospital, give --partition folders"
        if how.kind == "folders" and (table := table_of(data)):
            fix = (
                f"If {table.name} is for all sub-folders, choose --partition {_MADE}; else give "
                f"each sub-folder its own. In the sub-folder: {fix}"
            )
        if _NUMBERED.fullmatch(error.where):
            fix = f"{fix}. If the sub-folder is no hospital, move it out of the data"
        raise DataError(
            error.rule, value=error.value, fix=fix, where=_where(error.where, data)
        ) from None


def _fix(error: DataError) -> str:
    if error.fix.startswith("Set format"):
        return error.fix.replace("Set format", "Give --format")
    # Of a table: what site.toml could set, a simulation takes as it is by default.
    fix = re.sub(r", or see [^;]* in site\.toml", ", or give another --format", error.fix)
    for key in (_COLUMN, _FOLDER):
        fix = fix.replace(key, _OPTIONS[key])
    return fix


def _where(where: str, data: Path) -> str:
    if numbered := _NUMBERED.fullmatch(where):
        return f"sub-folder {_subs(data)[int(numbered[1]) - 1]}"
    return _OPTIONS.get(where, where)


def _is_one(data: Path, task: Task) -> bool:
    """Whether the sub-folders are the classes of one dataset, or its images and masks or parts."""
    names = {name.lower() for name in _subs(data)}
    parts = {"train", "val", "valid", "validation", "test"}
    classes = {name.lower() for name in task.classes}
    return bool(names) and (
        names <= parts or names <= classes or bool(names & {"images", "imagestr"})
    )


def _of_hospitals(data: Path, task: Task) -> bool:
    """Whether the sub-folders are neither parts of a dataset nor classes."""
    names = {name.lower() for name in _subs(data)}
    own = _OF_A_DATASET | {name.lower() for name in task.classes}
    own |= {str(place) for place in range(len(task.classes))}
    return bool(names) and not names & own


Note = Callable[[str], None]
_FIX: Final = (
    "Name the patients (a column patient in the table of labels or in patients.csv, or "
    "--patient-column; a folder for each patient: --patient-folder; npz: an array of patients), or "
    "give --images-are-patients: privacy then holds per image"
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
    dataset = only_selected(dataset, plan, options.data or Path())
    check_patient_key(dataset.samples, plan, options.images_are_patients, fix=_FIX, where="--data")
    if images := unnamed(dataset.samples):
        note(f"high risk: {images} images name no patient, and each counts as one")
    count = options.sites or plan.participation.sites
    parts = partition(dataset.samples, options.partition, count, options.seed)
    _check_names(parts)
    if how.kind == "folders" and median(map(len, parts.values())) < _FEW:
        note(
            f"the {len(parts)} hospitals, one for each sub-folder, have few images: if the "
            "sub-folders are patients, give --partition iid --patient-folder 1"
        )
    check_count(plan, len(parts))
    check_labels(plan, dataset.samples)
    plan = with_seed(plan, options.seed)
    found = Divided(missed=by_site(dataset.left_out, parts if how.kind == "folders" else ()))
    for name, samples in parts.items():
        note(f"preparing {name}: {len(samples)} images")
        _prepare(found, name, samples, plan, options, crew)
        for one in (*doubts(found.sites[-1], plan), *drops(samples, plan.preprocessing)):
            note(f"{name}: {one}")
    if found.missed:
        note(summary(found.missed))
    told = hints(_spec(options.data or Path(), options, how), plan.task, dataset.left_out)
    for one in (*dataset.notes, *(f"labels: {one}" for one in told)):
        note(one)
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
