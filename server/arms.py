"""From counts to the figures of an arm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from fedward.metrics import Counts, SegmentationCounts
from fedward.plan.schema import Plan
from server.results import Figures, TestFigures


def figures(plan: Plan, counts: Mapping[str, Counts]) -> tuple[dict[str, Figures], Figures]:
    """Figures per site, and those of all sites' images together (not a mean of the sites')."""
    names = plan.metrics.report
    per_site = {site: one.figures(names) for site, one in sorted(counts.items())}
    return per_site, (add_up(counts).figures(names) if counts else {})


def add_up(counts: Mapping[str, Counts]) -> Counts:
    """The counts of all sites together, added in the order of the sites' names."""
    parts: list[Any] = [counts[site] for site in sorted(counts)]
    return reduce(lambda one, other: one + other, parts)  # type: ignore[no-any-return]


def test_figures(
    plan: Plan, counts: Mapping[str, Counts], images: Mapping[str, int]
) -> TestFigures:
    """The final test metrics of an arm."""
    per_site, pooled = figures(plan, counts)
    per_class: dict[str, dict[str, float | None]] = {}
    total = add_up(counts)
    if isinstance(total, SegmentationCounts):
        for name in ("dice", "iou", "hd95"):
            if name in plan.metrics.report:
                per_class[name] = dict(zip(plan.task.classes, total.per_class(name), strict=True))
    measured = {site: images[site] for site in per_site}
    return TestFigures(per_site=per_site, pooled=pooled, per_class=per_class, images=measured)
