"""A hospital before a coordinator that is hostile, repeats itself, or asks for much at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, RecordDict

from fedward.models import build_model, to_arrays
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode
from fedward.tensors import pack

pytestmark = pytest.mark.integration
Make = Callable[..., Any]


def hostile(coordinator: Any, plan: Plan, other: Plan) -> dict[str, RecordDict]:
    """Orders that must not be carried out, by what is wrong with them."""
    right = coordinator.order(plan, 1, "hostile")
    arrays = pack(to_arrays(build_model(plan, 0)))
    stranger = copy(coordinator)
    stranger.key = Ed25519PrivateKey.generate()
    name, value = next(iter(to_arrays(build_model(plan, 0)).items()))

    def with_arrays(packed: np.ndarray) -> RecordDict:
        content = {"packed": Array(packed)}
        return RecordDict(
            {"config": right.config_records["config"], "arrays": ArrayRecord(content)}
        )

    return {
        "garbage": with_arrays(np.frombuffer(os.urandom(500), np.uint8)),
        "truncated": with_arrays(arrays[:-7].copy()),
        "oversized": with_arrays(np.zeros(5 << 20, np.uint8)),
        "another model": with_arrays(pack({name: value})),
        "not finite": with_arrays(
            pack({n: np.full_like(v, np.nan) for n, v in to_arrays(build_model(plan, 0)).items()})
        ),
        "a plan with another hash": coordinator.order(
            plan, 1, "hostile", plan_hash=plan_hash(other)
        ),
        "a plan under another signature": coordinator.order(
            plan, 1, "hostile", plan=canonical(other), plan_hash=plan_hash(other)
        ),
        "a study of a stranger": stranger.order(plan, 1, "hostile"),
        "a round too many": coordinator.order(plan, 7, "hostile"),
        "an unknown key": coordinator.order(plan, 1, "hostile", code="import os"),
    }


def test_a_hostile_coordinator_gets_refusals_and_the_site_goes_on(
    coordinator: Any, hospital: Any, refusal_of: Make, plan: Plan, make_plan: Make
) -> None:
    other = make_plan(task={"classes": ["clear", "opacity"]}, training={"rounds": 9})
    before, pids = len(hospital.told("refused")), hospital.daemon.children()
    orders = hostile(coordinator, plan, other)
    asked = {name: coordinator.send(hospital.node, content) for name, content in orders.items()}
    wanted = {"a study of a stranger": "policy"}
    for name, identifier in asked.items():
        kind, rule = refusal_of(coordinator.reply(identifier))
        assert kind == wanted.get(name, "protocol"), (name, kind, rule)
    assert len(hospital.told("refused")) == before + len(orders)
    assert "hostile" not in {
        row["study"] for row in hospital.daemon.call("budget")["studies"] if row["released"]
    }
    answer = coordinator.ask(hospital.node, coordinator.order(plan, 1, "hostile"))
    assert answer.config_records["outcome"]["round"] == 1
    # Warm: all of that, and the rounds before, went through the same two processes.
    assert hospital.daemon.children() == pids
    maps = Path(f"/proc/{pids['connector']}/maps").read_text()
    assert "libtorch" not in maps
    assert hospital.whole


def test_an_old_round_or_another_plan_for_a_private_study_buys_nothing(
    coordinator: Any, hospital: Any, refusal_of: Make, bytes_of: Make, make_private: Make
) -> None:
    plan = make_private()

    def ask(round_: int, plan: Plan = plan) -> Any:
        return coordinator.ask(hospital.node, coordinator.order(plan, round_, "replay"))

    for round_ in (2, 3, 4):
        assert "outcome" in ask(round_).config_records
    spent = hospital.row("replay")
    assert refusal_of(ask(1))[0] == "budget"  # never charged, and its turn is over
    assert refusal_of(ask(2))[0] == "budget"  # released, and kept no longer
    assert bytes_of(ask(4)) == bytes_of(ask(4))
    assert refusal_of(ask(5, plan=make_private(3)))[0] == "budget"
    assert hospital.row("replay") == spent


def test_two_studies_at_once_are_served_in_turn(
    coordinator: Any, hospital: Any, plan: Plan, make_private: Make, until: Make
) -> None:
    node = hospital.node
    warm = [coordinator.send(node, coordinator.order(plan, 1, s)) for s in ("twin-a", "twin-b")]
    for one in warm:
        coordinator.reply(one)
    busy = coordinator.send(node, coordinator.order(make_private(200), 1, "busy"))
    until(lambda: hospital.step("busy") > 0)
    asked = [
        coordinator.send(node, coordinator.order(plan, round_, study))
        for study in ("twin-a", "twin-b")
        for round_ in (2, 3, 4)
    ]
    until(lambda: hospital.trainer.get("waiting", 0) >= 3)
    for one in [busy, *asked]:
        assert "outcome" in coordinator.reply(one).config_records
    served = [one["study"] for one in hospital.told("sent")][-7:]
    assert served[0] == "busy"
    first_half = served[1:5]
    assert {first_half.count("twin-a"), first_half.count("twin-b")} <= {1, 2, 3}
    assert sorted(served[1:]) == ["twin-a"] * 3 + ["twin-b"] * 3


def test_the_officer_rules_over_the_running_daemon(
    coordinator: Any, hospital: Any, refusal_of: Make, plan: Plan, make_private: Make, until: Make
) -> None:
    assert hospital.daemon.call("pause") == {"paused": True}
    assert refusal_of(coordinator.ask(hospital.node, coordinator.order(plan, 1, "officer"))) == (
        "paused",
        "the site must not be paused",
    )
    hospital.daemon.kill("trainer")
    until(lambda: hospital.trainer.get("connector") == "hidden")
    assert hospital.daemon.call("status")["trainer"]["paused"] is True  # a restart does not undo it
    assert hospital.daemon.call("resume") == {"paused": False}
    running = coordinator.send(
        hospital.node, coordinator.order(make_private(1_000), 1, "officer-2")
    )
    until(lambda: hospital.step("officer-2") > 0)
    status = hospital.daemon.call("status")
    assert status["link"]["state"] == "online"
    assert (status["trainer"]["study"], status["trainer"]["round"]) == ("officer-2", 1)
    assert 0 < status["trainer"]["step"] < status["trainer"]["steps"]
    assert status["budget"][0]["left"] > 0
    found = hospital.daemon.call("audit", "verify")
    assert (found["whole"], found["daemon"]) == (True, "agrees")
    assert hospital.daemon.call("pending")["pending"] == []
    # Within the policy it needed no approval; a denial ends it all the same, at its next step.
    assert hospital.daemon.call("deny", "officer-2")["approval"]["state"] == "denied"
    assert refusal_of(coordinator.reply(running)) == ("policy", RuleCode.DENIED.text)
    again = coordinator.ask(hospital.node, coordinator.order(make_private(1_000), 2, "officer-2"))
    assert refusal_of(again) == (
        "policy",
        "the study must be approved at the site; it was denied",
    )
    assert hospital.daemon.call("approve", "officer-2")["approval"]["state"] == "approved"
    row = hospital.row("officer-2")
    assert (row["charged"], row["lost"], row["released"]) == (1, 1, 0)
