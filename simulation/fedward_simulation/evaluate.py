"""A finished model on data that took no part in its study: figures, intervals, subgroups."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward.console import Table
from fedward.errors import DataError
from fedward.files import write_text
from fedward.models.finished import FinishedModel
from fedward.plan.schema import Plan, Split
from fedward_client.cohort.selection import only_selected
from fedward_client.data.prepare import prepare
from fedward_client.data.sample import Sample
from fedward_client.training.device import place
from fedward_client.training.evaluate import Answers, evaluate
from fedward_client.training.runtime import Runtime
from fedward_client.training.source import Source
from fedward_server.answers import answers_of
from fedward_server.report.formatting import figure, interval, metric_name
from fedward_simulation.divided import read
from fedward_simulation.options import Options
from fedward_simulation.partition import parse_partition

SITE: Final = "site"
_AGE: Final = "age"
_USUAL: Final = ("sex", "gender", _AGE)  # columns that are looked at without being named
_BANDS: Final = ((18, "under 18"), (40, "18 to 39"), (65, "40 to 64"), (200, "65 and over"))
_UNKNOWN: Final = "not stated"


@dataclass(frozen=True)
class Group:
    """Figures on some of the patients.

    Attributes
    ----------
    column, value : str
        What they have in common; both "" for everybody.
    patients, images : int
        How many they are.
    figures : mapping
        By metric; empty where there are too few patients.
    intervals : mapping
        Of 95 %, by patient.
    """

    column: str
    value: str
    patients: int
    images: int
    figures: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes
    ----------
    groups : tuple of Group
        Everybody first.
    left_out : mapping
        Reason to count.
    answers : mapping
        Of a classifier: curves, calibration and operating points, as in ``metrics.json``.
    """

    groups: tuple[Group, ...]
    left_out: dict[str, int]
    answers: dict[str, Any]


@dataclass(frozen=True)
class _Measured:
    """The answer on one image."""

    sample: Sample
    values: NDArray[np.float64]
    targets: NDArray[Any]


