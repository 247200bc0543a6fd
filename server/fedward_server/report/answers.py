"""How a classifier answers: ROC, precision and recall, calibration, confusion, operating points."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedward_server.report.charts import INK, LINE, MUTED, VARIABLES, Curve, draw
from fedward_server.report.coverage import contributing
from fedward_server.report.formatting import NOTHING, counted, figure, interval
from fedward_server.report.stats import of_kind, site_estimate, together_estimate
from fedward_server.report.tables import Cell, Row, Table
from fedward_server.results import Answers, Arm, OperatingPoint, StudyResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHADES = ("--federated", "--private-1", "--private-2", "--private-3", "--private-4", "--pooled")
TOGETHER = "all together"


def answering(results: StudyResults) -> Arm | None:
    """The federated arm whose answers are shown: the first that has any."""
    return next(
        (
            arm
            for arm in of_kind(results, "federated")
            if arm.test and (arm.test.answers or arm.test.site_answers)
        ),
        None,
    )


def roc(arm: Arm, name: str) -> str | None:
    """True over false positives, for each hospital and together; with several classes by class."""

    def points(curve: list[tuple[float, float, float]]) -> Curve:
        negatives, positives = curve[-1][1:]
        drawn = ((false / negatives, true / positives) for _, false, true in curve)
        return ((0.0, 0.0), *drawn)

    labels = ("1 − specificity (false positives)", "sensitivity (true positives)")
    return _square(tuple(_lines(arm, points)), name, "ROC", labels, diagonal=True)


def precision_recall(arm: Arm, name: str) -> str | None:
    """Precision over recall, for each hospital and together; with several classes by class."""

    def points(curve: list[tuple[float, float, float]]) -> Curve:
        positives = curve[-1][2]
        return tuple((true / positives, true / (true + false)) for _, false, true in curve if true)

    labels = ("recall (sensitivity)", "precision (positive predictive value)")
    return _square(tuple(_lines(arm, points)), name, "Precision and recall", labels, diagonal=False)


@functools.lru_cache(64)
def _square(
    lines: tuple[tuple[str, Curve, str, float], ...],
    name: str,
    what: str,
    labels: tuple[str, str],
    *,
    diagonal: bool,
) -> str | None:
    if not lines:
        return None

    def plot(axes: Axes) -> None:
        if diagonal:
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        for label, line, variable, width in lines:
            # Between two points of a precision-recall curve nothing is reached by a straight line.
            axes.plot(
                *zip(*line, strict=True),
                color=VARIABLES[variable],
                linewidth=width,
                label=label,
                drawstyle="default" if diagonal else "steps-pre",
            )
        _unit_axes(axes, what, labels)
        if len(lines) > 1:
            axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)

    told = ", ".join(label for label, *_ in lines)
    words = f"{what}: {told}."
    return draw(plot, name=name, words=words, width=3.9, height=3.7, numbers=True)


def _lines(
    arm: Arm, points: Callable[[list[tuple[float, float, float]]], Curve]
) -> Iterator[tuple[str, Curve, str, float]]:
    if arm.test is None:
        return
    whole = arm.test.answers.curves if arm.test.answers else {}
    if len(whole) > 1:
        for place, (label, curve) in enumerate(whole.items()):
            yield label, points(curve), _SHADES[place % len(_SHADES)], 1.6
        return
    for place, (site, answers) in enumerate(arm.test.site_answers.items()):
        for curve in answers.curves.values():
            yield site, points(curve), _SHADES[1 + place % (len(_SHADES) - 1)], 0.9
    for curve in whole.values():
        yield TOGETHER, points(curve), "--federated", 2.2


def _unit_axes(axes: Axes, what: str, labels: tuple[str, str]) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(color=LINE)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(what, loc="left", fontsize=9.5, color=INK)


def calibration(arm: Arm, name: str) -> str | None:
    """Share of right answers over confidence, by hospital and together; large points: many."""
    answers = arm.test.answers if arm.test else None
    if arm.test is None or answers is None or not answers.calibration:
        return None
    lines = [
        (site, tuple(one.calibration), _SHADES[1 + place % (len(_SHADES) - 1)], 0.9)
        for place, (site, one) in enumerate(arm.test.site_answers.items())
        if one.calibration
    ]
    return _drawn_bins((*lines, (TOGETHER, tuple(answers.calibration), "--federated", 2.2)), name)


@functools.lru_cache(64)
def _drawn_bins(
    lines: tuple[tuple[str, tuple[tuple[float, float, float], ...], str, float], ...], name: str
) -> str:
    most = max(n for *_, n in lines[-1][1])

    def plot(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        for label, bins, variable, width in lines:
            confidences, rights = [a for a, *_ in bins], [b for _, b, _ in bins]
            colour = VARIABLES[variable]
            axes.plot(confidences, rights, color=colour, linewidth=width, label=label)
            areas = [(3 + 7 * math.sqrt(n / most)) ** 2 for *_, n in bins]
            axes.scatter(confidences, rights, areas, color=colour)
        _unit_axes(axes, "Calibration", ("confidence", "share of right answers"))
        if len(lines) > 1:
            axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)

    told = ". ".join(
        f"{label}: {'; '.join(f'{a:.2f} {b:.2f}' for a, b, _ in bins)}" for label, bins, *_ in lines
    )
    words = f"Share of right answers by confidence. {told}."
    return draw(plot, name=name, words=words, width=3.9, height=3.7, numbers=True)


def ece(answers: Answers) -> float | None:
    """Expected calibration error (Guo et al., 2017, eq. 5) of the bins."""
    total = math.fsum(n for *_, n in answers.calibration)
    if not total:
        return None
    return math.fsum(n * abs(right - sure) for sure, right, n in answers.calibration) / total


def curve_words(arm: Arm, metric: str) -> str:
    """A metric together and at each hospital, each with its interval."""
    sites = arm.test.site_answers if arm.test else {}
    found = [(TOGETHER, together_estimate(arm, metric))]
    found += [(site, site_estimate(arm, site, metric)) for site in sites]
    told = [
        f"{label} {figure(one.value, metric)}"
        + (f" ({interval(one.interval, metric)})" if one.interval else "")
        for label, one in found
        if one is not None
    ]
    return "; ".join(told)


def whose_curves(arm: Arm) -> str:
    """Of how many hospitals the curves together are."""
    return counted(
        len(contributing(arm, "auc")) or len(arm.test.per_site if arm.test else ()), "hospital"
    )


def operating_table(arm: Arm) -> Table | None:
    """Threshold, sensitivity and specificity with intervals, together and by hospital."""
    rows = [
        Row(label, _operating_cells(point))
        for label, answers in _all_answers(arm)
        for point in answers.operating_points
    ]
    columns = ["class", "threshold", "with the class", "without", "sensitivity", "specificity"]
    caption = "Operating point"
    return Table(caption, "test patients of", columns, rows, frozenset({0})) if rows else None


def _operating_cells(point: OperatingPoint) -> list[Cell]:
    return [
        Cell(point.name),
        Cell("likeliest" if point.threshold is None else f"{point.threshold:g}"),
        Cell(f"{point.positives:,.0f}"),
        Cell(f"{point.negatives:,.0f}"),
        _share(point.sensitivity, point.sensitivity_interval),
        _share(point.specificity, point.specificity_interval),
    ]


def _share(value: float | None, limits: tuple[float, float] | None) -> Cell:
    return Cell(
        NOTHING if value is None else figure(value),
        interval=interval(limits) if limits and value is not None else "",
    )


def confusion_tables(arm: Arm, classes: Sequence[str]) -> list[Table]:
    """Images by true class and answer, together and at each hospital."""
    return [
        Table(
            f"Confusion, {label}",
            "true class",
            [f"answered {name}" for name in classes],
            [
                Row(name, [Cell(f"{n:,.0f}") for n in row])
                for name, row in zip(classes, answers.confusion, strict=True)
            ],
        )
        for label, answers in _all_answers(arm)
        if len(answers.confusion) == len(classes)
    ]


def _all_answers(arm: Arm) -> Iterator[tuple[str, Answers]]:
    if arm.test is not None:
        if arm.test.answers is not None:
            yield TOGETHER, arm.test.answers
        yield from arm.test.site_answers.items()
