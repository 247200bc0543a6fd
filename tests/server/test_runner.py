"""What a study's runner starts from: the plan's weights, or what it reached already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedward.dp.accounting import calibrate
from fedward.errors import WeightsError
from fedward.models import build_model, to_arrays
from fedward.plan.load import plan_hash
from fedward.protocol import SiteFacts
from fedward_server import events
from fedward_server.checkpoints import Checkpoints
from fedward_server.config import ServerConfig
from fedward_server.job import Job
from fedward_server.registry import Registry
from fedward_server.results import Arm
from fedward_server.runner import Runner

Make = Callable[..., Any]


@pytest.fixture
def runner(
    config: ServerConfig,
    registry: Registry,
    make_plan: Make,
    new_site_key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Runner:
    """Of a study whose weights file is missing, as after a restore from an older backup."""
    registry.sites.add("north", new_site_key)
    plan = make_plan(
        model={"initial_weights": {"file": "w.pt", "sha256": "0" * 64}},
        participation={"sites": 1},
    )
    study = registry.studies.submit(plan, ["north"])

    def session(self: Runner) -> None:
        self.job.complete = True

    monkeypatch.setattr(Runner, "_session", session)
    monkeypatch.setattr(
        "fedward_server.study_persistence.StudyPersistence.deliver", lambda self, job: None
    )
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


def test_a_study_that_waits_tells_why_and_tries_again_when_it_is_resumed(
    config: ServerConfig, registry: Registry, make_plan: Make, new_site_key: str
) -> None:
    registry.sites.add("north", new_site_key)
    study = registry.studies.submit(make_plan(participation={"sites": 1}), ["north"])
    runner = Runner(config, registry, study)
    runner._see_wish()
    assert not runner.job.again.is_set()  # submitted, and not resumed
    runner._note(events.StudyPaused("t", 1, "north (budget): the budget is spent."))
    (listed,) = registry.studies.list()
    assert (listed.state, listed.reason) == ("paused", "north (budget): the budget is spent.")
    runner._see_wish()
    assert not runner.job.again.is_set()
    registry.studies.want(study.id, "run", "operator")
    runner._see_wish()
    assert runner.job.again.is_set()
    assert not runner.stop.is_set()
    registry.studies.want(study.id, "pause", "operator")
    runner._see_wish()
    assert runner.stop.is_set()


def test_a_round_that_a_killed_runner_had_open_is_counted(
    config: ServerConfig, registry: Registry, make_plan: Make, new_site_key: str
) -> None:
    registry.sites.add("north", new_site_key)
    privacy = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
    plan = make_plan(privacy=privacy, participation={"sites": 1})
    study = registry.studies.submit(plan, ["north"])
    facts = SiteFacts(
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
    killed = Runner(config, registry, study)
    killed.job.facts["north"] = facts
    killed._note(events.StudyStarted("t", plan.rounds, ("north",)))  # and orders round 1
    again = Runner(config, registry, study)
    again._charge_what_was_open()
    spent = again.job.arm.privacy["north"]
    assert (spent.last_round, spent.steps) == (1, calibrate(plan, 40).steps // plan.rounds)
