"""Which order a stopped trainer is blamed on, and what a silent trainer's officer may do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedward.errors import ConfigError, PolicyError
from fedward.protocol import Refusal
from fedward.rule_codes import RuleCode
from fedward_client.config import config_from
from fedward_client.policy.approvals import Approvals
from fedward_client.trainer.admin_client import TrainerSilent, answer_for_silent
from fedward_client.trainer.watchdog import OrderKey, OrdersInHand

ONE = {"study": "one", "plan_hash": "1" * 64}
TWO = {"study": "two", "plan_hash": "2" * 64}
HANG = """
import re, sys
from pathlib import Path
from fedward_client.trainer.watchdog import OrdersInHand, watch
in_hand = OrdersInHand(Path(sys.argv[1]))
in_hand.note_last_end()
watch(in_hand.report, 2.0)
with in_hand.order("train", {"study": "one", "plan_hash": "1" * 64}):
    %s
"""


def run(state: Path, act: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", HANG % act, str(state)], capture_output=True, timeout=60, check=False
    )
    return done.returncode


@pytest.mark.parametrize(
    ("act", "blamed"),
    [
        ('re.fullmatch("(a+)+b", "a" * 99)', True),
        ("import ctypes; ctypes.string_at(0)", True),
        ("import os; os.kill(os.getpid(), 9)", False),
        ("raise SystemExit(3)", False),
    ],
)
def test_an_order_is_blamed_for_a_hang_and_a_crash_but_not_for_a_kill(
    tmp_path: Path, act: str, blamed: bool
) -> None:
    assert run(tmp_path, act) != 0
    in_hand = OrdersInHand(tmp_path)
    wanted = [OrderKey("train", "one", "1" * 64)] if blamed else []
    assert in_hand.note_last_end() == wanted
    assert OrdersInHand(tmp_path).note_last_end() == []  # told once
    if blamed:
        with pytest.raises(PolicyError, match="must not stop the trainer"):
            OrdersInHand(tmp_path).order("train", ONE).__enter__()
        in_hand.forgive("one")
    with OrdersInHand(tmp_path).order("train", ONE):
        pass
    assert not list((tmp_path / "in-hand").iterdir())


def test_a_training_order_is_not_blamed_for_one_that_was_read_beside_it(tmp_path: Path) -> None:
    in_hand = OrdersInHand(tmp_path)
    in_hand.note_last_end()
    with in_hand.order("train", ONE) as first, in_hand.order("train", TWO):
        first.write("work")
        in_hand.report.write_text("Timeout")
        blamed = OrdersInHand(tmp_path).note_last_end()
    assert [one.study for one in blamed] == ["two"]


def test_an_order_that_stopped_the_trainer_is_refused_until_it_is_approved_anew(
    make_hospital: Callable[..., Any], plan: Any
) -> None:
    hospital = make_hospital()
    state = hospital.config.site.state
    assert hospital.ask("train", plan).kind == "update"
    with OrdersInHand(state).order("train", hospital.order(plan, 1).record):
        (state / "stopped.txt").write_text("Timeout")
        hospital.close()
        hospital.open()
    refused = hospital.ask("train", plan, 2)
    made = Refusal.from_flat(refused.record)
    assert (made.kind, made.code) == ("policy", RuleCode.STOPS_TRAINER)
    hospital.desk.forgive("tiny-1")
    assert hospital.ask("train", plan, 2).kind == "update"


def test_without_the_trainer_an_officer_forbids_and_does_not_allow(
    make_hospital: Callable[..., Any], plan: Any
) -> None:
    hospital = make_hospital()
    hospital.ask("train", plan)

    def do(command: str, **arguments: Any) -> Any:
        return answer_for_silent(hospital.config, command, arguments, "somebody")

    assert do("status")["trainer"]["doing"] == "not answering"
    for command in ("approve", "resume", "budget"):
        with pytest.raises(TrainerSilent):
            do(command, study="tiny-1", plan="")
    with pytest.raises(ConfigError):
        do("deny", study="unknown", plan="")
    assert do("pause") == {"paused": True}
    assert hospital.ask("train", plan, 2).record["kind"] == "paused"
    Approvals(hospital.config.site.state).pause(paused=False)
    assert do("deny", study="tiny-1", plan="")["approval"]["state"] == "denied"
    assert hospital.ask("train", plan, 2).record["code"] == RuleCode.DENIED.wire


def test_the_limit_is_a_setting(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "version": 1,
        "site": {"name": "north"},
        "trainer": {"watchdog_seconds": 0.1},
        "datasets": {"chest": {"root": "x", "task": "classification", "classes": ["a", "b"]}},
    }
    with pytest.raises(ConfigError, match="watchdog_seconds"):
        config_from(content, tmp_path, datasets_here=False)
