"""The pictures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.report.looks import DASHES, looks
from server.report.numbers import (
    LOWER_IS_BETTER,
    Estimate,
    of_kind,
    ordered,
    own,
    together,
    together_estimate,
    together_mean_estimate,
)
from server.report.svg import INK, LINE, PAPER, VARIABLES, WARN, draw
from server.report.words import counted, epsilon, figure, interval, metric_name, runs
from server.results import Arm, StudyResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def comparison(results: StudyResults, name: str) -> str | None:
    """A line per way to train: each site's own test, all test patients together with the interval.

    None where no arm has a figure.
    """
    alone = [arm for arm in of_kind(results, "alone") if arm.test]
    others = [arm for arm in ordered(results.arms) if arm.test and arm.kind != "alone"]
    groups = ([("hospitals alone", alone)] if alone else []) + [(arm.name, [arm]) for arm in others]
    look, metric = looks(results), results.primary
    if not any(_drawn(arms, metric) for _, arms in groups):
        return None

    def plot(axes: Axes) -> None:
        for place, (_, arms) in enumerate(groups):
            _group(axes, place, arms, metric, look[arms[0].name].colour)
        axes.set_yticks(range(len(groups)), [label for label, _ in groups], color=INK)
        axes.set_ylim(len(groups) - 0.45, -0.55)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.margins(x=0.06)
        axes.set_xlabel(metric_name(metric))

    told = "; ".join(
        f"{label} {_told(together_mean_estimate(arms, metric), metric)}" for label, arms in groups
    )
    words = f"{metric_name(metric)} on test patients together: {told}."
    return draw(plot, name=name, words=words, height=0.75 + 0.42 * len(groups))


def _drawn(arms: Sequence[Arm], metric: str) -> bool:
    homes = any(value is not None for arm in arms for value in own(arm, metric).values())
    return homes or together_mean_estimate(arms, metric) is not None


def _told(one: Estimate | None, metric: str) -> str:
    if one is None:
        return "not known"
    limits = f" ({interval(one.interval, metric)})" if one.interval else ""
    return f"{figure(one.value, metric)}{limits}"


def _group(axes: Axes, place: int, arms: Sequence[Arm], metric: str, colour: str) -> None:
    homes = [value for arm in arms for value in own(arm, metric).values() if value is not None]
    whole = together_mean_estimate(arms, metric)
    if whole is not None and whole.interval:
        axes.plot(whole.interval, [place] * 2, color=colour, linewidth=1.6, zorder=2)
        axes.plot(whole.interval, [place] * 2, "|", color=colour, markersize=9, zorder=2)
    if homes:
        axes.plot([min(homes), max(homes)], [place] * 2, color=LINE, linewidth=5, zorder=1)
        axes.plot(
            homes,
            [place] * len(homes),
            "o",
            markersize=5.5,
            markerfacecolor=PAPER,
            markeredgecolor=colour,
            markeredgewidth=1.2,
            zorder=3,
        )
    if whole is not None:
        axes.plot(
            [whole.value], [place], "D", markersize=8, color=colour, markeredgecolor=PAPER, zorder=4
        )
        axes.annotate(
            figure(whole.value, metric),
            (whole.value, place),
            xytext=(0, 7.5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8.5,
            fontweight="bold",
            color=INK,
        )


def privacy_curve(results: StudyResults, name: str) -> str | None:
    """Primary metric over ε, with the bounds; none with fewer than two private federated arms."""
    metric = results.primary
    federated = [arm for arm in of_kind(results, "federated") if together(arm, metric) is not None]
    points = sorted(
        (
            (arm.epsilon, one)
            for arm in federated
            if arm.epsilon is not None and (one := together_estimate(arm, metric))
        ),
        key=lambda point: point[0],
    )
    if len({x for x, _ in points}) < 2:
        return None
    levels = [
        (label, one.value, colour, dash)
        for label, one, colour, dash in (
            ("federated, no privacy", _plain(federated, metric), "--federated", DASHES[1]),
            ("pooled", _plain(of_kind(results, "pooled"), metric), "--pooled", DASHES[2]),
            (
                "hospitals alone, mean",
                together_mean_estimate(of_kind(results, "alone"), metric),
                "--alone",
                DASHES[3],
            ),
        )
        if one is not None
    ]

    def plot(axes: Axes) -> None:
        for _, value, variable, dash in levels:
            axes.axhline(value, color=VARIABLES[variable], linestyle=dash, linewidth=1.5)
        colour = VARIABLES["--private-1"]
        axes.plot(
            [x for x, _ in points],
            [one.value for _, one in points],
            "-o",
            color=colour,
            markersize=6,
        )
        for x, one in points:
            if one.interval:
                axes.plot([x, x], one.interval, color=colour, linewidth=1.2)
            axes.annotate(
                figure(one.value, metric),
                (x, one.value),
                xytext=(6, -7),
                textcoords="offset points",
                ha="left",
                va="top",
                fontsize=8.5,
                color=INK,
            )
        _epsilon_axis(axes, [x for x, _ in points])
        axes.margins(x=0.12, y=0.18)
        axes.grid(axis="y")
        axes.set_title(
            f"{metric_name(metric)}, test patients together",
            loc="left",
            fontsize=9.5,
            color=INK,
        )

    told = [f"{epsilon(x)} {_told(one, metric)}" for x, one in points]
    told += [f"{label} {figure(value, metric)}" for label, value, *_ in levels]
    return draw(plot, name=name, words=f"{metric_name(metric)} over ε: {'; '.join(told)}.")


def _plain(arms: Sequence[Arm], metric: str) -> Estimate | None:
    return next((together_estimate(arm, metric) for arm in arms if arm.epsilon is None), None)


def _epsilon_axis(axes: Axes, values: list[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel("ε, stronger privacy to the left")


def participation(arm: Arm, sites: Sequence[str], name: str) -> str | None:
    """Which site's update counted in which round; none where every site's always did."""
    counted_ = {(site, round_.round) for round_ in arm.rounds for site in round_.sites}
    failed = {(f.site, round_.round) for round_ in arm.rounds for f in round_.failures} - counted_
    if not arm.rounds or len(counted_) == len(sites) * len(arm.rounds):
        return None
    places = {site: place for place, site in enumerate(sites)}

    def plot(axes: Axes) -> None:
        _marks(axes, counted_, places, "s", VARIABLES["--federated"])
        _marks(axes, failed, places, "x", WARN)
        axes.set_yticks(range(len(sites)), list(sites), color=INK)
        axes.set_ylim(len(sites) - 0.4, -0.6)
        axes.set_xlim(arm.rounds[0].round - 0.8, arm.rounds[-1].round + 0.8)
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("round")

    told = "; ".join(
        f"{site} missed rounds {runs(lost)}"
        for site in sites
        if (lost := [r.round for r in arm.rounds if (site, r.round) not in counted_])
    )
    words = f"{arm.name}, {counted(len(arm.rounds), 'round')}: {told}."
    return draw(plot, name=name, words=words, height=0.7 + 0.28 * len(sites))


def _marks(
    axes: Axes, which: set[tuple[str, int]], places: dict[str, int], marker: str, colour: str
) -> None:
    points = sorted((round_, places[site]) for site, round_ in which if site in places)
    if points:
        axes.plot(
            *zip(*points, strict=True), marker, color=colour, markersize=7, markeredgewidth=1.8
        )


def direction(metric: str) -> str:
    """Which way is better, for captions."""
    return "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
