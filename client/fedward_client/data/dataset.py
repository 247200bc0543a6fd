"""Detect a dataset's format and read its samples: tables and headers now, pixels later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward.rule_codes import RuleCode
from fedward.tasks.registry import TASKS
from fedward_client.data.channels import Channels, with_channels
from fedward_client.data.files import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    folder_of,
    folders,
    stem,
    walk,
)
from fedward_client.data.hints import label_hints
from fedward_client.data.mask_suffix import has_word
from fedward_client.data.one_folder import OneFolder, one_folder
from fedward_client.data.options import BoxOptions, LabelOptions, MaskOptions, PatientOptions
from fedward_client.data.readers.dicom import masks_beside as dicom_masks
from fedward_client.data.readers.dicom.headers import Listen, unheard
from fedward_client.data.readers.dicom.kinds import ImageOptions
from fedward_client.data.readers.registry import READERS, Format
from fedward_client.data.sample import Dataset, LeftOut, Sample

_LOOK_AT = 200  # files that decide what a folder holds


@dataclass(frozen=True)
class DatasetSpec:
    """Where a dataset lies.

    Attributes
    ----------
    root : Path
        A folder, or an ``.npz`` file.
    format : str or None
        One of :data:`fedward_client.data.readers.registry.READERS`; None looks for itself.
    sites : str
        "folders" reads each sub-folder as the dataset of a site of that name.
    masks : MaskOptions
        DICOM: what segments mean.
    patients : PatientOptions
        What missing and shared patient ids mean.
    labels : LabelOptions
        Where the table of labels lies, and what its words mean.
    boxes : BoxOptions
        Where boxes are.
    images : ImageOptions
        DICOM: which images are taken.
    channels : mapping
        Name of each channel of the images to where it is; without any they have no names.
    listen : callable
        DICOM: hears how many headers are read, and of how many.
    """

    root: Path
    format: Format | None = None
    sites: Literal["none", "folders"] = "none"
    masks: MaskOptions = field(default_factory=MaskOptions)
    patients: PatientOptions = field(default_factory=PatientOptions)
    labels: LabelOptions = field(default_factory=LabelOptions)
    boxes: BoxOptions = field(default_factory=BoxOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    channels: Channels = field(default_factory=dict)
    listen: Listen = field(default=unheard, compare=False, repr=False)


def read_dataset(spec: DatasetSpec, task: Task, *, empty: bool = False) -> Dataset:
    """Read a dataset for a task.

    Parameters
    ----------
    spec : DatasetSpec
        Where it lies.
    task : Task
        What it is for.
    empty : bool
        Whether it may hold nothing that can be used.

    Returns
    -------
    Dataset
        Samples, not decoded yet, and what was left out; sorted by name, whatever the disk's order.

    Raises
    ------
    DataError
        The folder is missing, is of no known kind, or holds nothing that the task can use.
    """
    if not spec.root.exists():
        raise DataError(RuleCode.DATASET, fix="Check the path and the mount", where="root")
    by_site = spec.sites == "folders"
    dataset = _by_site(spec, task) if by_site else _read(spec.root, task, spec)
    if spec.channels:
        dataset = with_channels(dataset, spec.channels)
    if not (dataset.samples or empty):
        raise _nothing(dataset.left_out, task, spec)
    return dataset


def hints(spec: DatasetSpec, task: Task, left_out: Iterable[LeftOut]) -> list[str]:
    """What to change where labels do not fit, in words for who has the data."""
    counts = Counter(item.reason for item in left_out)
    roots = folders(spec.root) if spec.sites == "folders" else [spec.root]
    told = (
        label_hints(root, spec.format or detect(root), task, spec.labels, counts) for root in roots
    )
    return next((one for one in told if one), [])


def _read(root: Path, task: Task, spec: DatasetSpec) -> Dataset:
    kind = spec.format or detect(root)
    if task.has_boxes and spec.boxes.source == "masks":
        # Read as masks are: the boxes are put around what they mark when an image is prepared.
        masks = next(name for name, one in TASKS.items() if one.target == "masks")
        task = task.model_copy(update={"kind": masks})
    if task.spec.target not in READERS[kind].targets:
        able = [name for name, one in READERS.items() if task.spec.target in one.targets]
        raise DataError(
            f"{task.spec.target} are read from {' and '.join(able)}",
            value=kind,
            fix="Export the images as one of these",
            where="format",
        )
    if READERS[kind].names_patients:
        _check_own_patients(spec)
    return READERS[kind].load().read(root, task, spec)


def _check_own_patients(spec: DatasetSpec) -> None:
    told = {
        "labels.patient_column": spec.labels.patient_column,
        "patients.folder": spec.patients.folder,
    }
    for key, value in told.items():
        if value:
            raise DataError(
                "a column or a folder of patients belongs to pictures or NIfTI images",
                value=value,
                where=key,
                fix=f"Remove {key}: DICOM files name their patients themselves, an npz archive "
                "has an array of them",
            )


def _by_site(spec: DatasetSpec, task: Task) -> Dataset:
    subs = folders(spec.root) if spec.root.is_dir() else []
    if not subs:
        raise DataError(
            'with sites = "folders" the dataset must be a folder with a sub-folder per site',
            fix='Make sub-folders, or set sites = "none"',
        )
    samples: list[Sample] = []
    left_out: list[LeftOut] = []
    notes: list[str] = []
    for place, sub in enumerate(subs, start=1):
        try:
            part = _read(sub, task, spec)
        except DataError as error:
            # By number: with a wrong setting the sub-folders may be named after patients.
            where = f"sub-folder {place} of {len(subs)} (by name)"
            raise DataError(error.rule, value=error.value, fix=error.fix, where=where) from None
        samples += [_of_site(sample, sub.name) for sample in part.samples]
        notes += part.notes
        left_out += [replace(item, name=f"{sub.name}/{item.name}") for item in part.left_out]
    return Dataset(tuple(samples), tuple(left_out), tuple(dict.fromkeys(notes)))


def _of_site(sample: Sample, site: str) -> Sample:
    return replace(sample, site=site, patient=f"{site}/{sample.patient}")


def detect(root: Path) -> Format:
    """The format of a dataset.

    Raises
    ------
    DataError
        None or several are possible.
    """
    readers = {name: spec.load() for name, spec in READERS.items()}
    if root.is_file():
        archives = [name for name, spec in READERS.items() if spec.archive]
        kinds = {name for name in archives if readers[name].recognises(root)}
    else:
        files = walk(folder_of(root, IMAGE_FOLDERS) or root, without=MASK_FOLDERS)
        looked = [
            (next((name for name, one in readers.items() if one.recognises(file)), ""), file)
            for file in islice(files, _LOOK_AT)
        ]
        kinds = {name for name, _ in looked if name}
        if "dicom" in kinds:  # masks of DICOM images are no DICOM files
            others = {name for name, file in looked if not has_word(stem(file))}
            kinds &= {*others, "dicom"}
    known = [name for name in READERS if name in kinds]
    if len(known) == 1:
        return known[0]
    raise DataError(
        RuleCode.DATASET_FORMAT,
        value=f"signs of {', '.join(known)}" if known else "no file of a known kind",
        fix="Set format, or take the other files out",
        where="format",
    )


def masks_beside(
    root: Path,
    format: Format,
    suffix: str = "",
    channels: Channels | None = None,
    dimensions: int = 2,
) -> OneFolder | None:
    """The masks that lie beside the images of a dataset; None where none do.

    `suffix` is what the site says that their names end in, "" where it says nothing.
    """
    names = READERS[format].load().beside
    if not root.is_dir() or folder_of(root, MASK_FOLDERS):
        return None
    try:
        if format == "dicom":
            base = folder_of(root, IMAGE_FOLDERS[:1]) or root
            return dicom_masks.masks_beside(walk(base), base, dimensions, suffix)
        return one_folder(root, names, suffix, channels) if names else None
    except DataError:
        return None


def _nothing(left_out: tuple[LeftOut, ...], task: Task, spec: DatasetSpec) -> DataError:
    counts = Counter(item.reason for item in left_out)
    text = ", ".join(f"{reason}: {n}" for reason, n in sorted(counts.items()))
    return DataError(
        RuleCode.DATASET_IMAGES,
        values={"task": task.kind, "reasons": tuple(sorted(counts))},
        value=text or "no images",
        fix=". ".join(
            ["See the reasons; class names, labels or masks may not match the plan"]
            + [one[0].upper() + one[1:] for one in hints(spec, task, left_out)]
        ),
    )
