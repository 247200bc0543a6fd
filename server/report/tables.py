"""The tables of a report, as rows of cells; the template gives them their tags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.report.numbers import (
    at_site,
    best,
    finite,
    mean,
    ordered,
    own,
    own_mean,
    site_names,
    together,
    together_mean,
)
from server.report.words import NOTHING, figure, metric_name
from server.results import Arm, StudyResults


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes
    ----------
    text : str
        What it shows.
    best : bool
        Whether it is the best of its column.
    home : bool
        Whether it is a hospital's model on that hospital's own patients.
    """

    text: str
    best: bool = False
    home: bool = False


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


def primary_table(results: StudyResults) -> Table:
    """Arms by test set: each site's own, their mean, all test patients together."""
    sites, metric = site_names(results), results.primary
    arms = [arm for arm in ordered(results.arms) if arm.test]
    columns: list[Callable[[Arm], float | None]] = [_site(site, metric) for site in sites]
    columns += [lambda arm: _mean_of_homes(arm, metric), lambda arm: together(arm, metric)]
    tops = [best((column(arm) for arm in arms), metric) for column in columns]
    rows = [
        Row(
            arm.name,
            [
                Cell(
                    figure(value := column(arm), metric),
                    best=value is not None and value == top,
                    home=place < len(sites) and arm.kind == "alone" and arm.site == sites[place],
                )
                for place, (column, top) in enumerate(zip(columns, tops, strict=True))
            ],
        )
        for arm in arms
    ]
    alone = [arm for arm in arms if arm.kind == "alone"]
    if len(alone) > 1:
        rows.insert(len(alone), _alone_row(alone, sites, metric))
    return Table(
        f"{metric_name(metric)} by test set",
        "trained",
        [*sites, "mean of own tests", "all together"],
        rows,
    )


def _site(site: str, metric: str) -> Callable[[Arm], float | None]:
    return lambda arm: at_site(arm, site, metric)


def _mean_of_homes(arm: Arm, metric: str) -> float | None:
    # A hospital alone has one figure of its own; beside means over all hospitals it would mislead.
    return None if arm.kind == "alone" else own_mean([arm], metric)


def _alone_row(alone: Sequence[Arm], sites: Sequence[str], metric: str) -> Row:
    """Each hospital's own model at home, and the mean of them all."""
    homes = {site: value for arm in alone for site, value in own(arm, metric).items()}
    values = [homes.get(site) for site in sites]
    values += [own_mean(alone, metric), together_mean(alone, metric)]
    cells = [
        Cell(figure(value, metric), home=place < len(sites)) for place, value in enumerate(values)
    ]
    return Row("hospitals alone, each at home", cells, is_mean=True)


def metrics_table(results: StudyResults) -> Table:
    """Every metric of every arm on all test patients together."""
    arms = [arm for arm in ordered(results.arms) if arm.test]
    names = list(dict.fromkeys(key for arm in arms if arm.test for key in arm.test.pooled))
    names.sort(key=lambda name: name != results.primary)
    tops = {name: best((together(arm, name) for arm in arms), name) for name in names}
    rows = [
        Row(
            arm.name,
            [
                Cell(
                    figure(value := together(arm, name), name) + _noise(arm, name),
                    value is not None and value == top,
                )
                for name, top in tops.items()
            ],
        )
        for arm in arms
    ]
    caption = "Every metric on all test patients together"
    if any(arm.test and arm.test.standard_errors for arm in arms):
        caption += "; ± is the standard error of the noise in private counts"
    return Table(caption, "trained", [metric_name(name) for name in names], rows)


def _noise(arm: Arm, metric: str, site: str = "") -> str:
    """The standard error of private counts, at a site or of all sites together."""
    errors: dict[str, float] = {}
    if arm.test is not None:
        errors = arm.test.site_standard_errors.get(site, {}) if site else arm.test.standard_errors
    return f" ± {figure(errors[metric], metric)}" if metric in errors else ""


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
                    Cell(figure(at_site(arm, site, name), name) + _noise(arm, name, site))
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
    return [_class_table(arms, metric) for metric in metrics]


def _class_table(arms: Sequence[Arm], metric: str) -> Table:
    figures = {
        arm.name: {k: finite(v) for k, v in arm.test.per_class.get(metric, {}).items()}
        for arm in arms
        if arm.test
    }
    classes = list(dict.fromkeys(name for values in figures.values() for name in values))
    tops = {name: best((v.get(name) for v in figures.values()), metric) for name in classes}
    rows = [
        Row(
            arm,
            [
                Cell(figure(value := values.get(name), metric), value is not None and value == top)
                for name, top in tops.items()
            ]
            + [Cell(figure(mean(values.get(name) for name in classes), metric))],
        )
        for arm, values in figures.items()
    ]
    caption = f"{metric_name(metric)} by class, all test patients together"
    return Table(caption, "trained", [*classes, "mean of classes"], rows)


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
