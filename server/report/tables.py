"""The tables of a report, as rows of cells; the template gives them their tags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from server.report.coverage import is_whole, share_of
from server.report.numbers import (
    Estimate,
    clear_best,
    finite,
    ordered,
    own_mean_estimate,
    site_estimate,
    site_names,
    together_estimate,
    together_mean_estimate,
)
from server.report.words import NOTHING, figure, interval, metric_name
from server.results import Arm, StudyResults


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes
    ----------
    text : str
        What it shows.
    best : bool
        Whether it is better than all others of its column, by more than chance.
    home : bool
        Whether it is a hospital's model on that hospital's own patients.
    interval : str
        The interval of the figure.
    """

    text: str
    best: bool = False
    home: bool = False
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """One row: its head and its cells."""

    head: str
    cells: Sequence[Cell]
    is_mean: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its caption.

    Attributes
    ----------
    corner : str
        Head of the first column.
    columns : sequence of str
        Heads of the others.
    words : frozenset of int
        Columns (from 0, without the first) that hold words rather than numbers.
    """

    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[Row]
    words: frozenset[int] = field(default_factory=frozenset)


def primary_table(results: StudyResults) -> Table | None:
    """Arms by test set: each site's own, their mean, all test patients together.

    None where no arm has a figure.
    """
    sites, metric = site_names(results), results.primary
    arms = [arm for arm in ordered(results.arms) if arm.test]
    columns: list[Callable[[Arm], Estimate | None]] = [_site(site, metric) for site in sites]
    columns += [lambda arm: _mean_of_homes(arm, metric), lambda arm: together_estimate(arm, metric)]
    values = [[column(arm) for arm in arms] for column in columns]
    if not any(one for column in values for one in column):
        return None
    tops = [clear_best(column, metric) for column in values]
    rows = [
        Row(
            arm.name,
            [
                _cell(
                    column[at],
                    metric,
                    best=top == at,
                    home=place < len(sites) and arm.kind == "alone" and arm.site == sites[place],
                )
                for place, (column, top) in enumerate(zip(values, tops, strict=True))
            ],
        )
        for at, arm in enumerate(arms)
    ]
    alone = [arm for arm in arms if arm.kind == "alone"]
    if len(alone) > 1:
        rows.insert(len(alone), _alone_row(alone, sites, metric))
    heads = [*sites, "mean of own tests", _together_head(results, arms, metric)]
    return Table(f"{metric_name(metric)} by test set", "trained", heads, rows)


def _together_head(results: StudyResults, arms: Sequence[Arm], metric: str) -> str:
    """``all together``, or of how many hospitals some arm's figure is."""
    part = next((arm for arm in arms if not is_whole(results, arm, metric)), None)
    return "all together" if part is None else f"together, {share_of(results, part, metric)}"


def _cell(one: Estimate | None, metric: str, *, best: bool = False, home: bool = False) -> Cell:
    if one is None:
        return Cell(NOTHING, home=home)
    limits = interval(one.interval, metric) if one.interval else ""
    return Cell(figure(one.value, metric), best, home, limits)


def _site(site: str, metric: str) -> Callable[[Arm], Estimate | None]:
    return lambda arm: site_estimate(arm, site, metric)


def _mean_of_homes(arm: Arm, metric: str) -> Estimate | None:
    # A hospital alone has one figure of its own; beside means over all hospitals it would mislead.
    return None if arm.kind == "alone" else own_mean_estimate([arm], metric)


def _alone_row(alone: Sequence[Arm], sites: Sequence[str], metric: str) -> Row:
    """Each hospital's own model at home, and the mean of them all."""
    homes = {str(arm.site): site_estimate(arm, str(arm.site), metric) for arm in alone}
    values = [homes.get(site) for site in sites]
    values += [own_mean_estimate(alone, metric), together_mean_estimate(alone, metric)]
    cells = [_cell(value, metric, home=place < len(sites)) for place, value in enumerate(values)]
    return Row("hospitals alone, each at home", cells, is_mean=True)


