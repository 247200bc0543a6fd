"""Orders that are ended while they are carried out, and officers before a log that is full."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from fedward.errors import AuditError
from fedward.plan.schema import Plan
from fedward.protocol import Refusal
from fedward.rule_codes import RuleCode
from fedward_client.audit.log import audit_folder
from fedward_client.audit.verify import entries
from fedward_client.trainer import trainer_cache
from fedward_client.trainer.admin import Admin

Make = Callable[..., Any]
pytestmark = pytest.mark.integration


def admin_of(hospital: Any) -> Admin:
    return Admin(
        hospital.config, hospital.desk, hospital.approvals, hospital.ledger, hospital.audit
    )


def deny(hospital: Any) -> None:
    admin_of(hospital).do("deny", {"study": "tiny-1"}, "officer")


def at_a_step(hospital: Any, act: Callable[[Any], object]) -> None:
    """Have something happen at the first step or batch of the next order."""
    watch = hospital.trainers._watch

    def look(step: int, steps: int) -> None:
        act(hospital)
        watch(step, steps)

    hospital.trainers._watch = look


def while_preparing(
    hospital: Any, act: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = trainer_cache.prepare_cohort

    def prepared(*given: Any, **named: Any) -> Any:
        act(hospital)
        return prepare(*given, **named)

    monkeypatch.setattr(trainer_cache, "prepare_cohort", prepared)


def answer(hospital: Any, what: str, plan: Plan) -> tuple[str, str]:
    packet = (
        hospital.ask(what, plan, int(what != "describe"), part="validation")
        if (what == "evaluate")
        else hospital.ask(what, plan, int(what != "describe"))
    )
    assert packet.kind == "refusal", packet.record
    assert not packet.arrays
    refusal = Refusal.from_flat(packet.record)
    return refusal.kind, refusal.rule


def events(hospital: Any) -> list[str]:
    return [one.event for one in entries(audit_folder(hospital.config.site.state))]


@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_a_study_that_is_denied_while_it_works_gets_nothing(
    make_hospital: Make, plan: Plan, what: str
) -> None:
    hospital = make_hospital()
    at_a_step(hospital, deny)
    assert answer(hospital, what, plan) == ("policy", RuleCode.DENIED.text)
    assert "sent" not in events(hospital)


@pytest.mark.parametrize("what", ["describe", "train", "evaluate"])
def test_a_study_that_is_denied_while_images_are_prepared_gets_nothing_and_pays_nothing(
    make_hospital: Make, private_plan: Plan, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    hospital = make_hospital("max_epsilon_per_cohort = 100.0\nmax_delta = 0.01")
    while_preparing(hospital, deny, monkeypatch)
    assert answer(hospital, what, private_plan) == ("policy", RuleCode.DENIED.text)
    assert {"sent", "charge"}.isdisjoint(events(hospital))
    assert hospital.ledger.studies() == []


@pytest.mark.parametrize(
    ("act", "rule"),
    [
        (lambda hospital: hospital.desk.close(), RuleCode.STOPPED.text),
        (lambda hospital: hospital.desk.cancel("tiny-1"), RuleCode.GIVEN_UP.text),
    ],
)
def test_an_order_that_is_given_up_says_so_and_may_come_again(
    make_hospital: Make, plan: Plan, act: Callable[[Any], object], rule: str
) -> None:
    hospital = make_hospital()
    at_a_step(hospital, act)
    assert answer(hospital, "train", plan) == ("busy", rule)


def full(*_: Any, **__: Any) -> None:
    raise AuditError(RuleCode.UNWRITTEN.text, value=errno.errorcode[errno.ENOSPC])


def test_before_a_full_log_what_stops_holds_and_what_allows_does_not(
    make_hospital: Make, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = make_hospital(rule='approval = "manual"')
    assert answer(hospital, "train", plan) == ("pending", RuleCode.PENDING.text)
    admin = admin_of(hospital)
    with monkeypatch.context() as patch:
        patch.setattr(hospital.audit, "append", full)
        assert answer(hospital, "train", plan) == ("error", RuleCode.UNWRITTEN.text)
        for command in ("approve", "pause", "deny"):
            with pytest.raises(AuditError):
                admin.do(command, {"study": "tiny-1"}, "officer")
            if command == "approve":
                assert len(hospital.approvals.pending()) == 1
        assert hospital.board.paused
        assert hospital.approvals.paused
        assert [one.state for one in hospital.approvals.all()] == ["denied"]
        with pytest.raises(AuditError):
            admin.do("resume", {}, "officer")
        assert hospital.board.paused
        assert hospital.approvals.paused
    admin.do("resume", {}, "officer")
    assert not hospital.board.paused
    assert not hospital.approvals.paused
    assert answer(hospital, "train", plan) == ("policy", RuleCode.DENIED.text)
