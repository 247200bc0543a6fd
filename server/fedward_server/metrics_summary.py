"""From counts to the figures of an arm."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from fedward.errors import FedwardError
from fedward.plan.schema import MetricName, Plan, Task
from fedward.tasks.private_counts import AnyCounts, PrivateCounts
from fedward_server.answers import answers_of
from fedward_server.results import Answers, Failure, Figures, Intervals, TestFigures

Sizes = Mapping[str, tuple[int, int]]
_LOG = logging.getLogger("fedward.server")


def figures(plan: Plan, counts: Mapping[str, AnyCounts]) -> tuple[dict[str, Figures], Figures]:
    """Figures per site, and those of all sites' images together (not a mean of the sites').

    Where a site withholds what a figure needs, that figure is of the other sites together.
    """
    names = plan.metrics.report
    per_site = {site: one.figures(names) for site, one in sorted(counts.items())}
    pooled: Figures = dict.fromkeys(names) if counts else {}
    for sites, own in _groups(plan, counts).items():
        pooled |= add_up(plan.task, {site: counts[site] for site in sites}).figures(own)
    return per_site, pooled


def contributors(plan: Plan, counts: Mapping[str, AnyCounts]) -> dict[MetricName, list[str]]:
    """By metric of the report, the sites whose counts give it."""
    return {
        name: [site for site in sorted(counts) if counts[site].gives(name)]
        for name in plan.metrics.report
    }


def _groups(plan: Plan, counts: Mapping[str, AnyCounts]) -> dict[tuple[str, ...], list[MetricName]]:
    """The metrics that the same sites give, by these sites."""
    groups: dict[tuple[str, ...], list[MetricName]] = {}
    for name, sites in contributors(plan, counts).items():
        if sites:
            groups.setdefault(tuple(sites), []).append(name)
    return groups


def add_up(task: Task, counts: Mapping[str, AnyCounts]) -> AnyCounts:
    """The counts of all sites together, added in the order of the sites' names.

    Where one site's counts have noise, exact ones of others are added in the form of noisy ones.
    """
    parts: list[Any] = [counts[site] for site in sorted(counts)]
    if any(isinstance(one, PrivateCounts) for one in parts):
        parts = [
            one if isinstance(one, PrivateCounts) else PrivateCounts.of(task, one) for one in parts
        ]
    return reduce(lambda one, other: one + other, parts)  # type: ignore[no-any-return]


def tested(
    plan: Plan,
    counts: Mapping[str, AnyCounts],
    sizes: Sizes,
    not_measured: Sequence[Failure] = (),
    missing: str = "",
    *,
    answers_by_site: bool = True,
) -> tuple[TestFigures | None, str]:
    """The final test metrics of an arm, and why it was not measured where it was not.

    Parameters
    ----------
    plan, counts, sizes, not_measured, answers_by_site
        As for :func:`test_figures`.
    missing : str
        Why the sites that sent no counts sent none.

    Returns
    -------
    figures : TestFigures or None
        None where there are no test patients, or no figures could be worked out.
    unmeasured : str
        Why; empty where at least one site was measured.
    """
    if not any(images for images, _ in sizes.values()):
        given = " (split.test is 0)" if not (plan.split.given or plan.split.test) else ""
        return None, f"no site has test patients{given}"
    try:
        found = test_figures(plan, counts, sizes, not_measured, answers_by_site=answers_by_site)
    except Exception as error:  # a model is worth more than its figures
        _LOG.exception("no test figures could be worked out")
        told = str(error) if isinstance(error, FedwardError) else type(error).__name__
        return None, f"no figures could be worked out of the counts ({told})"
    return found, "" if counts else f"no site could be measured: {missing}"


def patients_per_image(sizes: Sequence[tuple[int, int]]) -> float:
    """Patients that one image stands for: images of one patient are taken as alike.

    Kish's effective sample size (1965, section 8.2) over the images, at sites with as many images
    for each of their patients.

    Parameters
    ----------
    sizes : sequence of (int, int)
        Images and patients of each site.
    """
    images = sum(n for n, _ in sizes)
    alike = sum(n * n / patients for n, patients in sizes if patients)
    return min(1.0, images / alike) if alike else 1.0


def test_figures(
    plan: Plan,
    counts: Mapping[str, AnyCounts],
    sizes: Sizes,
    not_measured: Sequence[Failure] = (),
    *,
    answers_by_site: bool = True,
) -> TestFigures:
    """The final test metrics of an arm.

    Parameters
    ----------
    plan : Plan
        The study.
    counts : mapping
        Of each site that was measured.
    sizes : mapping
        Test images and test patients of each site.
    not_measured : sequence of Failure
        Sites with test patients that sent no counts.
    answers_by_site : bool
        Whether each site's curves are kept beside those of all sites.
    """
    per_site, pooled = figures(plan, counts)
    found = TestFigures(
        per_site=per_site,
        pooled=pooled,
        images={site: sizes[site][0] for site in per_site},
        patients={site: sizes[site][1] for site in per_site},
        contributors={str(name): sites for name, sites in contributors(plan, counts).items()},
        not_measured=list(not_measured),
        evaluation_epsilon=_evaluation_epsilon(counts),
    )
    for site, one in sorted(counts.items()):
        names, scale = plan.metrics.report, patients_per_image([sizes[site]])
        errors, intervals = _uncertainty(one, names, scale)
        if errors:
            found.site_standard_errors[site] = errors
        found.site_intervals[site] = intervals
        answers = answers_of(plan.task, one, scale) if answers_by_site else None
        if answers is not None:
            found.site_answers[site] = answers
    for sites, own in _groups(plan, counts).items():
        total = add_up(plan.task, {site: counts[site] for site in sites})
        scale = patients_per_image([sizes[site] for site in sites])
        errors, intervals = _uncertainty(total, own, scale)
        found.standard_errors |= errors
        found.intervals |= intervals
        _by_class(found, plan.task, total, own, scale)
    found.answers = _answers_together(plan.task, counts, sizes)
    return found


def _evaluation_epsilon(counts: Mapping[str, AnyCounts]) -> float | None:
    known = [one.epsilon if isinstance(one, PrivateCounts) else None for one in counts.values()]
    bounds = [epsilon for epsilon in known if epsilon is not None]
    return max(bounds) if bounds and len(bounds) == len(known) else None


def _uncertainty(
    counts: AnyCounts, names: Sequence[MetricName], scale: float
) -> tuple[dict[str, float], Intervals]:
    """What the noise of private counts alone moves each figure by, and all intervals."""
    if not isinstance(counts, PrivateCounts):
        return {}, counts.intervals(names, scale)
    errors = counts.standard_errors(names)
    return errors, counts.intervals(names, scale, errors)


def _by_class(
    found: TestFigures, task: Task, counts: AnyCounts, names: Sequence[MetricName], scale: float
) -> None:
    for name in names:
        if task.spec.metric(name).by_class:
            values = dict(zip(task.classes, counts.per_class(name), strict=True))
            limits = zip(task.classes, counts.class_intervals(name, scale), strict=True)
            found.per_class[name] = values
            found.class_intervals[name] = {one: own for one, own in limits if own is not None}


def _answers_together(task: Task, counts: Mapping[str, AnyCounts], sizes: Sizes) -> Answers | None:
    """The answers of all sites; noisy ones of those sites that let scores go, if there are some."""
    noisy = any(isinstance(one, PrivateCounts) for one in counts.values())
    ranked = [site for site, one in counts.items() if one.gives("auc")] if noisy else []
    sites = ranked or list(counts)
    if not sites:
        return None
    total = add_up(task, {site: counts[site] for site in sites})
    return answers_of(task, total, patients_per_image([sizes[site] for site in sites]))
