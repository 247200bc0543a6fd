"""The same study gives the same model, bit for bit, however its sites are run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp import ServerApp

from fedward.errors import DeviceError
from fedward.models import build_model, to_arrays
from fedward.plan import Plan
from fedward.startup import prepare
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_server.app import server_app
from fedward_server.results import Arm
from fedward_server.round_loop import Job
from fedward_simulation.local import State, run_local
from fedward_simulation.pool import Pool
from fedward_simulation.ray_engine import load_site, run_ray, start_ray, store_sites
from fedward_simulation.sites import SimulatedSites

pytestmark = pytest.mark.integration
SEEDED = Runtime(randomness="seeded")
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
FRUGAL = {"method": "int4", "rounding": "stochastic"}
Make = Callable[..., Any]


@pytest.fixture
def sites(make_site: Make) -> list[PreparedSite]:
    return [make_site(f"site-{i}", patients=20 + 10 * i, seed=i) for i in range(1, 4)]


def job_of(plan: Plan) -> Job:
    arrays = to_arrays(build_model(plan, 0))
    return Job(plan, arrays, Arm(name="test", kind="federated"), seed=5)


def local(plan: Plan, sites: list[PreparedSite], workers: int) -> Job:
    job, pool = job_of(plan), Pool(State(SimulatedSites(sites, SEEDED)), workers)
    try:
        run_local(server_app(job), pool, len(sites))
    finally:
        pool.close()
    assert job.error is None
    assert job.complete
    return job


def assert_same(one: Job, other: Job) -> None:
    for name, value in one.arrays.items():
        assert np.array_equal(value, other.arrays[name]), name
    assert one.arm.test == other.arm.test
    assert one.arm.privacy.keys() == other.arm.privacy.keys()
    for site, spent in one.arm.privacy.items():
        again = other.arm.privacy[site]
        # The accountant's last digits depend on the process; the noise must not.
        assert spent.noise_multiplier == again.noise_multiplier
        assert spent.epsilon == pytest.approx(again.epsilon, rel=1e-9)
        assert (spent.steps, spent.sampling_rate) == (again.steps, again.sampling_rate)
    for left, right in zip(one.arm.rounds, other.arm.rounds, strict=True):
        assert left.validation == right.validation
        assert left.train_loss == right.train_loss
        assert list(left.sites) == list(right.sites)


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, PRIVATE], ids=["plain", "private"])
def test_workers_do_not_change_the_model(
    make_plan: Make, sites: list[PreparedSite], privacy: dict[str, Any]
) -> None:
    plan = make_plan(privacy=privacy, participation={"sites": 3})
    here, *others = [local(plan, sites, workers) for workers in (0, 1, 2)]
    for other in others:
        assert_same(here, other)
    assert bool(here.arm.privacy) == plan.privacy.on
    assert all(site.epsilon <= 8.0 for site in here.arm.privacy.values())


def test_a_stored_site_comes_back_as_it_was(make_site: Make, tmp_path: Path) -> None:
    site: PreparedSite = make_site()
    store_sites([site], tmp_path)
    again = load_site(tmp_path / "site-0", site.name)
    for field in ("images", "targets", "patients", "spacing"):
        np.testing.assert_array_equal(getattr(again, field), getattr(site, field))
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(again.split[part], site.split[part])
    assert (again.name, again.left_out, again.synthetic) == (site.name, {}, False)


@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_models_and_survives_a_site_that_raises(
    make_plan: Make, sites: list[PreparedSite], tmp_path: Path
) -> None:
    # Ray's workers import torch within the first round: minutes on a machine that is busy.
    taking_part = {"sites": 3, "deadline": 3000.0}
    plans = [
        make_plan(participation=taking_part),
        make_plan(privacy=PRIVATE, participation=taking_part, compression=FRUGAL),
    ]
    # Ray is slow to start: one site that cannot train goes along with both plans.
    empty = {**sites[2].split, "train": np.zeros(0, np.int64)}
    everyone = [*sites, replace(sites[2], name="site-4", split=empty)]
    jobs = [job_of(plan) for plan in plans]
    run_ray(server_app(*jobs), everyone, SEEDED, tmp_path, threading.Event())
    for job, plan in zip(jobs, plans, strict=True):
        assert job.error is None
        assert job.complete
        assert_same(local(plan, everyone, 0), job)
        for round_ in job.arm.rounds:
            # A hospital that cannot account for a private study refuses it before its rounds.
            asked = [] if plan.privacy.on else ["site-4"]
            assert [failure.site for failure in round_.failures] == asked
            assert all("raining" in failure.reason for failure in round_.failures)
            assert list(round_.sites) == ["site-1", "site-2", "site-3"]


def test_a_ray_that_is_slow_is_started_again_and_one_that_never_starts_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries, slow = list[dict[str, Any]](), [True, False]

    def init(**given: Any) -> None:
        tries.append(given)
        if slow[len(tries) - 1]:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    start_ray()
    assert len(tries) == 2
    hooks = {one["runtime_env"]["worker_process_setup_hook"] for one in tries}
    assert hooks == {f"{prepare.__module__}.{prepare.__name__}"}  # as each program does
    tries.clear()
    slow[:] = [True, True]
    with pytest.raises(DeviceError, match="Ray must start on this machine"):
        start_ray()


@pytest.mark.parametrize(("asked", "sends"), [(None, "0"), ("0", "0"), ("1", "1")])
def test_a_script_on_ray_sends_flower_no_telemetry_unless_it_asks(
    sites: list[PreparedSite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    sends: str,
) -> None:
    """Flower read the environment when the script imported it."""
    from flwr.supercore import telemetry

    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "")  # restored afterwards
    if asked is None:
        monkeypatch.delenv("FLWR_TELEMETRY_ENABLED")
    else:
        monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", asked)
    monkeypatch.setattr("fedward_simulation.ray_engine.start_ray", lambda: None)
    seen: list[str] = []
    monkeypatch.setattr(
        "flwr.simulation.run_simulation",
        lambda **named: seen.append(telemetry.FLWR_TELEMETRY_ENABLED),
    )
    run_ray(ServerApp(), sites, Runtime(), tmp_path, threading.Event())
    assert seen == [sends]
    assert os.environ["RAY_worker_niceness"] == "0"  # noqa: SIM112
