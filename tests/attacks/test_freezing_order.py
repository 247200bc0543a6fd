"""A signed plan that freezes a trainer, and the officer's commands meanwhile.

The attacker is a study's coordinator, which signs what it likes. A regular expression
built from the plan's words is one way: words that can be divided in many ways make matching
exponential, and Python's matcher holds the interpreter's lock, so that ``status``, ``deny`` and
``pause`` end with 19 until somebody sends SIGKILL.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from fedward.errors import PlanError
from fedward.models import build_model, to_arrays
from fedward.models.arrays import trainable_names
from fedward.plan.load import canonical, from_canonical, plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import Refusal
from fedward.rule_codes import RuleCode
from fedward_client.egress.gate import Gate
from fedward_client.policy.settings import Limits

Make = Callable[..., Any]

# Each "a a a" can be read as one, two or three words of the plan; "!" ends no reading.
WORDS = ("a", "a a", "a a a")
TEXT = "a " * 90 + "!"
FREEZING = (TEXT + "x" * 40, *WORDS)

# A library that hangs within native code, as far as this machine has one: Python's own matcher. It
# is put into the trainer by the test; an order alone cannot reach it.
HANGS = """
import re
import sys

import fedward.protocol as protocol

read = protocol.from_canonical

def hang(text):
    if "trainer" in sys.argv and '"hang"' in text:
        re.fullmatch(r"(a+)+b", "a" * 99)
    return read(text)

