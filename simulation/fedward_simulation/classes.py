"""Whether each class of the plan is there: nowhere is a mistake, at one hospital a fact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedward.errors import DataError
from fedward.plan.schema import Plan
from fedward_client.data.sample import PreparedSite, Sample
from fedward_client.data.volumes import let_go


def check_labels(plan: Plan, samples: Iterable[Sample]) -> None:
    """Find an empty class among the labels, before any image is read.

    Raises
    ------
    DataError
        No image is of a class.
    """
    if not plan.task.has_labels:
        return
    seen: set[int] = set()
    for sample in samples:
        seen.update(_labels(plan, sample.label or ()))
    _check(plan, seen)


def missing_classes(plan: Plan, sites: Sequence[PreparedSite]) -> dict[str, list[str]]:
    """The classes that a site has no image of, by site.

    Raises
    ------
    DataError
        No site has an image of a class.
    """
    there = {site.name: plan.task.spec.classes_seen(plan.task, site.targets) for site in sites}
    for site in sites:
        let_go(site.targets)
    _check(plan, set().union(*there.values()))
    lacking = {
        name: [one for place, one in enumerate(plan.task.classes) if place not in seen]
        for name, seen in there.items()
    }
    return {name: classes for name, classes in lacking.items() if classes}


def told(missing: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each site."""
    return [f"{site} has no image of: {', '.join(names)}" for site, names in missing.items()]


def _check(plan: Plan, seen: set[int]) -> None:
    empty = [name for place, name in enumerate(plan.task.classes) if place not in seen]
    if empty:
        raise DataError(
            "each class of the plan needs an image",
            value=f"none of {', '.join(empty)}",
            fix="Check its name in the labels or its number in the masks, or take it out of the "
            "plan",
            where="task.classes",
        )


def _labels(plan: Plan, label: tuple[int, ...]) -> set[int]:
    return set(np.flatnonzero(label).tolist()) if plan.task.multi_label else set(label)
