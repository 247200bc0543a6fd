"""What the registry tells is what the checkpoints hold, wherever a runner was killed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.models import build_model, load_model, to_arrays
from fedward.plan.schema import Plan
from fedward.signing import verify_model
from fedward_server.artifacts.card import model_card
from fedward_server.checkpoints import Checkpoints
from fedward_server.job import Job
from fedward_server.registry import Registry
from fedward_server.registry.records import Study
from fedward_server.results import Arm, Round, SiteRound, StudyResults
from fedward_server.study_persistence import StudyPersistence

Make = Callable[..., Any]


class Killed(Exception):
    """In place of SIGKILL: nothing after it happens."""


@pytest.fixture
def plan(make_plan: Make) -> Plan:
    plan: Plan = make_plan(training={"rounds": 3}, participation={"sites": 1})
    return plan


@pytest.fixture
def study(registry: Registry, plan: Plan, new_site_key: str) -> Study:
    registry.sites.add("north", new_site_key)
    return registry.studies.submit(plan, ["north"])


def job_of(plan: Plan, rounds: int) -> Job:
    job = Job(plan, to_arrays(build_model(plan, 0)), Arm(name="federated", kind="federated"))
    job.arm.rounds += [Round(round=n, stage="all", seconds=float(n)) for n in range(1, rounds + 1)]
    return job


def keeper_of(folder: Path, registry: Registry, study: Study, plan: Plan) -> StudyPersistence:
    results = StudyResults(
        study="tiny",
        plan={},
        plan_sha256=study.plan_sha256,
        seed=0,
        engine="superlink",
        device="cpu",
        primary="auc",
        parameters=1,
    )
    return StudyPersistence(folder, registry, study, plan, results, threading.Event())


def test_a_round_that_was_kept_and_not_told_is_told_after_the_restart(
    registry: Registry, study: Study, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper_of(tmp_path, registry, study, plan).keep(job_of(plan, 1))

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(registry.studies, "save_round", killed)
        keeper_of(tmp_path, registry, study, plan).keep(job_of(plan, 2))
    assert [one.round for one in registry.studies.rounds(study.id)] == [1]

    for _ in range(2):  # a second restart tells nothing twice
        job = job_of(plan, 0)
        assert keeper_of(tmp_path, registry, study, plan).restore(job)
        assert len(job.arm.rounds) == 2
        assert [one.seconds for one in registry.studies.rounds(study.id)] == [1.0, 2.0]
        told = registry.studies.events_after(study.id)
        assert [one.payload["round"] for one in told if one.kind == "round"] == [1, 2]
    assert registry.studies.get(study.id).round == 2


def test_without_a_checkpoint_nothing_is_told(
    registry: Registry, study: Study, plan: Plan, tmp_path: Path
) -> None:
    assert not keeper_of(tmp_path, registry, study, plan).restore(job_of(plan, 0))
    assert not Checkpoints(tmp_path / "rounds", study.plan_sha256).restore(job_of(plan, 0))
    assert list(registry.studies.rounds(study.id)) == []


def finished(plan: Plan) -> Job:
    job = job_of(plan, 3)
    for one in job.arm.rounds:
        one.sites["north"] = SiteRound(patients=1, images=1, steps=1, seconds=1.0)
    job.complete, job.arm.unmeasured = True, "no site has test patients (split.test is 0)"
    return job


def test_a_model_that_could_not_be_measured_is_delivered_with_the_reason(
    registry: Registry, study: Study, plan: Plan, tmp_path: Path
) -> None:
    job = finished(plan)
    keeper = keeper_of(tmp_path, registry, study, plan)
    keeper.tell(job)
    keeper.deliver(job)
    told = "Not measured on test patients, because no site has test patients (split.test is 0)."
    found = registry.studies.get(study.id)
    assert (found.state, found.reason) == ("finished", told)
    arrays, about = load_model(tmp_path / "model.safetensors")
    assert about["study"] == study.id and verify_model(about, arrays)
    for name, value in job.average.items():
        np.testing.assert_array_equal(arrays[name], value)
    results = registry.studies.results(study.id)
    assert results is not None and results.complete
    assert told in model_card(study.id, plan, results)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert told in page
    assert "INTERRUPTED" not in page


def test_a_report_that_cannot_be_made_costs_no_model(
    registry: Registry, study: Study, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise TypeError("/data/ward-7")

    monkeypatch.setattr("fedward_server.study_persistence.write_report", fail)
    job = finished(plan)
    keeper = keeper_of(tmp_path, registry, study, plan)
    keeper.tell(job)
    keeper.deliver(job)
    found = registry.studies.get(study.id)
    assert found.state == "finished"
    assert found.reason.endswith(" The report could not be written (TypeError).")
    assert (tmp_path / "model.safetensors").exists()


def test_a_study_says_in_how_many_rounds_sites_were_missing(
    registry: Registry, make_plan: Make, new_site_key: str, tmp_path: Path
) -> None:
    plan = make_plan(training={"rounds": 3}, participation={"sites": 2})
    study = registry.studies.submit(plan, ["north", "south"])
    job = finished(plan)
    job.arm.rounds[0].sites["south"] = job.arm.rounds[0].sites["north"]
    job.arm.unmeasured = ""
    keeper = keeper_of(tmp_path, registry, study, plan)
    keeper.tell(job)
    keeper.deliver(job)
    assert registry.studies.get(study.id).reason == (
        "In 2 of 3 rounds fewer sites took part than the 2 of participation.sites."
    )