protocol.from_canonical = hang
"""


def staged(*patterns: str) -> dict[str, Any]:
    stage = {"name": "only", "rounds": 6, "learning_rate": 0.1, "train": list(patterns)}
    return {
        "task": {"classes": ["clear", "opacity"]},
        "split": {"given": None},
        "training": {"rounds": None, "learning_rate": None},
        "stages": [stage],
    }


def unchecked(plan: Plan, patterns: tuple[str, ...]) -> Plan:
    """The plan as a coordinator writes it that does not care for its rules."""
    stage = plan.stages[0].model_copy(update={"train": patterns})
    return plan.model_copy(update={"stages": (stage,)})


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "a " * 99 + "a",
        "a" * 200,
        "a, " * 66,
        "a (" * 66,
        "1" * 200,
        "clear " * 33,
        " " * 200,
        "(" * 200,
        ")" * 200,
        "a a a " * 33 + "!",
        "a " * 100_000 + "!",
        "-" * 200,
        "1e+00" * 40,
    ],
)
def test_words_of_a_plan_cost_no_more_than_other_text(make_plan: Make, text: str) -> None:
    """Was exponential: 33 characters took a second, each 4 more twice as long."""
    plan = make_plan(task={"classes": [*WORDS, *(f"a{n}" for n in range(200))]})
    gate = Gate(plan, Limits(), site="north", facts=None, max_upload_mib=1.0)
    values = {"reasons": (text, *plan.task.classes)}
    began = time.process_time()
    for code, words in ((text, {}), (RuleCode.MODEL, {"model": text}), (RuleCode.IMAGES, values)):
        said = Refusal.model_construct(site="x", round=1, kind="data", code=code, values=words)
        assert gate.check_refusal(said).code is RuleCode.DATA
    assert time.process_time() - began < 1.0


def test_patterns_of_a_stage_are_matched_in_linear_time(make_plan: Make) -> None:
    """Translating 500,000 brackets to a regular expression took hours; now no plan holds them."""
    plan = make_plan(**staged("*"))
    for hostile in (("[" * 500_000,), ("*a" * 300_000,), ("fc.*",) * 100_000, FREEZING):
        text, began = canonical(unchecked(plan, hostile)), time.process_time()
        with pytest.raises(PlanError):
            from_canonical(text)
        assert time.process_time() - began < 5.0
    from fedward.models import build_model

    model, began = build_model(plan, 0), time.process_time()
    for allowed in ("*[" * 64, "*e*e*e*e*e*e*e*e*e*e*e*e*e*e*e*x", "[!-" * 42):
        with pytest.raises(Exception, match="pattern"):
            trainable_names(model, ["*", *[allowed] * 63])
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize(
    "text",
    [
        "[" * 900_000,
        '{"a":' * 150_000,
        "9" * 900_000,
        '{"split":{"seed":' + "9" * 4000 + "}}",
        '{"strategy":{"name":"fedavgm","settings":{"server_momentum":' + "9" * 400 + "}}}",
        '{"version":1e999}',
        '{"task":{"classes":[' + '"x",' * 200_000 + '"x"]}}',
        "{" + ",".join(f'"k{n}":1' for n in range(80_000)) + "}",
    ],
)
def test_a_plan_of_any_text_is_refused_soon(text: str) -> None:
    began = time.process_time()
    with pytest.raises(PlanError):
        from_canonical(text)
    assert time.process_time() - began < 5.0


@pytest.mark.integration
def test_a_plan_whose_words_froze_the_trainer_is_refused(
    coordinator: Any, hospital: Any, make_plan: Make, refusal_of: Make, plan: Plan
) -> None:
    """Was: no answer, and ``status`` ended with 19 after 30 s, until SIGKILL."""
    hostile = unchecked(make_plan(**staged("*")), FREEZING)
    before = hospital.daemon.children()
    order = coordinator.signed(hostile, 1, "freezing", to_arrays(build_model(plan, 0)))
    sent = coordinator.send(hospital.node, order)
    assert refusal_of(coordinator.reply(sent))[0] == "schema"
    # This one passes the plan's rules, and comes to the sentence with the plan's word in it.
    word = "*a" * 40 + "[" * 40
    named = coordinator.order(make_plan(**staged(word)), 1, "freezing")
    assert refusal_of(coordinator.ask(hospital.node, named)) == (
        "protocol",
        "every pattern must match a parameter of the model",
    )
    assert hospital.daemon.call("status")["trainer"]["doing"] == "idle"
    assert hospital.daemon.children() == before
    assert "outcome" in coordinator.ask(hospital.node, coordinator.order(plan, 1, "other"))


@pytest.mark.integration
def test_an_order_that_hangs_within_native_code_stops_no_command(
    coordinator: Any,
    make_hospital: Make,
    make_plan: Make,
    refusal_of: Make,
    plan: Plan,
    until: Make,
) -> None:
    """The watchdog ends the trainer, and the study that asks again is refused."""
    site = make_hospital(2, trainer="watchdog_seconds = 3.0")
    site.daemon.before = HANGS
    site.start()
    until(lambda: site.online)
    hang = make_plan(
        study={"name": "hang"}, task={"classes": ["clear", "opacity"]}, split={"given": None}
    )
    frozen = site.daemon.children()["trainer"]
    sent = coordinator.send(site.node, coordinator.order(hang, 1, "hang-1"))
    assert refusal_of(coordinator.reply(sent))[0] == "error"
    until(lambda: site.daemon.children().get("trainer", frozen) != frozen)
    until(lambda: site.trainer.get("connector") == "hidden")
    restarted = site.daemon.children()["trainer"]
    for round_ in (1, 2):  # the same again, and the next round of the same plan
        again = coordinator.ask(site.node, coordinator.order(hang, round_, "hang-1"))
        assert refusal_of(again) == ("policy", RuleCode.STOPS_TRAINER.text)
    assert site.told("watchdog") == [{"what": "train", "study": "hang-1", "plan": plan_hash(hang)}]
    assert "outcome" in coordinator.ask(site.node, coordinator.order(plan, 1, "other"))
    assert site.daemon.call("pause") == {"paused": True}
    assert site.daemon.call("resume") == {"paused": False}
    assert site.daemon.children()["trainer"] == restarted
    assert site.whole
    assert site.daemon.stop() == 0


@pytest.mark.integration
def test_the_officer_is_answered_while_the_trainer_answers_nothing(
    coordinator: Any, hospital: Any, refusal_of: Make, plan: Plan, until: Make
) -> None:
    """A stopped process is as silent as a frozen one, and for as long as the test likes."""
    assert "outcome" in coordinator.ask(hospital.node, coordinator.order(plan, 1, "denied"))
    trainer = hospital.daemon.children()["trainer"]
    os.kill(trainer, signal.SIGSTOP)
    try:
        status = hospital.daemon.call("status")
        assert status["trainer"]["doing"] == "not answering"
        assert "watchdog" in status["trainer"]["warnings"][0]
        assert hospital.daemon.call("deny", "denied")["approval"]["state"] == "denied"
        assert hospital.daemon.call("pause") == {"paused": True}
    finally:
        os.kill(trainer, signal.SIGCONT)
    until(lambda: hospital.trainer.get("connector") == "hidden")
    assert hospital.daemon.call("status")["trainer"]["doing"] == "idle"
    ask = lambda: coordinator.ask(hospital.node, coordinator.order(plan, 2, "denied"))  # noqa: E731
    assert refusal_of(ask()) == ("policy", RuleCode.DENIED.text)
    assert refusal_of(coordinator.ask(hospital.node, coordinator.order(plan, 1, "another"))) == (
        "paused",
        RuleCode.PAUSED.text,
    )
    assert hospital.daemon.call("resume") == {"paused": False}
    assert hospital.whole
