"""The page: ``report.html``, whole in itself."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from fedward.files import write_text
from fedward.plan.text import toml_text
from fedward.printable import printable
from fedward_server.report import (
    answers,
    charts,
    coverage,
    formatting,
    memorisation,
    summary,
    tables,
)
from fedward_server.report.charts import Look, looks
from fedward_server.report.stats import (
    OF_ONE_SITE,
    Estimate,
    of_kind,
    ordered,
    own_mean_estimate,
    site_names,
    together_mean_estimate,
)
from fedward_server.results import Arm, StudyResults

_FIGURES: Final = {
    "private": "with the noise with which hospitals send them",
    "minimum-cells": "as hospitals send them: small cells merged or withheld",
    "exact": "as they were counted, which no hospital sends",
}


@dataclass(frozen=True)
class Tile:
    """One of the large figures at the top of a study."""

    label: str
    value: str
    variable: str
    interval: str = ""
    own: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture and what stands under it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class StudyPage:
    """What the template shows of one study."""

    id: str
    results: StudyResults
    headline: str
    tiles: Sequence[Tile]
    facts: Sequence[tuple[str, str]]
    looks: Mapping[str, Look]
    whom: str
    coverage: tables.Table | None
    comparison: Chart | None
    direction: str
    primary: tables.Table | None
    site_metrics: tables.Table | None
    metrics: tables.Table | None
    classes: Sequence[tables.Table]
    answers: Sequence[Chart]
    operating: tables.Table | None
    confusion: Sequence[tables.Table]
    curves: Sequence[Chart]
    privacy: tables.Table | None
    privacy_words: Sequence[tuple[str, str]]
    privacy_curve: Chart | None
    audit_words: Sequence[str]
    audit: Sequence[tables.Table]
    sites: tables.Table | None
    missing_classes: Sequence[str]
    patient_risk: str
    unchecked: str
    participation: tables.Table | None
    participation_words: str
    participation_charts: Sequence[Chart]
    contribution: tables.Table | None
    cost: tables.Table | None
    rounds: Sequence[tables.Table]
    weights: Sequence[tuple[str, str]]
    weights_names: Sequence[tuple[str, str]]
    plan: str
    intended_use: str
    unfinished: Sequence[str]


def write_report(
    results: Sequence[StudyResults], path: Path, *, extra_notes: Sequence[str] = ()
) -> None:
    """Write one self-contained page about one or several studies.

    Parameters
    ----------
    results : sequence of StudyResults
        In the order to show.
    path : Path
        The HTML file; replaced as a whole.
    extra_notes : sequence of str
        Further remarks, a paragraph each, as plain text.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    write_text(path, render(results, extra_notes=extra_notes))


def render(results: Sequence[StudyResults], *, extra_notes: Sequence[str] = ()) -> str:
    """The page's HTML; the same results give the same text."""
    template, style = _template()
    page = template.render(
        style=style,
        studies=[_study(f"study-{place}", one) for place, one in enumerate(results, 1)],
        synthetic=[one.title or one.study for one in results if one.synthetic],
        notes=list(extra_notes),
        words=formatting,
        memorisation=memorisation,
    )
    return printable(page)


