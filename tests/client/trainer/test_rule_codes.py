"""Every rule code leaves a real trainer over its socket, and is read at the aggregator."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from rule_values import sample

from fedward.errors import DataError, FedwardError, PolicyError
from fedward.flower import identity
from fedward.plan.load import plan_from
from fedward.plan.schema import Plan
from fedward.protocol import RoundOrder
from fedward.rule_codes import GENERAL, RuleCode, render
from fedward.signing import sign_order
from fedward_client.link.client import TrainerClient
from fedward_client.link.messages import TrainerMessage
from fedward_client.link.service import serve
from fedward_client.messages import to_reply
from fedward_server.reply_validation import InvalidReply, read_update

Make = Callable[..., Any]
ROOT = Path(__file__).parents[3]
# What may be under way at a hospital while it answers an order.
TRAINER = (
    "client/fedward_client/app.py",
    "client/fedward_client/cohort/open.py",
    "client/fedward_client/cohort/patient_key.py",
    "client/fedward_client/cohort/training.py",
    "client/fedward_client/data/cache.py",
    "client/fedward_client/data/prepare.py",
    "client/fedward_client/data/split.py",
    "client/fedward_client/egress",
    "client/fedward_client/ledger",
    "client/fedward_client/link/messages.py",
    "client/fedward_client/policy/decide.py",
    "client/fedward_client/trainer/executor.py",
    "client/fedward_client/trainer/service.py",
    "client/fedward_client/trainer/trainer_cache.py",
    "client/fedward_client/trainer/watchdog.py",
    "client/fedward_client/training/trainer.py",
    "fedward/dp",
    "fedward/tensors.py",
    "fedward/tasks",
    "fedward/models/arrays.py",
    "fedward/networks",
    "fedward/strategies",
    "client/fedward_client/site_state.py",
    "fedward/protocol.py",
    "fedward/signing.py",
)
# Rules of commands and of a trainer that does not start: no order meets them.
ELSEWHERE = {
    "a delivered model must be signed by its coordinator",
    'a cohort is named by "latest" or the start of its hash',
    "a hash must mean one cohort",
    "the device must be auto, cpu, cuda or cuda:INDEX",
    "the privacy ledger goes with the secret that it was begun with: with another one its patients "
    "would look new",
    "the privacy ledger must not be older than what was charged",
    "one trainer at a time uses the privacy ledger",
    "the model file must be writable",
    "two networks must not have one name",
}
ERRORS = re.compile(r"^(?!Value)[A-Z]\w*(Error|Busy)$")


def read(packet: TrainerMessage, order: TrainerMessage) -> InvalidReply:
    """An answer of the trainer's socket, as the aggregator reads it."""
    found = read_update(Message(to_reply(packet, order), 1, "train"), "north", 1, {})
    assert isinstance(found, InvalidReply)
    return found


@pytest.fixture
def served(make_hospital: Make) -> Iterator[tuple[Any, TrainerClient]]:
    """A hospital's trainer on its socket, and a connector there."""
    identity.become_server()
    hospital = make_hospital()
    path = hospital.folder / "run" / "t.sock"
    end = serve(hospital.desk, path, most_bytes=64 << 20)
    client = TrainerClient(path, "1", "hidden")
    yield hospital, client
    client.close()
    end(1.0)


