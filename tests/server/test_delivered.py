"""Which round's model a study delivers, and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedward.dp.accounting import private_steps_until
from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan.schema import Plan
from fedward.tasks.registry import counts_from_arrays
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.delivered import average_decay, best_round, out_of_patience
from fedward_server.job import Job
from fedward_server.report.summary import delivered
from fedward_server.results import Arm, Round
from fedward_server.round_loop import StudyRun
from fedward_simulation.audit.federation import unmeasured
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]
Arrays = dict[str, NDArray[Any]]
SEEDED = Runtime(randomness="seeded")
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}


def rounds(*values: float | None, metric: str = "auc", stages: str = "") -> list[Round]:
    names = stages or "a" * len(values)
    return [
        Round(round=number, stage=stage, seconds=0.0, validation={metric: value})
        for number, (value, stage) in enumerate(zip(values, names, strict=True), start=1)
    ]


def test_the_best_round_is_the_first_with_the_best_known_figure(make_plan: Make) -> None:
    plan = make_plan()
    assert best_round(plan, rounds(None, 0.6, 0.8, None, 0.8, 0.7)) == 3
    assert best_round(plan, rounds(None, None)) is None
    by_loss = make_plan(metrics={"report": ["auc", "loss"], "primary": "loss"})
    assert best_round(by_loss, rounds(0.9, 0.4, 0.5, metric="loss")) == 2


def test_patience_counts_evaluations_with_a_figure_in_the_last_stage(make_plan: Make) -> None:
    plan = make_plan(training={"rounds": 9, "patience": 2})
    name = plan.schedule[-1].name
    stage = {"rounds": 4, "learning_rate": 0.1}
    staged = make_plan(
        training={"rounds": None, "learning_rate": None, "patience": 2},
        stages=[{"name": "a", **stage}, {"name": "b", **stage}],
    )

    def ended(*values: float | None) -> bool:
        found = [one.model_copy(update={"stage": name}) for one in rounds(*values)]
        return out_of_patience(plan, found)

    assert not ended() and not ended(0.9, 0.8)
    assert ended(0.9, 0.8, 0.9) and not ended(0.9, None, 0.8) and not ended(None, None, None)
    assert not out_of_patience(staged, rounds(0.9, 0.8, 0.7, 0.6, stages="aaaa"))
    assert not out_of_patience(staged, rounds(0.9, 0.8, 0.7, 0.6, stages="aaab"))
    assert out_of_patience(staged, rounds(0.9, 0.8, 0.7, 0.6, stages="aabb"))
    assert not out_of_patience(staged, rounds(0.6, 0.5, 0.7, 0.6, stages="aabb"))
    assert not out_of_patience(make_plan(training={"rounds": 9}), rounds(0.9, 0.8, 0.7, 0.6))


def test_the_mean_of_the_last_rounds_is_their_mean(make_plan: Make) -> None:
    plan = make_plan(training={"rounds": 5, "keep": "averaged", "averaged_rounds": 3})
    average = 0.0
    for round_, value in enumerate([5.0, 9.0, 1.0, 2.0, 6.0], start=1):
        decay = average_decay(plan, round_)
        average = decay * average + (1 - decay) * value
    assert average == pytest.approx(3.0)


def run(plan: Plan, sites: list[PreparedSite]) -> tuple[Job, list[Arrays]]:
    """A study, and its model after each round."""
    models: list[Arrays] = []
    arm = Arm(name="federated", kind="federated")
    job = Job(plan, to_arrays(build_model(plan, 0)), arm)
    job.save = lambda now: None if now.complete else models.append(dict(now.arrays))
    identity.become_server()
    pool = Pool(State(SimulatedSites(sites, SEEDED)), 0)
    try:
        StudyRun(job, LocalGrid(pool, len(sites))).run()
    finally:
        pool.close()
    return job, models


def test_a_study_out_of_patience_delivers_and_tests_its_best_round(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    sites = [make_site(f"site-{one}", seed=one) for one in (1, 2)]
    plan = make_plan(
        training={"rounds": None, "learning_rate": None, "keep": "best", "patience": 2},
        # The best round is one of a stage that trains the head; the last one trains the rest, at
        # a rate that spoils it.
        stages=[
            {"name": "head", "rounds": 2, "learning_rate": 1e-3, "train": ["*"]},
            {"name": "rest", "rounds": 12, "learning_rate": 10.0, "train": ["fc.*"]},
        ],
        metrics={"report": ["auc", "loss"], "primary": "loss"},
    )
    job, models = run(plan, sites)
    arm = job.arm
    losses = [one.validation["loss"] for one in arm.rounds]
    best = losses.index(min(one for one in losses if one is not None)) + 1
    assert (arm.best_round, arm.ended_early) == (best, True)
    assert len(arm.rounds) == max(best, 2) + 2 < plan.rounds
    for name, value in models[best - 1].items():
        np.testing.assert_array_equal(job.average[name], value)
    assert any(not np.array_equal(job.average[n], v) for n, v in job.arrays.items())
    own = Trainer(plan, sites[0], SEEDED).evaluate(job.average, make_order(plan, 0, part="test"))
    assert arm.test is not None
    assert arm.test.per_site["site-1"]["loss"] == pytest.approx(
        counts_from_arrays(plan.task, own[0]).figures(["loss"])["loss"]
    )
    told = delivered(arm, "loss")
    assert f"ended after round {len(arm.rounds)}" in told
    assert f"round {best} of {len(arm.rounds)}" in told
    attacked = unmeasured(plan).training
    assert (attacked.keep, attacked.patience) == ("last", None)


def test_private_patients_are_charged_for_the_rounds_that_ran(
    make_plan: Make, make_site: Make
) -> None:
    plan = make_plan(
        training={"rounds": 8, "learning_rate": 10.0, "keep": "best", "patience": 1},
        privacy=PRIVATE,
    )
    job, _ = run(plan, [make_site(f"site-{one}", seed=one) for one in (1, 2)])
    done = len(job.arm.rounds)
    assert done < plan.rounds
    for spent in job.arm.privacy.values():
        assert spent.last_round == done
        assert spent.steps == private_steps_until(plan, spent.sampling_rate, done)
        assert spent.epsilon < (plan.privacy.epsilon or 0.0)
