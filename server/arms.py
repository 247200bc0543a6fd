"""From counts to the figures of an arm."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import reduce
from typing import Any

from fedward.errors import FedwardError
from fedward.metrics import AnyCounts, ClassificationCounts, PrivateCounts
from fedward.plan.schema import Plan, Task
from server.results import Figures, TestFigures

_LOG = logging.getLogger("fedward.server")


def figures(plan: Plan, counts: Mapping[str, AnyCounts]) -> tuple[dict[str, Figures], Figures]:
    """Figures per site, and those of all sites' images together (not a mean of the sites')."""
    names = plan.metrics.report
    per_site = {site: one.figures(names) for site, one in sorted(counts.items())}
    return per_site, (add_up(plan.task, counts).figures(names) if counts else {})


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
    plan: Plan, counts: Mapping[str, AnyCounts], images: Mapping[str, int], missing: str = ""
) -> tuple[TestFigures | None, str]:
    """The final test metrics of an arm; or none, and why.

    Parameters
    ----------
    counts, images : mapping
        The counts of the sites that could be measured, and all sites' test images.
    missing : str
        Why the others could not.
    """
    if counts:
        try:
            return test_figures(plan, counts, images), ""
        except Exception as error:  # a model is worth more than its figures
            _LOG.exception("no test figures could be worked out")
            told = str(error) if isinstance(error, FedwardError) else type(error).__name__
            return None, f"no figures could be worked out of the counts ({told})"
    if any(images.values()):
        return None, f"no site could be measured: {missing}"
    given = " (split.test is 0)" if not (plan.split.given or plan.split.test) else ""
    return None, f"no site has test patients{given}"


def test_figures(
    plan: Plan, counts: Mapping[str, AnyCounts], images: Mapping[str, int]
) -> TestFigures:
    """The final test metrics of an arm."""
    per_site, pooled = figures(plan, counts)
    per_class: dict[str, dict[str, float | None]] = {}
    total = add_up(plan.task, counts)
    if not isinstance(total, ClassificationCounts) and plan.task.kind == "segmentation":
        for name in ("dice", "iou", "hd95"):
            if name in plan.metrics.report:
                per_class[name] = dict(zip(plan.task.classes, total.per_class(name), strict=True))
    measured = {site: images[site] for site in per_site}
    noise = {site: _noise(plan, one) for site, one in sorted(counts.items())}
    return TestFigures(
        per_site=per_site,
        pooled=pooled,
        per_class=per_class,
        images=measured,
        evaluation_epsilon=total.epsilon if isinstance(total, PrivateCounts) else None,
        standard_errors=_noise(plan, total),
        site_standard_errors={site: errors for site, errors in noise.items() if errors},
    )


def _noise(plan: Plan, counts: AnyCounts) -> dict[str, float]:
    """What the noise of private counts alone moves each figure by, one standard deviation."""
    if not isinstance(counts, PrivateCounts):
        return {}
    return counts.standard_errors(plan.metrics.report)