@pytest.mark.integration
def test_every_code_arrives_from_a_trainer_at_the_aggregator(
    served: tuple[Any, TrainerClient], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital, client = served
    order = hospital.order(plan, 1)
    for code in RuleCode:
        error = DataError(
            f"{code.name} of DOE^JANE", value="/data/ward-7", code=code, values=sample(code)
        )

        def fail(*given: Any, error: FedwardError = error) -> None:
            raise error

        monkeypatch.setattr(hospital.work, "do", fail)
        found = read(client.ask("train", order), order)
        assert (found.kind, found.reason) == ("data", f"{render(code, sample(code))}.")
        assert "{" not in found.reason and code.rule(sample(code)) in found.reason
    texts = [render(code, sample(code)) for code in RuleCode]
    assert len(set(texts)) == len(texts)


def other(plan: Plan, **sections: Any) -> Plan:
    values = plan.model_dump(mode="python")
    return plan_from({**values, **{k: {**values[k], **v} for k, v in sections.items()}})


def changed(hospital: Any, study: Plan, **fields: Any) -> TrainerMessage:
    """A signed order with fields that its signer chose."""
    order = RoundOrder.from_flat(hospital.order(study, 1, task="describe").record)
    signed = sign_order(hospital.key, order.model_copy(update={"task": "train", **fields}))
    return TrainerMessage("order", dict(signed.to_flat()))


def of_text(hospital: Any, plan: Plan, text: str) -> TrainerMessage:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return changed(hospital, plan, plan=text, plan_hash=digest)


@pytest.mark.integration
def test_rules_that_a_trainer_breaks_arrive_by_name(
    served: tuple[Any, TrainerClient], plan: Plan, private_plan: Plan
) -> None:
    """Was: "the study must stay within the site's privacy budget", for another plan."""
    hospital, client = served
    text = hospital.order(plan, 1).record["plan"]
    unsigned = hospital.order(plan, 1)
    cases: list[tuple[TrainerMessage, str, RuleCode, dict[str, Any]]] = [
        (
            hospital.order(other(plan, training={"learning_rate": 0.5}), 1),
            "budget",
            RuleCode.STUDY_PLAN,
            {},
        ),
        (
            hospital.order(private_plan, 1, "tiny-2"),
            "budget",
            RuleCode.ROUND_IN_TURN,
            {"round": 1, "last": 2},
        ),
        (hospital.order(plan, 9), "protocol", RuleCode.ROUNDS, {"rounds": 2, "round": 9}),
        (
            hospital.order(other(plan, participation={"minimum_patients": 30}), 1, "tiny-3"),
            "data",
            RuleCode.PLAN_PATIENTS,
            {"least": 30},
        ),
        (
            hospital.order(other(plan, task={"classes": ["yes", "no"]}), 1, "tiny-4"),
            "data",
            RuleCode.COHORT_CLASSES,
            {},
        ),
        (
            of_text(hospital, plan, text.replace('"cnn"', '"cnm"')),
            "schema",
            RuleCode.PLAN_KEY,
            {"key": "model.name"},
        ),
        (of_text(hospital, plan, "[]"), "protocol", RuleCode.PLAN_OBJECT, {}),
        (of_text(hospital, plan, f"{text} "), "protocol", RuleCode.PLAN_JSON, {}),
        (changed(hospital, plan), "protocol", RuleCode.ARRAYS_COVER, {"missing": 14}),
        (
            TrainerMessage("order", {**unsigned.record, "plan_hash": "f" * 64}),
            "protocol",
            RuleCode.RECORD,
            {"record": "RoundOrder", "field": "record"},
        ),
        (
            TrainerMessage("order", {**unsigned.record, "seed": "0"}),
            "protocol",
            RuleCode.RECORD,
            {"record": "RoundOrder", "field": "seed"},
        ),
        (
            TrainerMessage("order", {**unsigned.record, "seed": 5}),
            "protocol",
            RuleCode.SIGNED,
            {},
        ),
        (
            TrainerMessage("order", unsigned.record),
            "protocol",
            RuleCode.SIGNED_MODEL,
            {},
        ),
        (TrainerMessage("facts", {}), "protocol", RuleCode.ORDER, {}),
    ]
    for first in (hospital.order(plan, 1), hospital.order(private_plan, 2, "tiny-2")):
        assert client.ask("train", first).kind == "update"
    for order, kind, code, values in cases:
        found = read(client.ask("train", order), order)
        assert (found.kind, found.reason) == (kind, f"{render(code, values)}."), code


def test_each_code_is_raised_with_the_values_that_it_declares() -> None:
    """A code that nothing raises is dead; a raise with other values would be another error."""
    used: set[str] = {code.name for code in GENERAL.values()}
    for folder in ("client", "fedward", "simulation", "strategies"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "rule_codes.py" and path.parent.name == "fedward":
                used.add("IMAGE")
                continue
            for call in _calls(path):
                for code in _codes(call):
                    given = _values(call)
                    assert given is None or given == {*code.kinds}, (path, call.lineno, code)
            used |= set(re.findall(r"RuleCode\.([A-Z_0-9]+)", path.read_text("utf-8")))
    assert {code.name for code in RuleCode} == used & {code.name for code in RuleCode}
    assert used <= {code.name for code in RuleCode}


def test_no_rule_of_the_trainer_is_without_a_code() -> None:
    bare: list[str] = []
    for place in TRAINER:
        path = ROOT / place
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            for call in _calls(file):
                name = getattr(call.func, "id", "")
                text = call.args[0] if call.args else None
                coded = any(word.arg == "code" for word in call.keywords)
                if ERRORS.match(name) and isinstance(text, ast.Constant | ast.JoinedStr):
                    said = text.value if isinstance(text, ast.Constant) else ast.unparse(text)
                    if not coded and said not in ELSEWHERE:
                        bare.append(f"{file.relative_to(ROOT)}:{call.lineno} {said}")
    assert bare == []


def test_an_error_needs_the_values_of_its_code() -> None:
    for values in ({}, {"asked": 8}, {"asked": 8, "limit": "4"}, {"asked": 8, "limit": None}):
        with pytest.raises((ValueError, TypeError)):
            PolicyError(RuleCode.EPSILON, values=values)  # type: ignore[arg-type]
    error = PolicyError(RuleCode.EPSILON, values={"asked": 8.123456, "limit": 4})
    assert error.values == {"asked": 8.123, "limit": 4.0}
    assert "8.123 (limit 4)" in str(error)


def _calls(path: Path) -> Iterator[ast.Call]:
    tree = ast.parse(path.read_text("utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _codes(call: ast.Call) -> list[RuleCode]:
    """The codes of an error or violation that is made."""
    if not re.search(r"(Error|Busy|Gone|Lacking|Violation)$", getattr(call.func, "id", "")):
        return []
    words = [*call.args[:2], *(word.value for word in call.keywords if word.arg == "code")]
    names = (re.fullmatch(r"RuleCode\.([A-Z_0-9]+)", ast.unparse(word)) for word in words)
    return [RuleCode[found[1]] for found in names if found]


def _values(call: ast.Call) -> set[str] | None:
    """Names of the values that come with it; None where they are not written there."""
    given = [word.value for word in call.keywords if word.arg == "values"]
    if getattr(call.func, "id", "") == "Violation":
        given = call.args[2:]
    if not given:
        return set()
    if not isinstance(given[0], ast.Dict):
        return None
    return {key.value for key in given[0].keys if isinstance(key, ast.Constant)}
