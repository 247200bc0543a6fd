"""The pictures of a report."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from fedward_server.report.formatting import counted, epsilon, figure, interval, metric_name, runs
from fedward_server.report.stats import (
    LOWER_IS_BETTER,
    OF_ONE_SITE,
    Estimate,
    finite,
    of_kind,
    ordered,
    own,
    together,
    together_estimate,
    together_mean_estimate,
)
from fedward_server.results import Arm, StudyResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[tuple[float, float], ...]

# How each arm looks, in every chart and legend of a study.

_PRIVATE = (
    ("--private-1", "s", "■"),
    ("--private-2", "^", "▲"),
    ("--private-3", "v", "▼"),
    ("--private-4", "P", "✚"),
)
DASHES = ("solid", (0, (5, 1.6)), (0, (1.4, 1.6)), (0, (5, 1.6, 1.4, 1.6)))


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, in every chart of a study.

    Attributes
    ----------
    variable : str
        The style sheet's colour.
    dash : object
        matplotlib's line style.
    border : str
        The nearest CSS border style, for legends.
    marker, symbol : str
        matplotlib's marker, and the character like it for legends.
    """

    variable: str
    dash: object = "solid"
    border: str = "solid"
    marker: str = "o"
    symbol: str = "●"
    thin: bool = False

    @property
    def colour(self) -> str:
        """The colour to hand to matplotlib."""
        return VARIABLES[self.variable]


def looks(results: StudyResults) -> dict[str, Look]:
    """How each arm is drawn, by its name."""
    found, private = {}, 0
    for arm in ordered(results.arms):
        if arm.kind in OF_ONE_SITE:
            found[arm.name] = Look("--alone", marker="", symbol="", thin=True)
        elif arm.kind == "pooled":
            found[arm.name] = Look("--pooled", DASHES[2], "dotted", "D", "◆")
        elif arm.kind == "personal":
            found[arm.name] = Look("--federated", DASHES[1], "dashed", "s", "■")
        elif arm.epsilon is None:
            found[arm.name] = Look("--federated")
        else:
            variable, marker, symbol = _PRIVATE[private % len(_PRIVATE)]
            found[arm.name] = Look(variable, DASHES[1], "dashed", marker, symbol)
            private += 1
    return found


# From a matplotlib figure to an inline SVG that follows the page's colours.

# Colours that matplotlib draws with, each standing for a variable of the page's style sheet, so
# that one drawing serves light, dark and print.
COLOURS: dict[str, str] = {
    "#0a0001": "--ink",
    "#0a0002": "--muted",
    "#0a0003": "--line",
    "#0a0004": "--paper",
    "#0a0005": "--warn",
    "#0a0010": "--alone",
    "#0a0011": "--federated",
    "#0a0012": "--private-1",
    "#0a0013": "--private-2",
    "#0a0014": "--private-3",
    "#0a0015": "--private-4",
    "#0a0016": "--pooled",
}
VARIABLES = {variable: colour for colour, variable in COLOURS.items()}
INK, MUTED, LINE, PAPER, WARN = (
    VARIABLES[name] for name in ("--ink", "--muted", "--line", "--paper", "--warn")
)

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedward",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
# Inches beside axes with numbers: of seven digits and a label, of digits and a label, of half a
# number, and of a title.
_ROOM = (0.72, 0.48, 0.16, 0.3)
_XML = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style.*?</style>", re.DOTALL
)
_OPEN = re.compile(r"<svg\b[^>]*?viewBox=\"([^\"]+)\"[^>]*>", re.DOTALL)


def draw(
    plot: Callable[[Axes], None],
    *,
    name: str,
    words: str,
    width: float = 4.8,
    height: float = 2.7,
    numbers: bool = False,
) -> str:
    """Draw into fresh axes and give the SVG element.

    Parameters
    ----------
    plot : callable
        Draws into the axes, with colours from this module.
    name : str
        Letters, digits and hyphens; makes the element's ids unique in the page.
    words : str
        What a reader who does not see the picture is told.
    width, height : float
        Inches; the page scales the picture to the room there is.
    numbers : bool
        Both axes have numbers, whose room is known; other labels are measured, which takes as long
        as the drawing.
    """
    # Imported here: loading matplotlib takes longer than a run's start may.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE), _unknown_glyphs():
        figure = Figure(
            figsize=(width, height),
            layout=None if numbers else "constrained",
            facecolor="none",
        )
        canvas, axes = FigureCanvasSVG(figure), figure.add_subplot(facecolor="none")
        if numbers:
            left, bottom, right, top = _ROOM
            figure.subplots_adjust(
                left / width, bottom / height, 1 - right / width, 1 - top / height
            )
        plot(axes)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, words)


@contextmanager
def _unknown_glyphs() -> Iterator[None]:
    # The browser sets the text, with its own fonts; the one used for measuring need not know it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def _inline(text: str, name: str, words: str) -> str:
    text = _XML.sub("", text)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r"#0a00[0-9a-f]{2}", lambda match: f"var({COLOURS[match[0]]})", text)
    label = escape(words)
    return _OPEN.sub(
        lambda match: f'<svg viewBox="{match[1]}" role="img" aria-label="{label}">', text, count=1
    ).strip()


def comparison(results: StudyResults, name: str) -> str | None:
    """A line per way to train: each site's own test, all test patients together with the interval.

    None where no arm has a figure.
    """
    alone = [arm for arm in of_kind(results, "alone") if arm.test]
    others = [arm for arm in ordered(results.arms) if arm.test and arm.kind not in OF_ONE_SITE]
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
    words = f"{metric_name(metric)} over ε: {'; '.join(told)}."
    return draw(plot, name=name, words=words, numbers=True)


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


# The learning curves of a report.


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
    look = looks(results)
    points = tuple(
        (arm, tuple((x, y) for x, y in curve if y is not None), look[arm])
        for arm, curve in curves.items()
        if any(y is not None for _, y in curve)
    )
    return _drawn_curves(points, _stages(results), what, name) if points else None


@functools.lru_cache(64)  # a run writes its report many times, and most of it is as before
def _drawn_curves(
    points: tuple[tuple[str, Curve, Look], ...],
    stages: tuple[tuple[float, str], ...],
    what: str,
    name: str,
) -> str:
    def plot(axes: Axes) -> None:
        for begins, stage in stages:
            axes.axvline(begins, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(
                stage,
                (begins, 0.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=8,
                color=MUTED,
            )
        for _, curve, look in points:
            _line(axes, curve, look)
        axes.grid(axis="y")
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("round")
        axes.set_title(what, loc="left", fontsize=9.5, color=INK)

    ends = "; ".join(f"{arm} ends at {curve[-1][1]:.3f}" for arm, curve, _ in points)
    return draw(plot, name=name, words=f"{what}, by round: {ends}.", numbers=True)


def _line(axes: Axes, curve: Curve, look: Look) -> None:
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


def _stages(results: StudyResults) -> tuple[tuple[float, str], ...]:
    """Where a stage of the schedule begins, and its name, from the longest arm."""
    rounds = max((arm.rounds for arm in results.arms), key=len, default=[])
    return tuple(
        (after.round - 0.5, after.stage)
        for before, after in pairwise(rounds)
        if before.stage != after.stage
    )
