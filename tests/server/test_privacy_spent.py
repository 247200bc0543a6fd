"""ε per site in report and card: of all rounds that were ordered and may have been charged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import ConfigRecord, Message, RecordDict
from unguarded import UnguardedSites

from fedward.dp.accounting import calibrate
from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import Refusal, SiteFacts, TrainOutcome
from fedward.rule_codes import RuleCode
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.checkpoints import Checkpoints
from fedward_server.events import Event, RoundEnded
from fedward_server.job import Job
from fedward_server.privacy_spent import carry_over, charge, charge_ordered, settle
from fedward_server.reply_validation import InvalidReply, read_update
from fedward_server.results import Arm, SitePrivacy
from fedward_server.round_loop import StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool

Make = Callable[..., Any]
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
ROUNDS = 6


def independent(spent: SitePrivacy) -> float:
    accountant = PLDAccountant()
    step = PoissonSampledDpEvent(spent.sampling_rate, GaussianDpEvent(spent.noise_multiplier))
    accountant.compose(step, spent.steps)
    return float(accountant.get_epsilon(spent.delta))


class Wayward(Trainer):
    """Is away in the last round, and in the one before sends what is no update."""

    def train(self, arrays: Any, order: Any) -> Any:
        if order.round == ROUNDS:
            raise RuntimeError
        values, outcome = super().train(arrays, order)
        if order.round == ROUNDS - 1:
            values = {name: np.full_like(value, np.nan) for name, value in values.items()}
        return values, outcome


class Sites(UnguardedSites):
    """Two sites, of which the second is wayward."""

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        trainer = super().trainer_of(site, plan)
        if site.name == "site-2":
            trainer.__class__ = Wayward
        return trainer


def run(job: Job, sites: list[PreparedSite]) -> None:
    identity.become_server()
    pool = Pool(State(Sites(sites, Runtime(randomness="seeded"))), 0)
    try:
        StudyRun(job, LocalGrid(pool, len(sites))).run()
    finally:
        pool.close()


@pytest.mark.parametrize("stops", [False, True], ids=["at once", "with a restart"])
def test_what_a_site_sent_between_evaluations_is_in_its_epsilon(
    make_plan: Make, make_site: Make, tmp_path: Path, stops: bool
) -> None:
    plan = make_plan(
        privacy=PRIVATE,
        metrics={"evaluate_every": 4},
        participation={"quorum": 1, "retries": 0},
        training={"rounds": ROUNDS, "batch_size": 6},
    )
    sites = [make_site(f"site-{i}", seed=i) for i in (1, 2)]
    kept = Checkpoints(tmp_path, plan_hash(plan))

    def fresh() -> Job:
        start, arm = to_arrays(build_model(plan, 0)), Arm(name="t", kind="federated")
        return Job(plan, start, arm, save=kept.save)

    job = fresh()

    def stop_once(event: Event) -> None:
        if stops and isinstance(event, RoundEnded) and event.result.round == 3:
            job.stop.set()

    job.listen = stop_once
    run(job, sites)
    if stops:
        job = fresh()
        assert kept.restore(job)
        run(job, sites)
    assert job.complete
    per_round = job.arm.rounds[0].sites["site-1"].steps
    assert per_round == 4
    steps = {site: spent.steps for site, spent in job.arm.privacy.items()}
    # What was refused here has left the hospital; what failed there may have been charged.
    assert steps == dict.fromkeys(("site-1", "site-2"), ROUNDS * per_round)
    for spent in job.arm.privacy.values():
        theirs = independent(spent)
        assert theirs - 0.001 <= spent.epsilon <= theirs + 0.03
    told = [round_.sites["site-1"].epsilon for round_ in job.arm.rounds]
    assert [number for number, epsilon in enumerate(told, 1) if epsilon is not None] == [4, ROUNDS]
    assert told[3] < told[-1] == job.arm.privacy["site-1"].epsilon


def outcome(round_: int, steps: int = 5, noise: float = 1.0, rate: float = 0.1) -> TrainOutcome:
    return TrainOutcome(
        site="north",
        round=round_,
        patients=9,
        images=9,
        steps=steps,
        seconds=0.0,
        delta=1e-3,
        noise_multiplier=noise,
        sampling_rate=rate,
    )


def test_a_round_costs_once_and_the_worst_noise_stands_for_all() -> None:
    arm = Arm(name="t", kind="federated")
    for one in (outcome(1), outcome(1), outcome(3, noise=0.9), outcome(4, rate=0.05)):
        charge(arm, one, 1e-3)
    settle(arm)
    spent = arm.privacy["north"]
    assert (spent.steps, spent.noise_multiplier, spent.sampling_rate) == (15, 0.9, 0.1)
    assert spent.epsilon == pytest.approx(independent(spent), abs=0.03)
    charge(arm, outcome(5, noise=1e-9), 1e-3)
    settle(arm)
    assert arm.privacy["north"].epsilon == 1e9
    assert Arm.model_validate_json(arm.model_dump_json()) == arm


@pytest.mark.parametrize(("noise", "rate"), [(None, None), (0.0, 0.1), (-1.0, 0.1), (1.0, 7.0)])
def test_what_is_not_private_has_no_bound(noise: float | None, rate: float | None) -> None:
    arm, claim = Arm(name="t", kind="federated"), {"noise_multiplier": noise, "sampling_rate": rate}
    charge(arm, outcome(1).model_copy(update=claim), 1e-3)
    settle(arm)
    assert arm.privacy["north"].epsilon == 1e9
    assert arm.privacy["north"].spent(".3f") == "no bound"
    told = SitePrivacy(epsilon=7.98, delta=1e-3, noise_multiplier=1, sampling_rate=1, steps=1)
    assert told.spent(".3f") == "7.980"


FACTS = SiteFacts(
    site="north",
    patients=60,
    images=60,
    train_patients=40,
    validation_patients=10,
    test_patients=10,
    train_images=40,
    validation_images=10,
    test_images=10,
)


def test_a_round_that_was_ordered_costs_what_its_update_would(make_plan: Make) -> None:
    plan = make_plan(privacy=PRIVATE, training={"rounds": 4, "batch_size": 6})
    heard, silent = (Arm(name="t", kind="federated") for _ in range(2))
    whole = calibrate(plan, 40)
    for number in (1, 2, 3):
        charge_ordered(silent, plan, FACTS, number)
        charge_ordered(silent, plan, FACTS, number)
        update = outcome(number, whole.steps // 4, whole.noise_multiplier, whole.sampling_rate)
        charge(heard, update, 1e-3)
        charge(silent, update, 1e-3)  # late, and no second cost
        charge_ordered(heard, plan, FACTS, number)
    assert silent.privacy == heard.privacy
    assert heard.privacy["north"].steps == 3 * whole.steps // 4
    none = FACTS.model_copy(update={"train_patients": 0})
    charge_ordered(heard, plan, none, 4)
    settle(heard)
    assert heard.privacy["north"].epsilon == 1e9
    charge_ordered(silent, make_plan(), FACTS, 4)
    assert silent.privacy["north"].last_round == 3


@pytest.mark.parametrize("charged", [None, False])
def test_a_refusal_costs_nothing_only_where_the_site_says_so(charged: bool | None) -> None:
    refusal = Refusal(site="north", round=1, kind="paused", code=RuleCode.PAUSED, charged=charged)
    content = RecordDict({"refusal": ConfigRecord(refusal.to_flat())})
    read = read_update(Message(content, 1, "train"), "north", 1, {})
    assert isinstance(read, InvalidReply)
    assert read.uncharged is (charged is False)


def test_without_privacy_nothing_is_spent() -> None:
    arm = Arm(name="t", kind="federated")
    charge(arm, outcome(1), None)
    assert arm.privacy == {}


def test_what_was_told_before_a_restart_is_not_taken_back() -> None:
    told, arm = Arm(name="t", kind="federated"), Arm(name="t", kind="federated")
    for number in (1, 2):
        charge(told, outcome(number), 1e-3)
    charge(arm, outcome(1), 1e-3)
    carry_over(arm, told)
    assert arm.privacy == told.privacy
