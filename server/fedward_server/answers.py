"""From counts to a classifier's curves, confusion matrix and operating points."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward.plan.schema import Task
from fedward.tasks.base import Measured
from fedward.tasks.classification import (
    ClassificationCounts,
    lower_edges,
    sensitivities,
    specificities,
)
from fedward.tasks.private_counts import AnyCounts, PrivateCounts
from fedward_server.results import Answers, OperatingPoint

_POINTS: Final = 64
"""Most points of a curve: a picture shows no more."""


def answers_of(task: Task, counts: AnyCounts, per_image: float) -> Answers | None:
    """What curves are drawn from; None of a segmenter, and where nothing of it was let go.

    Parameters
    ----------
    task : Task
        For the names of the classes.
    counts : AnyCounts
        Of one site or of several.
    per_image : float
        Patients that one image stands for (:func:`patients_per_image`).
    """
    unit, measured = 1.0, counts if isinstance(counts, Measured) else counts.view()
    if isinstance(counts, PrivateCounts):
        unit = float(counts.unit)
        per_image = per_image if counts.epsilon is None else 1.0
    if not isinstance(measured, ClassificationCounts):
        return None
    return _answers(task, measured, unit, per_image / unit)


def _answers(
    task: Task, counts: ClassificationCounts, unit: float, per_count: float
) -> Answers | None:
    shown = range(counts.classes)
    if counts.classes == 2 and not counts.multi_label:
        shown = range(1, 2)
    negative, positive = counts.scores
    curves = {task.classes[k]: _curve(negative[k], positive[k], unit) for k in shown}
    found = Answers(curves={name: curve for name, curve in curves.items() if curve})
    if counts.confusion.any():
        found.operating_points = _operating_points(task, counts, shown, unit, per_count)
        if not counts.multi_label:
            found.confusion = (counts.confusion / unit).tolist()
    decisions, confidence, right = counts.calibration
    there = decisions > 0
    bins = zip(
        confidence[there] / decisions[there],
        right[there] / decisions[there],
        decisions[there] / unit,
        strict=True,
    )
    found.calibration = [(float(a), float(b), float(n)) for a, b, n in bins]
    return found if found != Answers() else None


def _curve(
    negative: NDArray[Any], positive: NDArray[Any], unit: float
) -> list[tuple[float, float, float]]:
    if not negative.sum() or not positive.sum():
        return []
    places = np.flatnonzero(negative + positive)[::-1]
    false, true = np.cumsum(negative[places]), np.cumsum(positive[places])
    if len(places) > _POINTS:
        # Steps of equal weight along the curve.
        way = false / false[-1] + true / true[-1]
        kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], _POINTS)))
        places, false, true = (
            values[kept.clip(max=len(way) - 1)] for values in (places, false, true)
        )
    edges = lower_edges(len(negative))[places]
    rows = zip(edges, false / unit, true / unit, strict=True)
    return [(float(a), float(b), float(c)) for a, b, c in rows]


def _operating_points(
    task: Task, counts: ClassificationCounts, shown: range, unit: float, per_count: float
) -> list[OperatingPoint]:
    sensitivity, specificity = (of(counts, per_count) for of in (sensitivities, specificities))
    confusion = counts.confusion
    positives = confusion[:, 1].sum(axis=1) if counts.multi_label else confusion.sum(axis=1)
    total = confusion[0].sum() if counts.multi_label else confusion.sum()
    several = counts.classes > 2 and not counts.multi_label
    found = []
    for k in shown:
        rising, falling = sensitivity[k], specificity[k]
        found.append(
            OperatingPoint(
                name=task.classes[k],
                threshold=None if several else 0.5,
                positives=float(positives[k]) / unit,
                negatives=float(total - positives[k]) / unit,
                sensitivity=rising[0] if rising else None,
                specificity=falling[0] if falling else None,
                sensitivity_interval=rising[1] if rising else None,
                specificity_interval=falling[1] if falling else None,
            )
        )
    return found