@functools.cache
def _template() -> tuple[Template, Markup]:
    """The page and its style sheet, compiled once: a run writes its report many times."""
    environment = Environment(
        loader=PackageLoader("fedward_server.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    files = resources.files("fedward_server.report")
    style = files.joinpath("templates", "report.css").read_text("utf-8")
    return environment.get_template("report.html.jinja"), Markup(style)


def _study(name: str, results: StudyResults) -> StudyPage:
    lead = next((arm for arm in of_kind(results, "federated") if arm.test), None)
    shown = answers.answering(results)
    return StudyPage(
        id=name,
        results=results,
        headline=summary.headline(results),
        tiles=_tiles(results),
        facts=_facts(results),
        looks=looks(results),
        whom=coverage.whom(results, lead, results.primary) if lead else "",
        coverage=tables.coverage_table(results, lead) if lead else None,
        comparison=_comparison(name, results),
        direction=charts.direction(results.primary),
        primary=tables.primary_table(results),
        site_metrics=tables.site_metrics_table(results),
        metrics=tables.metrics_table(results),
        classes=tables.class_tables(results),
        answers=_answers(name, shown) if shown else [],
        operating=answers.operating_table(shown) if shown else None,
        confusion=answers.confusion_tables(shown, _classes(results)) if shown else [],
        curves=_curves(name, results),
        privacy=tables.privacy_table(results),
        privacy_words=summary.privacy_words(results),
        privacy_curve=_privacy_curve(name, results),
        audit_words=memorisation.audit_words(results.audit) if results.audit else [],
        audit=memorisation.audit_tables(results.audit) if results.audit else [],
        sites=tables.sites_table(results),
        missing_classes=[
            f"{site} has no image of {formatting.listed(names)}."
            for site, names in results.missing_classes.items()
        ],
        patient_risk=summary.patient_risk(results),
        unchecked=formatting.listed(results.unchecked),
        participation=tables.participation_table(results),
        participation_words=_participation_words(results),
        participation_charts=_participation(name, results),
        contribution=tables.contribution_table(results),
        cost=tables.cost_table(results),
        rounds=[tables.rounds_table(results, arm) for arm in _with_rounds(results)],
        weights=_weights(results),
        weights_names=_weights_names(results),
        plan=toml_text(_shown(results.plan)),
        intended_use=str(results.plan.get("study", {}).get("intended_use", "")),
        unfinished=results.missing
        or [arm.name for arm in ordered(results.arms) if not arm.finished],
    )


def _with_rounds(results: StudyResults) -> list[Arm]:
    return [arm for arm in ordered(results.arms) if arm.rounds]


def _tiles(results: StudyResults) -> list[Tile]:
    metric, look = results.primary, looks(results)
    alone = [arm for arm in of_kind(results, "alone") if arm.test]
    groups = [("hospitals alone, mean", alone, "--alone")] if alone else []
    groups += [
        (arm.name, [arm], look[arm.name].variable)
        for arm in ordered(results.arms)
        if arm.kind not in OF_ONE_SITE and arm.test
    ]
    found = []
    for label, arms, colour in groups:
        whole, own = together_mean_estimate(arms, metric), own_mean_estimate(arms, metric)
        if whole is None and own is None:
            continue
        value = formatting.figure(whole.value, metric) if whole else "not known"
        limits = formatting.interval(whole.interval, metric) if whole and whole.interval else ""
        found.append(Tile(label, value, colour, limits, _told(own, metric)))
    return found


def _told(one: Estimate | None, metric: str) -> str:
    if one is None:
        return ""
    limits = f" ({formatting.interval(one.interval, metric)})" if one.interval else ""
    return f"{formatting.figure(one.value, metric)}{limits}"


def _classes(results: StudyResults) -> list[str]:
    return [str(name) for name in results.plan.get("task", {}).get("classes", ())]


def _answers(name: str, arm: Arm) -> list[Chart]:
    area, error = (answers.curve_words(arm, metric) for metric in ("auc", "ece"))
    measured = arm.test.answers if arm.test else None
    bins = answers.ece(measured) if measured else None
    error = error or (f"{answers.TOGETHER} {bins:.3f}" if bins is not None else "")
    whose = f"Of {answers.whose_curves(arm)}."
    drawn = (
        _picture(answers.roc(arm, f"{name}-roc"), f"{whose} AUC: {area}." if area else whose),
        _picture(answers.precision_recall(arm, f"{name}-precision"), whose),
        _picture(
            answers.calibration(arm, f"{name}-calibration"),
            "Larger points are more answers; on the dashed line confidence is right. "
            f"Calibration error (ECE): {error}. It is too large where a bin has few answers.",
        ),
    )
    return [chart for chart in drawn if chart]


def _facts(results: StudyResults) -> list[tuple[str, str]]:
    model = str(results.plan.get("model", {}).get("name", ""))
    pairs = [
        ("sites", str(len(site_names(results)))),
        ("patients", f"{sum(facts.patients for facts in results.sites):,}"),
        ("images", f"{sum(facts.images for facts in results.sites):,}"),
        ("model", f"{model}, {results.parameters:,} parameters".removeprefix(", ")),
        ("partition", results.partition),
        ("figures", _FIGURES.get(results.figures, "")),
        ("engine", f"{results.engine} on {results.device}"),
        ("seed", str(results.seed)),
        ("time", formatting.duration(results.seconds)),
        ("start-up", formatting.duration(results.start_up_seconds)),
    ]
    return [(label, value) for label, value in pairs if value]


def _picture(svg: str | None, caption: str) -> Chart | None:
    # Drawn by this package from escaped texts.
    return None if svg is None else Chart(Markup(svg), caption)


def _comparison(name: str, results: StudyResults) -> Chart | None:
    caption = (
        f"{formatting.metric_name(results.primary)}: diamonds with their interval of 95 %, test "
        "patients together (hospitals alone: their mean); circles, each site's own test patients."
    )
    return _picture(charts.comparison(results, f"{name}-comparison"), caption)


def _curves(name: str, results: StudyResults) -> list[Chart]:
    drawn = (
        _picture(
            charts.learning(results, f"{name}-learning"),
            "Shared models on the validation patients of the sites that let their counts go, a "
            "hospital alone on its own.",
        ),
        _picture(charts.losses(results, f"{name}-losses"), "Mean training loss of the round."),
    )
    return [chart for chart in drawn if chart]


def _privacy_curve(name: str, results: StudyResults) -> Chart | None:
    caption = (
        "What privacy costs: each point is a federated model trained for that ε. Dashed: federated "
        "without privacy; dotted: pooled data; dash-dotted: the mean of the hospitals alone."
    )
    return _picture(charts.privacy_curve(results, f"{name}-epsilon"), caption)


def _participation(name: str, results: StudyResults) -> list[Chart]:
    sites, found = site_names(results), []
    for place, arm in enumerate(of_kind(results, "federated")):
        drawn = charts.participation(arm, sites, f"{name}-sites-{place}")
        chart = _picture(drawn, f"{arm.name}: squares, updates that counted; crosses, failures.")
        found += [chart] if chart else []
    return found


def _participation_words(results: StudyResults) -> str:
    sites = site_names(results)
    arms = [arm for arm in of_kind(results, "federated") if arm.rounds]
    whole = [arm.name for arm in arms if tables.always_there(arm, sites)]
    if not arms or len(whole) == len(arms):
        return "Every site's update counted in every round." if arms else ""
    missed = sum(len(set(sites) - set(r.sites)) for arm in arms for r in arm.rounds)
    text = (
        f"{formatting.counted(missed, 'update')} did not count; the rounds went on with those of "
        "other sites."
    )
    return f"{text} Nothing was missing in: {'; '.join(whole)}." if whole else text


def _weights(results: StudyResults) -> list[tuple[str, str]]:
    labels = {"reshaped_head": "head of another shape, made anew", "unused": "not used"}
    return [
        (labels.get(key, key.replace("_", " ")), f"{value:,}")
        for key, value in results.weights_report.items()
    ]


def _weights_names(results: StudyResults) -> list[tuple[str, str]]:
    labels = {"missing": "Not in the file, made anew", "reshaped_head": "Of another shape"}
    return [(labels.get(k, k), ", ".join(names)) for k, names in results.weights_names.items()]


def _shown(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan without the folder of its weights, which would tell about a machine."""
    shown = copy.deepcopy(plan)
    weights = shown.get("model", {}).get("initial_weights")
    if weights and re.match(r"[/\\~]|[A-Za-z]:[/\\]|\.\.", weights.get("file", "")):
        weights["file"] = f"…/{PurePosixPath(weights['file'].replace(chr(92), '/')).name}"
    return shown
