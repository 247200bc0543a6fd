"""Read the dataset that is to be divided; what is wrong is said in the command line's words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.data.files import folders
from client.data.label_options import LabelOptions
from client.data.read import DatasetSpec, read_dataset
from client.data.types import Dataset
from fedward.errors import DataError
from fedward.plan.schema import Task
from simulation.options import Options
from simulation.rule import FORMS, Partition

_NUMBERED = re.compile(r"sub-folder (\d+) of \d+ \(by name\)")
_COLUMN = "labels.patient_column"
_OPTIONS = {"format": "--format", _COLUMN: "--patient-column"}
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
    _check(data, options, how)
    with _in_our_words(data, how, task):
        return read_dataset(
            DatasetSpec(
                data,
                options.format,
                "folders" if how.kind == "folders" else "none",
                labels=LabelOptions(patient_column=options.patient_column),
            ),
            task,
        )


def _check(data: Path, options: Options, how: Partition) -> None:
    if not data.exists():
        raise DataError(
            "the data must exist",
            value=data.name,
            fix="Check the path and the mount",
            where="--data",
        )
    natural = how.kind in ("folders", "column")
    if natural and options.sites is not None:
        raise DataError(
            "with folders and column:NAME there are as many hospitals as the data have",
            value=f"--sites {options.sites}",
            fix="Leave --sites out, or choose another partition",
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
    return fix.replace(_COLUMN, _OPTIONS[_COLUMN])


def _where(where: str, data: Path) -> str:
    if numbered := _NUMBERED.fullmatch(where):
        return f"sub-folder {_subs(data)[int(numbered[1]) - 1]}"
    return _OPTIONS.get(where, where)


def _of_hospitals(data: Path, task: Task) -> bool:
    """Whether the sub-folders are neither parts of a dataset nor classes."""
    names = {name.lower() for name in _subs(data)}
    own = _OF_A_DATASET | {name.lower() for name in task.classes}
    own |= {str(place) for place in range(len(task.classes))}
    return bool(names) and not names & own
