"""The table that a run ends with in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from fedward_server.report import tables
from fedward_server.report.coverage import is_whole, share_of
from fedward_server.report.formatting import NOTHING, duration, figure, interval, metric_name
from fedward_server.report.stats import (
    OF_ONE_SITE,
    Estimate,
    clear_best,
    of_kind,
    ordered,
    own_mean_estimate,
    together_estimate,
    together_mean_estimate,
)
from fedward_server.report.summary import per_image
from fedward_server.results import Arm, StudyResults


@dataclass(frozen=True)
class SummaryRow:
    """One arm, or the hospitals alone on average.

    Attributes
    ----------
    own : Estimate or None
        Primary metric on the sites' own test patients, mean over sites.
    together : Estimate or None
        Primary metric on all test patients together.
    is_mean : bool
        Whether it averages the arms above it; never the best of a column.
    is_alone : bool
        Whether ``own`` is one site's; never the best beside means over all sites.
    """

    name: str
    own: Estimate | None
    together: Estimate | None
    epsilon: float | None
    seconds: float
    finished: bool
    is_mean: bool = False
    is_alone: bool = False


def summary_rows(results: StudyResults) -> list[SummaryRow]:
    """Hospitals alone, their mean, federated, pooled."""
    return list(_rows(results))


def _rows(results: StudyResults) -> Iterator[SummaryRow]:
    alone = of_kind(results, "alone")
    for arm in alone:
        yield _row(results, arm)
    if len(alone) > 1:
        yield SummaryRow(
            "hospitals alone, mean",
            own_mean_estimate(alone, results.primary),
            together_mean_estimate(alone, results.primary),
            None,
            sum(arm.seconds for arm in alone),
            finished=all(arm.finished for arm in alone),
            is_mean=True,
        )
    rest = [arm for arm in ordered(results.arms) if arm.kind != "alone"]
    for arm in rest:
        yield _row(results, arm)


def _row(results: StudyResults, arm: Arm) -> SummaryRow:
    return SummaryRow(
        arm.name,
        own_mean_estimate([arm], results.primary),
        together_estimate(arm, results.primary),
        arm.epsilon,
        arm.seconds,
        finished=arm.finished,
        is_alone=arm.kind in OF_ONE_SITE,
    )


def summary_table(results: StudyResults) -> Table:
    """The arms on the primary metric, for the terminal.

    Returns
    -------
    rich.table.Table
        Rows: each hospital alone, their mean, federated with and without privacy, pooled. Columns:
        mean over the sites' own test patients, all test patients together, ε, seconds. Figures have
        their interval of 95 %; one is green where it is better than all others by more than chance.
    """
    table = Table(title=Text(_title(results)), title_justify="left", header_style="bold")
    name = metric_name(results.primary)
    table.add_column("trained")
    for column in (f"{name}, own test", f"{name}, {_whose(results)}", "ε", "time"):
        table.add_column(column, justify="right")
    rows = summary_rows(results)
    own_ = [None if row.is_mean or row.is_alone else row.own for row in rows]
    together = [None if row.is_mean else row.together for row in rows]
    bests = clear_best(own_, results.primary), clear_best(together, results.primary)
    for place, row in enumerate(rows):
        table.add_row(*_cells(row, results.primary, place == bests[0], place == bests[1]))
    return table


def _whose(results: StudyResults) -> str:
    for arm in results.arms:
        if arm.test and not is_whole(results, arm, results.primary):
            return share_of(results, arm, results.primary)
    return "all together"


def printed(table: tables.Table) -> Table:
    """A table of the report, for the terminal."""
    shown = Table(title=Text(table.caption), title_justify="left", header_style="bold")
    shown.add_column(table.corner)
    for place, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if place in table.words else "right")
    for row in table.rows:
        shown.add_row(Text(row.head), *(Text(cell.text) for cell in row.cells))
    return shown


def _title(results: StudyResults) -> str:
    marks = ["synthetic data"] if results.synthetic else []
    marks += ["high risk: images count as patients"] if per_image(results) else []
    marks += [] if results.complete else ["interrupted"]
    name = results.title or results.study
    return f"{name} ({', '.join(marks)})" if marks else name


def _cells(row: SummaryRow, metric: str, own_best: bool, together_best: bool) -> list[Text]:
    def shown(one: Estimate | None, *, best: bool) -> Text:
        if not row.finished and one is None:
            return Text("unfinished", style="dim")
        if one is None:
            return Text(NOTHING)
        limits = f" ({interval(one.interval, metric)})" if one.interval else ""
        text = Text(figure(one.value, metric), style="bold green" if best else "")
        return text.append(limits, style="dim")

    return [
        Text(row.name, style="italic" if row.is_mean else ""),
        shown(row.own, best=own_best),
        shown(row.together, best=together_best),
        Text(NOTHING if row.epsilon is None else f"{row.epsilon:g}"),
        Text(duration(row.seconds)),
    ]
