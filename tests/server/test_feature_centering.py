"""The first round of a centring plan: one mean for all sites, which then stays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedward.dp.accounting import calibrate, epsilon_spent
from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan import Plan
from fedward.plan.schema import CENTERING, FEATURE_MEAN
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.events import RoundEnded
from fedward_server.results import Arm
from fedward_server.round_loop import Job, StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites
from fedward_strategies.robust import capped_weights

Make = Callable[..., Any]
SEEDED = Runtime(randomness="seeded")
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
STRATEGIES = [
    ("fedavg", {}),
    ("fedavgm", {"server_momentum": 0.9, "server_learning_rate": 0.5}),
    ("fedadam", {"eta": 0.3}),
]


@pytest.fixture
def sites(make_site: Make) -> list[PreparedSite]:
    return [make_site(f"site-{i}", patients=20 + 10 * i, seed=i) for i in range(1, 4)]


def plan_of(make_plan: Make, strategy: str = "fedavg", settings: Any = None, **more: Any) -> Plan:
    made: Plan = make_plan(
        model={"feature_centering": True},
        training={"rounds": None, "learning_rate": None},
        stages=[{"name": "head", "rounds": 3, "learning_rate": 0.5, "train": ["fc.*"]}],
        strategy={"name": strategy, "settings": settings or {}, "averaging": 0.9},
        participation={"sites": 3},
        **more,
    )
    return made


def run(plan: Plan, sites: list[PreparedSite], job: Job | None = None, **more: Any) -> Job:
    identity.become_server()
    start = to_arrays(build_model(plan, 0))
    job = job or Job(plan, start, Arm(name="test", kind="federated"), **more)
    pool = Pool(State(SimulatedSites(sites, SEEDED)), 0)
    try:
        StudyRun(job, LocalGrid(pool, len(sites))).run()
    finally:
        pool.close()
    return job


@pytest.mark.parametrize(("strategy", "settings"), STRATEGIES)
def test_the_mean_is_the_weighted_mean_of_the_sites_whatever_the_strategy(
    make_plan: Make,
    make_order: Make,
    sites: list[PreparedSite],
    strategy: str,
    settings: dict[str, float],
) -> None:
    plan = plan_of(make_plan, strategy, settings, privacy=PRIVATE)
    job = run(plan, sites)
    start = to_arrays(build_model(plan, 0))
    answers = [Trainer(plan, site, SEEDED).train(start, make_order(plan, 1)) for site in sites]
    weights = capped_weights({out.site: out.images for _, out in answers}, 0.8)
    total = sum(weights.values())
    expected = sum(
        weights[out.site] / total * arrays[FEATURE_MEAN].astype(np.float64)
        for arrays, out in answers
    )
    for model in (job.arrays, job.average):
        np.testing.assert_allclose(model[FEATURE_MEAN], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(job.arrays["fc.weight"] - start["fc.weight"]).max() > 0


def test_the_whole_study_stays_within_its_epsilon(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    plan = plan_of(make_plan, privacy={**PRIVATE, "centering_steps": 5})
    job = run(plan, sites)
    assert [one.stage for one in job.arm.rounds] == [CENTERING, "head", "head", "head"]
    for site in sites:
        whole, spent = calibrate(plan, site.patients_in("train")), job.arm.privacy[site.name]
        assert spent.steps == whole.steps
        assert spent.epsilon <= 8.0
        rate, noise = whole.sampling_rate, whole.noise_multiplier
        assert epsilon_spent(noise, rate, whole.steps - 5, 1e-3) < spent.epsilon


def test_a_study_that_was_broken_off_keeps_its_mean(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    plan = plan_of(make_plan, "fedavgm", {"server_momentum": 0.9}, privacy=PRIVATE)
    whole = run(plan, sites)
    stop, made = threading.Event(), []

    def listen(event: Any) -> None:
        if isinstance(event, RoundEnded):
            made.append(event.result.round)
            if len(made) == 1:
                stop.set()

    broken = run(plan, sites, stop=stop, listen=listen)
    assert made == [1] and not broken.complete
    mean = broken.arrays[FEATURE_MEAN].copy()
    stop.clear()
    resumed = run(plan, sites, broken)
    assert made == [1, 2, 3, 4]
    np.testing.assert_array_equal(resumed.arrays[FEATURE_MEAN], mean)
    for name, value in whole.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], value, err_msg=name)