def evaluate_model(
    model: FinishedModel,
    options: Options,
    columns: Sequence[str],
    least: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Evaluate a model on all patients of a dataset.

    Parameters
    ----------
    model : FinishedModel
        From a study in which these patients took no part.
    options : Options
        The data; with the partition ``folders`` each sub-folder is a hospital.
    columns : sequence of str
        Of the table of labels, by which patients are grouped besides sex, age and hospital.
    least : int
        Patients that a group must have for its figures to be told.
    tell : callable
        Hears how far it is.

    Raises
    ------
    DataError
        Nothing can be used, or a column is not there.
    """
    tell("reading the data")
    root = options.data or Path()
    dataset = read(options, parse_partition(options.partition), model.plan.task)
    dataset = only_selected(dataset, model.plan, root)
    left_out = Counter(item.reason for item in dataset.left_out)
    measured = list(_measure(model, dataset.samples, options, left_out, tell))
    if not measured:
        raise DataError(
            "the data must hold an image that the model can be evaluated on",
            value=", ".join(f"{reason}: {n}" for reason, n in sorted(left_out.items())),
            fix="See the reasons on the data page",
            where="--data",
        )
    groups = [_group(model.plan, "", "", measured, 1)]
    for column in _columns(measured, columns):
        parts: dict[str, list[_Measured]] = {}
        for one in measured:
            parts.setdefault(_value(one.sample, column), []).append(one)
        if len(parts) > 1 or column in columns:
            groups += [_group(model.plan, column, v, parts[v], least) for v in sorted(parts)]
    counts = _together(model.plan, measured).exact()
    found = answers_of(model.plan.task, counts, _per_image(measured))
    return Evaluation(tuple(groups), dict(left_out), found.model_dump(mode="json") if found else {})


def _measure(
    model: FinishedModel,
    samples: Sequence[Sample],
    options: Options,
    left_out: Counter[str],
    tell: Callable[[str], None],
) -> Iterator[_Measured]:
    """Image by image: memory holds one, and an answer is known to be of its sample."""
    # Nobody trains here, so nobody is kept from the evaluation.
    plan = model.plan.model_copy(update={"split": Split(validation=0.0, test=0.0)})
    runtime = Runtime(device=options.device, threads=1, physical_batch=1)
    runtime.enter()
    network = place(model.build(), runtime.torch_device)
    surface = "hd95" in plan.metrics.report
    only = np.zeros(1, np.int64)
    for number, sample in enumerate(samples):
        tell(f"{number} of {len(samples)} images")
        try:
            site = prepare("evaluation", [sample], plan)
        except DataError as error:
            reasons = error.values.get("reasons", ())
            left_out[reasons[0] if isinstance(reasons, tuple) and reasons else error.rule] += 1
            continue
        source = Source(plan, site, runtime, None, "")
        made = evaluate(plan, network, source, site, only, runtime, surface=surface)
        # The answers for masks say all; kept, the masks would fill the memory.
        targets = made.targets[:0] if plan.task.spec.dense else made.targets
        yield _Measured(sample, made.values, targets)


def _columns(measured: Sequence[_Measured], named: Sequence[str]) -> list[str]:
    """The columns by which patients are grouped.

    Raises
    ------
    DataError
        One that was named is not there.
    """
    there = {name.lower() for one in measured for name in one.sample.columns}
    if any(one.sample.site for one in measured):
        there.add(SITE)
    for name in named:
        if name.lower() not in there:
            raise DataError(
                "a column to group by must be in the table of labels",
                value=f"{name}; there are {', '.join(sorted(there)) or 'none'}",
                fix="Name another",
                where="--by",
            )
    return list(dict.fromkeys(name.lower() for name in (*named, *_USUAL, SITE) if name in there))


def _value(sample: Sample, column: str) -> str:
    found = {name.lower(): value.strip() for name, value in sample.columns.items()}
    text = found.get(column, "") or (sample.site if column == SITE else "")
    return _band(text) if column == _AGE else text or _UNKNOWN


def _band(age: str) -> str:
    """Years, or DICOM's 045Y, as a band: an age by itself would name too few patients."""
    try:
        years = float(age.upper().removesuffix("Y"))
    except ValueError:
        return _UNKNOWN
    return next((name for end, name in _BANDS if 0 <= years < end), _UNKNOWN)


def _group(plan: Plan, column: str, value: str, measured: Sequence[_Measured], least: int) -> Group:
    patients = len({one.sample.patient for one in measured})
    if patients < least:
        return Group(column, value, patients, len(measured))
    counts, names = _together(plan, measured).exact(), plan.metrics.report
    figures = counts.figures(names)
    intervals = counts.intervals(names, _per_image(measured))
    return Group(column, value, patients, len(measured), figures, intervals)


def _per_image(measured: Sequence[_Measured]) -> float:
    """Patients that one image stands for."""
    return len({one.sample.patient for one in measured}) / len(measured)


def _together(plan: Plan, measured: Sequence[_Measured]) -> Answers:
    numbers = {patient: k for k, patient in enumerate({one.sample.patient for one in measured})}
    return Answers(
        plan,
        np.concatenate([one.values for one in measured], axis=plan.task.spec.answer_axis),
        np.concatenate([one.targets for one in measured]),
        np.array([numbers[one.sample.patient] for one in measured], np.int64),
    )


def table(plan: Plan, found: Evaluation) -> Table:
    """The figures for a terminal, a row for each group."""
    names = plan.metrics.report
    made = Table("", "patients", "images", *map(metric_name, names))
    for one in found.groups:
        head = f"{one.column}: {one.value}" if one.column else "all"
        cells = [_cell(one, name) for name in names]
        made.add_row(head, str(one.patients), str(one.images), *cells)
    return made


def _cell(group: Group, name: str) -> str:
    if not group.figures:
        return "too few"
    ends = group.intervals.get(name)
    told = figure(group.figures[name], name)
    return f"{told} ({interval(ends, name)})" if ends else told


def as_json(model: FinishedModel, found: Evaluation, least: int) -> dict[str, Any]:
    """What ``evaluation.json`` holds."""
    return {
        "model": {
            "study": model.study,
            "which": model.which,
            "sha256": model.sha256,
            "plan_sha256": model.plan_sha256,
        },
        "minimum_patients": least,
        "groups": [
            {
                "column": one.column,
                "value": one.value,
                "patients": one.patients,
                "images": one.images,
                "figures": one.figures,
                "intervals": {name: list(ends) for name, ends in one.intervals.items()},
            }
            for one in found.groups
        ],
        "left_out": found.left_out,
        "answers": found.answers,
    }


def write_evaluation(told: dict[str, Any], out: Path) -> Path:
    """Write ``evaluation.json`` into a folder.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "evaluation.json"
    write_text(path, json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path
