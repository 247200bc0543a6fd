"""What a study's runner starts from: the plan's weights, or what it reached already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedward.errors import WeightsError
from fedward.models import build_model, to_arrays
from fedward.plan.load import plan_hash
from server.checkpoint import Checkpoints
from server.config import ServerConfig
from server.job import Job
from server.registry import Registry
from server.results import Arm
from server.runner import Runner

Make = Callable[..., Any]


@pytest.fixture
def runner(
    config: ServerConfig, registry: Registry, make_plan: Make, new_site_key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Runner:  # fmt: skip
    """Of a study whose weights file is missing, as after a restore from an older backup."""
    registry.sites.add("north", new_site_key)
    plan = make_plan(
        model={"initial_weights": {"file": "w.pt", "sha256": "0" * 64}},
        participation={"sites": 1},
    )  # fmt: skip
    study = registry.studies.submit(plan, ["north"])

    def session(self: Runner) -> None:
        self.job.complete = True

    monkeypatch.setattr(Runner, "_session", session)
    monkeypatch.setattr("server.keeper.Keeper.deliver", lambda self, job: None)
    return Runner(config, registry, study)


def test_a_study_with_a_checkpoint_needs_its_first_weights_no_more(runner: Runner) -> None:
    reached = {name: value + 1 for name, value in to_arrays(build_model(runner.plan, 0)).items()}
    job = Job(runner.plan, reached, Arm(name="t", kind="federated"))
    Checkpoints(runner.folder / "rounds", plan_hash(runner.plan)).save(job)
    runner.run()
    for name, value in reached.items():
        np.testing.assert_array_equal(runner.job.arrays[name], value)


def test_without_one_it_does(runner: Runner) -> None:
    with pytest.raises(WeightsError):
        runner.run()
