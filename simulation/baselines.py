"""The arms that federation is measured against: each hospital alone, and all data in one place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data.types import PreparedSite
from client.training.trainer import Trainer
from fedward.metrics import counts_from_arrays
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import RoundOrder
from server.arms import figures, tested
from server.results import Arm, Round
from simulation.local import State
from simulation.paired import SiteAnswers, answers_on_test
from simulation.sites import pool_sites
from strategies.averaging import blend, decay_at

Arrays = Mapping[str, NDArray[Any]]


def lone_arm(
    state: State, plan: Plan, arrays: Arrays, seed: int, site: str | None
) -> tuple[Arm, SiteAnswers]:
    """Train on one hospital's patients, or on all when ``site`` is None, and test everywhere.

    The same model, start, rounds, local epochs and averaging as the federated study; with local
    steps, pooled data get the steps of all sites. Gives also the answers on each site's patients.
    """
    started = time.perf_counter()
    data = pool_sites(state.sites.sites) if site is None else state.sites.by_name()[site]
    arm = Arm(
        name="pooled" if site is None else f"alone: {site}",
        kind="pooled" if site is None else "alone",
        site=site,
    )
    own = as_many_images(plan, len(state.sites.sites)) if site is None else plan
    average = _train(Trainer(own, data, state.sites.runtime), own, arrays, seed, arm)
    sizes = {one.name: test_size(one) for one in state.sites.sites}
    answers = answers_on_test(state, plan, average)
    counts = {name: one.exact() for name, one in answers.items()}
    arm.test, arm.unmeasured = tested(plan, counts, sizes, answers_by_site=False)
    arm.seconds = time.perf_counter() - started
    return arm, answers


def test_size(site: PreparedSite) -> tuple[int, int]:
    """Test images and test patients of a site."""
    own = site.split["test"]
    return len(own), len(np.unique(site.patients[own]))


def as_many_images(plan: Plan, sites: int) -> Plan:
    """The plan for pooled data: so many steps that it sees as many images as the sites together.

    With local epochs that is so by itself.
    """
    steps = plan.training.local_steps
    if steps is None:
        return plan
    return plan.model_copy(
        update={"training": plan.training.model_copy(update={"local_steps": steps * sites})}
    )


def _train(trainer: Trainer, plan: Plan, arrays: Arrays, seed: int, arm: Arm) -> Arrays:
    average, before = arrays, time.perf_counter()
    for round_, model, loss in trainer.alone(arrays, seed):
        average = blend(average, model, decay_at(round_, plan.strategy.averaging))
        result = Round(
            round=round_, stage=plan.stage_of(round_)[0].name, seconds=0.0, train_loss=loss
        )
        if plan.is_evaluated(round_, "validation"):
            result.validation = _validate(trainer, plan, average, round_)
        result.seconds, before = time.perf_counter() - before, time.perf_counter()
        arm.rounds.append(result)
    return average


def _validate(trainer: Trainer, plan: Plan, arrays: Arrays, round_: int) -> dict[str, float | None]:
    if not len(trainer.site.split["validation"]):
        return {}
    counts, _ = trainer.evaluate(arrays, _order(plan, round_, "validation"))
    return figures(plan, {trainer.site.name: counts_from_arrays(plan.task, counts)})[1]


def _order(plan: Plan, round_: int, part: Any) -> RoundOrder:
    return RoundOrder(plan=canonical(plan), plan_hash=plan_hash(plan), round=round_, part=part)


def shares(sites: list[PreparedSite], workers: int) -> dict[str | None, int]:
    """Which worker trains which lone arm: the largest first, to the one with the least to do."""
    sizes: dict[str | None, int] = {site.name: len(site.split["train"]) for site in sites}
    sizes[None] = sum(sizes.values())
    load, places = [0] * max(1, workers), {}
    for name in sorted(sizes, key=lambda key: (-sizes[key], key or "")):
        place = load.index(min(load))
        places[name], load[place] = place, load[place] + sizes[name]
    return places
