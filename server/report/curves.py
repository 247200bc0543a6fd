"""The learning curves of a report."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from server.report.looks import Look, looks
from server.report.numbers import finite, ordered
from server.report.svg import INK, MUTED, draw
from server.report.words import metric_name
from server.results import StudyResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning(results: StudyResults, name: str) -> str | None:
    """A metric on validation patients, by round; none where no arm has such figures."""
    metric = learnt(results)
    curves = {
        arm.name: [(round_.round, finite(round_.validation.get(metric))) for round_ in arm.rounds]
        for arm in ordered(results.arms)
    }
    return _curves(results, curves, f"{metric_name(metric)}, validation patients", name)


def learnt(results: StudyResults) -> str:
    """The metric to show by round: the primary one, or the first other one that there is."""
    measured = [round_.validation for arm in results.arms for round_ in arm.rounds]
    names = dict.fromkeys([results.primary, *(name for figures in measured for name in figures)])
    known = (n for n in names if any(finite(figures.get(n)) is not None for figures in measured))
    return next(known, results.primary)


def losses(results: StudyResults, name: str) -> str | None:
    """The training loss, by round; none where no arm has it."""
    curves = {
        arm.name: [(round_.round, finite(round_.train_loss)) for round_ in arm.rounds]
        for arm in ordered(results.arms)
    }
    return _curves(results, curves, "training loss", name)


def _curves(
    results: StudyResults, curves: dict[str, list[tuple[int, float | None]]], what: str, name: str
) -> str | None:
    points = {
        arm: [(x, y) for x, y in curve if y is not None]
        for arm, curve in curves.items()
        if any(y is not None for _, y in curve)
    }
    if not points:
        return None
    look = looks(results)

    def plot(axes: Axes) -> None:
        _stages(axes, results)
        for arm, curve in points.items():
            _line(axes, curve, look[arm])
        axes.grid(axis="y")
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("round")
        axes.set_title(what, loc="left", fontsize=9.5, color=INK)

    ends = "; ".join(f"{arm} ends at {curve[-1][1]:.3f}" for arm, curve in points.items())
    return draw(plot, name=name, words=f"{what}, by round: {ends}.")


def _line(axes: Axes, curve: list[tuple[int, float]], look: Look) -> None:
    axes.plot(
        *zip(*curve, strict=True),
        color=look.colour,
        linestyle=look.dash,
        linewidth=1.0 if look.thin else 1.7,
        marker=look.marker or ("o" if len(curve) == 1 else ""),
        markersize=4.0,
        markevery=max(1, len(curve) // 12),
        zorder=2 if look.thin else 3,
    )


def _stages(axes: Axes, results: StudyResults) -> None:
    """A line where a stage of the schedule begins, from the longest arm."""
    rounds = max((arm.rounds for arm in results.arms), key=len, default=[])
    for before, after in pairwise(rounds):
        if before.stage != after.stage:
            axes.axvline(after.round - 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(
                after.stage,
                (after.round - 0.5, 0.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=8,
                color=MUTED,
            )
