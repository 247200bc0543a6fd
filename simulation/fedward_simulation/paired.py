"""How arms of a simulation differ on the same test patients, with an interval over patients.

Between hospitals only counts are known, and two models have to be taken as independent. A
simulation has each model's answers: both err on the same hard patients, and the interval of the
difference is narrower for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import MetricName, Plan
from fedward.protocol import RoundOrder
from fedward.tasks.intervals import LEVEL
from fedward_client.training.evaluate import Answers
from fedward_client.training.trainer import Trainer
from fedward_server.report.stats import ordered
from fedward_server.results import Arm, Paired
from fedward_simulation.local import State

SiteAnswers = Mapping[str, Answers]
Difference = tuple[float, tuple[float, float]]
Part = tuple[Callable[[NDArray[np.bool_]], float | None], NDArray[np.int64]]
_TINY: Final = 1e-12
_GROUPS: Final = 100
"""Most groups of patients that are left out in turn."""


def answers_on_test(
    state: State, plan: Plan, arrays: Mapping[str, NDArray[Any]], *, surface: bool = True
) -> SiteAnswers:
    """A model's answers on the test patients of each site that has some.

    Without ``surface`` HD95 is not measured.
    """
    order = RoundOrder(plan=canonical(plan), plan_hash=plan_hash(plan), round=0, part="test")
    return {
        site.name: state.sites.trainer_of(site, plan).answers(arrays, order, surface=surface)
        for site in state.sites.sites
        if len(site.split["test"])
    }


def own_answers_on_test(
    state: State,
    plan: Plan,
    arrays: Mapping[str, NDArray[Any]],
    states: Mapping[int, dict[str, NDArray[Any]]],
    *,
    surface: bool = True,
) -> SiteAnswers:
    """The answers of the sites' own models, each on the test patients of its site.

    Parameters
    ----------
    arrays : mapping
        The shared model.
    states : mapping
        By number of the site, what it keeps.
    """
    order = RoundOrder(
        plan=canonical(plan), plan_hash=plan_hash(plan), round=plan.last_round, part="test"
    )
    found = {}
    for place, site in enumerate(state.sites.sites):
        if len(site.split["test"]):
            trainer = Trainer(plan, site, state.sites.runtime)
            trainer.state.from_arrays(states.get(place, {}))
            found[site.name] = trainer.answers(arrays, order, surface=surface)
    return found


def paired(
    metric: MetricName, arms: Sequence[Arm], answers: Mapping[str, SiteAnswers]
) -> list[Paired]:
    """The first federated arm against hospitals alone, pooled data, and the other federated ones.

    Parameters
    ----------
    metric : str
        The primary one.
    arms : sequence of Arm
        All arms of the study.
    answers : mapping
        By name of an arm.
    """
    known = [arm for arm in ordered(arms) if arm.name in answers]
    federated = [arm for arm in known if arm.kind == "federated"]
    if not federated:
        return []
    lead, alone = federated[0], [arm for arm in known if arm.kind == "alone"]
    shared, names = answers[lead.name], [arm.name for arm in alone]
    found: list[tuple[list[str], bool, Difference | None]] = []
    by_site: list[tuple[str, str, str, Difference | None]] = []
    if alone:
        homes = {str(arm.site): answers[arm.name] for arm in alone}
        found.append((names, False, difference(metric, shared, [answers[n] for n in names])))
        found.append((names, True, difference_at_home(metric, shared, homes)))
        models = [arm for arm in (lead, lead.personal) if arm is not None and arm.name in answers]
        for one, home in product(models, alone):
            site = str(home.site)
            pair = {site: answers[home.name]}
            at = difference_at_home(metric, answers[one.name], pair)
            by_site.append((one.name, home.name, site, at))
    rest = [*federated[1:], *(arm for arm in known if arm.kind == "pooled")]
    found += [([arm.name], False, difference(metric, shared, [answers[arm.name]])) for arm in rest]
    return [
        Paired(
            one=lead.name, others=others, metric=metric, own=own, difference=one[0], interval=one[1]
        )
        for others, own, one in found
        if one is not None
    ] + [
        Paired(
            one=name,
            others=[home],
            metric=metric,
            own=True,
            site=site,
            difference=at[0],
            interval=at[1],
        )
        for name, home, site, at in by_site
        if at is not None
    ]


def difference(
    metric: MetricName, one: SiteAnswers, others: Sequence[SiteAnswers]
) -> Difference | None:
    """One model minus the mean of others on all test patients together.

    Returns
    -------
    tuple or None
        The difference and its interval (see :func:`jackknife`).
    """
    models = [_joined(list(model.values())) for model in (one, *others)]
    return jackknife([_part(metric, models)])


def difference_at_home(
    metric: MetricName, shared: SiteAnswers, homes: Mapping[str, SiteAnswers]
) -> Difference | None:
    """Mean over sites, on each one's patients, of a shared model minus the site's own.

    Over the sites for which both figures are there. Returns as :func:`difference`.
    """
    pairs = [
        [shared[site], own[site]] for site, own in homes.items() if site in shared and site in own
    ]
    parts = [_part(metric, pair) for pair in pairs]
    return jackknife(
        [part for part in parts if part[0](np.ones(len(part[1]), np.bool_)) is not None]
    )


def jackknife(parts: Sequence[Part]) -> Difference | None:
    """Mean of several differences, with the interval that leaving patients out in turn gives.

    Student's, from the variance of the delete-a-group jackknife (Wolter, 2007, chapter 4).

    Parameters
    ----------
    parts : sequence
        Each with other patients: a function from the images that are kept to a difference, and the
        patient of each image.

    Returns
    -------
    tuple or None
        None where a difference is not defined without some group, where there are less than two
        patients, or where no patient moves a difference that is not 0: so few tell nothing of
        how far it may be off.
    """
    values, variances, freedom = [], [], 0
    for value, patients in parts:
        people, owner = np.unique(patients, return_inverse=True)
        groups = min(_GROUPS, len(people))
        whole = value(_all(patients))
        without = [value(owner % groups != left) for left in range(groups)]
        there = [one for one in without if one is not None]
        if whole is None or len(there) < max(2, groups):
            return None
        values.append(whole)
        variances.append((groups - 1) * float(np.var(there)))
        freedom += groups - 1
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    error = math.sqrt(math.fsum(variances)) / len(values)
    if error < _TINY and abs(mean) > _TINY:
        return None
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    return mean, (mean - half, mean + half)


def _all(patients: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.ones(len(patients), np.bool_)


def _part(metric: MetricName, models: Sequence[Answers]) -> Part:
    """The first model minus the mean of the others, of the images that are kept."""

    def value(keep: NDArray[np.bool_]) -> float | None:
        figures = [_figure(metric, model, keep) for model in models]
        there = [figure for figure in figures if figure is not None]
        if len(there) < len(figures):
            return None
        return there[0] - math.fsum(there[1:]) / (len(there) - 1)

    return value, models[0].patients


def _figure(metric: MetricName, answers: Answers, keep: NDArray[np.bool_]) -> float | None:
    spec = answers.plan.task.spec
    values = answers.values[(slice(None),) * spec.answer_axis + (keep,)]
    targets = answers.targets if spec.target == "masks" else answers.targets[keep]
    return spec.count(values, targets).figures([metric])[metric]


def _joined(sites: Sequence[Answers]) -> Answers:
    """The answers at all sites; a patient is one site's."""
    spec = sites[0].plan.task.spec
    starts = np.cumsum([0, *(int(one.patients.max(initial=-1)) + 1 for one in sites[:-1])])
    return Answers(
        sites[0].plan,
        np.concatenate([one.values for one in sites], axis=spec.answer_axis),
        np.zeros(0, np.uint8)  # masks are not needed any more
        if spec.target == "masks"
        else np.concatenate([one.targets for one in sites]),
        np.concatenate([one.patients + start for one, start in zip(sites, starts, strict=True)]),
    )
