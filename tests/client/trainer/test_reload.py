"""A policy that is edited while the trainer runs; a coordinator that the policy does not name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from fedward.plan.schema import Plan
from fedward.signing import fingerprint, public_bytes
from fedward_client.audit.log import audit_folder
from fedward_client.audit.verify import entries
from fedward_client.commands.daemon import _last_error
from fedward_client.connector.trainer_session import TrainerSession
from fedward_client.link.client import TrainerGone
from fedward_client.trainer.admin import Admin
from fedward_client.trainer.process import UNUSABLE, _follow_policy
from fedward_client.trainer.status import Activity, StatusBoard

Make = Callable[..., Any]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def admin_of() -> Callable[[Any], Admin]:
    return lambda one: Admin(one.config, one.desk, one.approvals, one.ledger, one.audit)


def test_an_edited_policy_holds_for_the_next_order(
    make_hospital: Make, admin_of: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedward_client.trainer.reload._LOOK_SECONDS", 0.02)
    hospital = make_hospital()
    admin, file, stop = admin_of(hospital), hospital.folder / "site.toml", threading.Event()
    users = (hospital.desk._contexts, admin)
    _follow_policy(file, hospital.config, users, hospital.audit, hospital.board, stop)
    time.sleep(0.1)  # it has looked once
    text = file.read_text("utf-8")
    assert hospital.ask("describe", plan, 0).kind == "facts"
    file.write_text(text.replace("minimum_patients = 10", "minimum_patients = 1000"), "utf-8")
    until(lambda: hospital.desk._contexts.policy.minimum_patients == 1000)
    refused = hospital.ask("describe", plan, 0)
    assert refused.record["kind"] == "policy"
    assert "tiny-1: " in hospital.board.get()["last_refusal"]
    assert hospital.board.get()["last_refusal_at"] > time.time() - 60
    # A mistake changes nothing, and says so until it is mended.
    file.write_text(text.replace("minimum_patients = 10", "minimum_pateints = 1"), "utf-8")
    until(lambda: any(one.startswith(UNUSABLE) for one in hospital.board.get()["warnings"]))
    (warning,) = hospital.board.get()["warnings"]
    assert "Did you mean `minimum_patients`?" in warning
    assert hospital.desk._contexts.policy.minimum_patients == 1000
    file.write_text(text, "utf-8")
    until(lambda: hospital.desk._contexts.policy.minimum_patients == 10)
    until(lambda: not hospital.board.get()["warnings"])
    assert hospital.ask("describe", plan, 0).kind == "facts"
    stop.set()
    told = entries(audit_folder(hospital.config.site.state))
    assert len([one for one in told if one.event == "policy"]) == 2


def test_a_wrong_fingerprint_of_the_coordinator_is_named(
    make_hospital: Make, admin_of: Any, plan: Plan
) -> None:
    hospital = make_hospital()
    file = hospital.folder / "site.toml"
    asks = fingerprint(public_bytes(hospital.key))
    file.write_text(file.read_text("utf-8").replace(asks, "0" * 64), "utf-8")
    hospital.close()
    hospital.open()
    for _ in range(3):
        assert hospital.ask("describe", plan, 0).record["kind"] == "policy"
    admin = admin_of(hospital)
    for command in ("status", "pending"):
        answer = admin.do(command, {}, "officer")
        warnings = answer["trainer"]["warnings"] if command == "status" else answer["warnings"]
        (warning,) = warnings
        assert asks in warning and "fedward-server fingerprint" in warning


def test_a_trainer_that_is_not_there_yet_is_no_error(tmp_path: Any) -> None:
    stop = threading.Event()
    stop.set()
    session = TrainerSession(tmp_path / "none.sock", "1", "hidden", tmp_path, stop)
    with pytest.raises(TrainerGone):
        session.caller()
    assert session.state.state == "waiting for the trainer" and session.state.last_error == ""
    session.tell("down", TrainerGone("it does not come", fix="Start it"))
    assert session.state.last_error and session.state.last_error_at > time.time() - 60
    down = session.state.model_dump()
    session.tell("online")
    over = session.state.model_dump()
    assert "over since" not in _last_error(asdict(Activity("north")), down)
    assert _last_error({}, over).startswith("over since 2")
    # What is still wrong is told, whatever came after it.
    board = StatusBoard("north")
    board.set(last_error="no space is left")
    assert _last_error(board.get(), over).startswith("no space is left (2")
    board.carried_out()
    assert _last_error(board.get(), down).startswith("it does not come")
    assert "over since" in _last_error(board.get(), over)
    session.tell("down", TrainerGone("it does not come", fix="Start it"))
    assert session.state.recovered_at == 0.0


def test_a_trainer_that_is_warm_follows_an_edited_policy(make_hospital: Make, plan: Plan) -> None:
    hospital = make_hospital('counts = "minimum-cells"')
    case = hospital.desk._contexts.of("tiny-1", plan)
    assert hospital.trainers.get(case).may_choose
    # From now on only noisy counts leave, and no ε covers a choice by exact ones.
    private = replace(case, limits=case.limits.model_copy(update={"counts": "private"}))
    assert not hospital.trainers.get(private).may_choose
