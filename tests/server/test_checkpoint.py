"""What is kept after a round, and what comes back."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.errors import OutputError
from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_server.checkpoints import Checkpoints
from fedward_server.events import Event, RoundEnded
from fedward_server.job import Job
from fedward_server.results import Arm
from fedward_server.round_loop import StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]


def job_of(plan: Plan, **more: Any) -> Job:
    return Job(plan, to_arrays(build_model(plan, 0)), Arm(name="t", kind="federated"), **more)


def run(job: Job, sites: list[PreparedSite]) -> None:
    identity.become_server()
    simulated = SimulatedSites(sites, Runtime(randomness="seeded"))
    pool = Pool(State(simulated), 0)
    try:
        StudyRun(job, LocalGrid(pool, len(sites))).run()
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("strategy", "training"),
    [
        ({"name": "fedavg", "averaging": 0.9}, {}),
        ({"name": "fedavg"}, {"keep": "averaged", "averaged_rounds": 2}),
        (
            {"name": "fedavgm", "settings": {"server_learning_rate": 1.0, "server_momentum": 0.9}},
            {"keep": "best", "patience": 2, "learning_rate": 0.1},
        ),
        ({"name": "fedadam", "settings": {"eta": 0.01}}, {}),
        ({"name": "fedmedian"}, {}),
    ],
    ids=lambda one: one.get("name") or one.get("keep") or "last",
)
def test_a_study_broken_off_after_each_round_ends_as_one_that_was_not(
    make_plan: Make,
    make_site: Make,
    tmp_path: Path,
    strategy: dict[str, Any],
    training: dict[str, Any],
) -> None:
    sites = [make_site(f"site-{i}", seed=i) for i in (1, 2)]
    plan = make_plan(training={"rounds": 3, **training}, strategy=strategy)
    whole = job_of(plan, seed=5)
    run(whole, sites)

    for _ in range(6):
        kept = Checkpoints(tmp_path / "study", plan_hash(plan))
        job = job_of(plan, seed=5, save=kept.save)
        kept.restore(job)
        if job.complete:
            break

        def stop_after_a_round(event: Event, job: Job = job) -> None:
            if isinstance(event, RoundEnded):
                job.stop.set()

        job.listen = stop_after_a_round
        run(job, sites)
    assert job.complete
    assert [r.round for r in job.arm.rounds] == [1, 2, 3]
    for name, value in whole.average.items():
        np.testing.assert_array_equal(job.average[name], value)
    assert job.arm.test is not None
    assert whole.arm.test is not None
    assert job.arm.test.pooled == whole.arm.test.pooled
    assert len(list((tmp_path / "study").iterdir())) == 2


def test_damage_and_other_plans_are_passed_over(
    make_plan: Make, make_site: Make, tmp_path: Path
) -> None:
    plan = make_plan(training={"rounds": 2})
    kept = Checkpoints(tmp_path, plan_hash(plan))
    job = job_of(plan, save=kept.save)
    run(job, [make_site(f"site-{i}", seed=i) for i in (1, 2)])
    last = sorted(tmp_path.iterdir())[-1]
    (last / "state.safetensors").write_bytes(b"damaged")
    back = job_of(plan)
    assert kept.restore(back)
    assert not back.complete
    assert len(back.arm.rounds) == 2
    with pytest.raises(OutputError, match="must be whole"):
        Checkpoints(tmp_path, "0" * 64).restore(job_of(plan))


def test_a_full_disk_leaves_the_last_one(make_plan: Make, tmp_path: Path) -> None:
    plan = make_plan()
    kept = Checkpoints(tmp_path, plan_hash(plan))
    job = job_of(plan)
    kept.save(job)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(OutputError, match="checkpoint"):
            kept.save(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert kept.restore(job_of(plan))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000000"]


@pytest.mark.integration
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A process saves without end; it is killed; what is there can be read."""
    code = f"""
import numpy as np
from pathlib import Path
from fedward_server.checkpoints import Checkpoints
from fedward_server.job import Job
from fedward_server.results import Arm, Round
from fedward.plan.load import load_plan
plan = None
kept = Checkpoints(Path({str(tmp_path)!r}), "a" * 64)
job = Job.__new__(Job)
job.arm, job.seed, job.complete = Arm(name="t", kind="federated"), 0, False
job.memory, job.memory_stage, job.site_states = {{}}, "", {{}}
job.facts, job.bad_answers = {{}}, {{}}
number = 0
while True:
    number += 1
    job.arrays = {{"w": np.full(300_000, number, np.float32)}}
    job.average, job.best = job.arrays, {{}}
    job.arm.rounds.append(Round(round=number, stage="all", seconds=0.0))
    kept.save(job)
    print(number, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ}, text=True
    )
    assert process.stdout is not None
    told = 0
    for line in process.stdout:
        told = int(line)
        if told >= 12:
            process.kill()
            break
    told = max([told, *(int(line) for line in process.stdout)])
    process.wait()
    job: Any = Job.__new__(Job)
    assert Checkpoints(tmp_path, "a" * 64).restore(job)
    assert len(job.arm.rounds) in (told, told + 1)
    assert (job.arrays["w"] == len(job.arm.rounds)).all()