def metrics_table(results: StudyResults) -> Table | None:
    """Every metric of every arm on all test patients together; None where there is none."""
    arms = [arm for arm in ordered(results.arms) if arm.test]
    names = list(dict.fromkeys(key for arm in arms if arm.test for key in arm.test.pooled))
    names.sort(key=lambda name: name != results.primary)
    values = {name: [together_estimate(arm, name) for arm in arms] for name in names}
    values = {name: column for name, column in values.items() if any(column)}
    if not values:
        return None
    tops = {name: clear_best(column, name) for name, column in values.items()}
    rows = [
        Row(
            arm.name,
            [
                _with_noise(_cell(column[at], name, best=tops[name] == at), arm, name)
                for name, column in values.items()
            ],
        )
        for at, arm in enumerate(arms)
    ]
    parts = {name: _together_head(results, arms, name) for name in values}
    whole = all(head == "all together" for head in parts.values())
    caption = "Every metric on all test patients together"
    heads = [metric_name(name) for name in values]
    if not whole:
        caption = "Every metric on the test patients of the hospitals that gave it"
        heads = [
            f"{metric_name(n)} ({head.removeprefix('together, ')})"
            if head != "all together"
            else metric_name(n)
            for n, head in parts.items()
        ]
    if any(arm.test and arm.test.standard_errors for arm in arms):
        caption += "; ± is the standard error of the noise in private counts"
    return Table(caption, "trained", heads, rows)


def _with_noise(cell: Cell, arm: Arm, metric: str, site: str = "") -> Cell:
    """With the standard error of private counts, at a site or of all sites together."""
    errors: dict[str, float] = {}
    if arm.test is not None:
        errors = arm.test.site_standard_errors.get(site, {}) if site else arm.test.standard_errors
    if metric not in errors or cell.text == NOTHING:
        return cell
    return replace(cell, text=f"{cell.text} ± {figure(errors[metric], metric)}")


def site_metrics_table(results: StudyResults) -> Table | None:
    """Every metric of the federated arms on each site's own test patients."""
    arms = [arm for arm in ordered(results.arms) if arm.kind == "federated" and arm.test]
    names = list(dict.fromkeys(k for arm in arms if arm.test for k in arm.test.pooled))
    names.sort(key=lambda name: name != results.primary)
    rows = [
        Row(
            arm.name,
            [
                Cell(site),
                *(
                    _with_noise(_cell(site_estimate(arm, site, name), name), arm, name, site)
                    for name in names
                ),
            ],
        )
        for arm in arms
        for site in (arm.test.per_site if arm.test else ())
    ]
    columns = ["site", *(metric_name(name) for name in names)]
    caption = "Every metric at each site, on its own test patients"
    return Table(caption, "trained", columns, rows, frozenset({0})) if rows else None


def class_tables(results: StudyResults) -> list[Table]:
    """Segmentation: a table per metric, arms by class, on all test patients together."""
    arms = [arm for arm in ordered(results.arms) if arm.test and arm.test.per_class]
    metrics = list(dict.fromkeys(m for arm in arms if arm.test for m in arm.test.per_class))
    return [_class_table(results, arms, metric) for metric in metrics]


def _class_table(results: StudyResults, arms: Sequence[Arm], metric: str) -> Table:
    classes = list(
        dict.fromkeys(k for arm in arms if arm.test for k in arm.test.per_class.get(metric, {}))
    )
    values = {name: [_of_class(arm, name, metric) for arm in arms] for name in classes}
    tops = {name: clear_best(column, metric) for name, column in values.items()}
    rows = [
        Row(
            arm.name,
            [
                *(_cell(values[k][at], metric, best=tops[k] == at) for k in classes),
                _cell(together_estimate(arm, metric), metric),
            ],
        )
        for at, arm in enumerate(arms)
    ]
    head = _together_head(results, arms, metric)
    whose = "all test patients together" if head == "all together" else head
    caption = f"{metric_name(metric)} by class, {whose}"
    return Table(caption, "trained", [*classes, "mean of classes"], rows)


def _of_class(arm: Arm, name: str, metric: str) -> Estimate | None:
    if arm.test is None:
        return None
    value = finite(arm.test.per_class.get(metric, {}).get(name))
    limits = arm.test.class_intervals.get(metric, {}).get(name)
    return None if value is None else Estimate(value, limits)


def privacy_table(results: StudyResults) -> Table | None:
    """What each site's patients were promised and what was spent; none without privacy."""
    rows = [
        Row(
            arm.name,
            [
                Cell(site),
                Cell(NOTHING if arm.epsilon is None else f"{arm.epsilon:g}"),
                Cell(spent.spent(".3f")),
                Cell(f"{spent.delta:g}"),
                Cell(f"{spent.noise_multiplier:.3f}"),
                Cell(f"{spent.sampling_rate:.4g}"),
                Cell(f"{spent.steps:,}"),
            ],
        )
        for arm in ordered(results.arms)
        for site, spent in arm.privacy.items()
    ]
    columns = ["site", "target ε", "ε spent", "δ", "noise multiplier", "sampling rate", "steps"]
    caption = "Privacy spent, by site"
    return Table(caption, "trained", columns, rows, frozenset({0})) if rows else None
