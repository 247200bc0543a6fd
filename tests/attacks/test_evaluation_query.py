"""Evaluations as questions about single patients: by the coordinator, and by the connector.

The attacker chooses the weights. A model whose last layer ignores all but one feature turns the
count of positive answers into "how many patients have this feature above t", for any t. Asked
often enough, that gives every patient's feature to as many digits as one likes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_start
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedward.errors import FedwardError
from fedward.models import build_model, to_arrays
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import RoundOrder
from fedward.signing import fingerprint, public_bytes, sign_order
from fedward.tensors import digest, unpack
from fedward_client.link.client import TrainerClient
from fedward_client.link.messages import TrainerMessage

pytestmark = pytest.mark.integration
Make = Callable[..., Any]
PRIVATE_COUNTS = '[[policy.studies]]\nmatch = "*"\ndataset = "chest"\ncounts = "private"\n'


def threshold_model(plan: Plan, threshold: float) -> dict[str, np.ndarray]:
    """Answers "yes" where the first feature of the last layer is above the threshold."""
    arrays = to_arrays(build_model(plan, 0))
    arrays["fc.weight"] = np.zeros_like(arrays["fc.weight"])
    arrays["fc.weight"][1, 0] = 1e4
    arrays["fc.bias"] = np.array([0.0, -1e4 * threshold], np.float32)
    return arrays


def above(answer: dict[str, np.ndarray]) -> int | None:
    """How many of the patients the model said yes to; None where nothing exact came."""
    return int(answer["confusion"][:, 1].sum()) if "confusion" in answer else None


def find_largest(ask: Callable[[float], dict[str, np.ndarray] | None]) -> tuple[float, int]:
    """Search for the threshold that exactly one patient is above; its width, and the answers."""
    low, high, answers = 0.0, 8.0, 0
    for _ in range(16):
        middle = (low + high) / 2
        answer = ask(middle)
        if answer is None:
            break
        answers += 1
        count = above(answer)
        if count is None:
            break
        low, high = (middle, high) if count >= 1 else (low, middle)
    return high - low, answers


@pytest.fixture
def two_rounds(make_plan: Make) -> Plan:
    made: Plan = make_plan(
        task={"classes": ["clear", "opacity"]}, split={"given": None}, training={"rounds": 2}
    )
    return made


@pytest.mark.parametrize("counts", ["private", "exact"])
def test_a_coordinator_with_the_key_gets_the_plans_evaluations_and_no_other(
    coordinator: Any,
    make_hospital: Make,
    until: Make,
    two_rounds: Plan,
    refusal_of: Make,
    counts: str,
) -> None:
    number = 1 if counts == "private" else 2
    site = make_hospital(number)
    if counts == "private":
        text = site.daemon.config.read_text()
        rule = text.index("[[policy.studies]]")
        site.daemon.config.write_text(text[:rule] + PRIVATE_COUNTS)
    site.start()
    until(lambda: site.online)

    def query(threshold: float, round_: int, part: str) -> dict[str, np.ndarray] | None:
        model = threshold_model(two_rounds, threshold)
        order = coordinator.signed(two_rounds, round_, "query", model, task="evaluate", part=part)
        reply = coordinator.ask(site.node, order, "evaluate")
        if "refusal" in reply.config_records:
            return None
        packed = reply.array_records["counts"]["packed"]
        return unpack(packed.numpy())

    # One question a round: the search ends after its first answer.
    width, answers = find_largest(lambda t: query(t, 1, "validation"))
    assert answers == 1 and width >= 4.0
    # Over all rounds and parts that the wire can name, as many answers as the plan has evaluations.
    given = sum(
        query(0.5, round_, part) is not None
        for round_ in range(5)
        for part in ("validation", "test")
    )
    assert given == 2  # round 2, and the test; round 1 was answered for another model
    order = coordinator.signed(
        two_rounds, 1, "query", threshold_model(two_rounds, 1.0), task="evaluate"
    )
    order.config_records["config"]["part"] = "train"
    assert refusal_of(coordinator.ask(site.node, order, "evaluate"))[0] == "protocol"
    row = site.told("evaluation")
    assert len(row) == 3
    if counts == "private":
        assert sum(one["epsilon"] for one in row if one["part"] == "validation") == 4.0
        assert [one["epsilon"] for one in row if one["part"] == "test"] == [4.0]
    else:
        assert not any(one["private"] for one in row)
    site.daemon.stop()


@pytest.fixture(scope="module")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def connector(
    coordinator: Any,
    make_daemon: Make,
    key: Ed25519PrivateKey,
    environment: dict[str, str],
    until: Make,
) -> Iterator[TrainerClient]:
    """What a taken-over connector has: the trainer's socket, and nothing of the coordinator's."""
    mark = fingerprint(public_bytes(key))
    daemon = make_daemon(3, "127.0.0.1:1", coordinator.superlink.ca, mark)
    command = [sys.executable, "-m", "fedward_client.daemon.launch", "trainer", str(daemon.config)]
    with (daemon.folder / "trainer.log").open("ab") as log:
        process = warm_start.popen(command, env=environment, stdout=log, stderr=log)
    made: list[TrainerClient] = []

    def attached() -> bool:
        try:
            made.append(TrainerClient(Path(daemon.folder / "run" / "t.sock"), "1", "hidden"))
        except FedwardError:
            return False
        return True

    until(attached)
    yield made[0]
    made[0].close()
    process.terminate()
    process.wait(30)


def test_a_connector_with_a_captured_order_can_ask_nothing_new(
    connector: TrainerClient, key: Ed25519PrivateKey, two_rounds: Plan
) -> None:
    def signed(
        task: str, round_: int, arrays: dict[str, np.ndarray], **more: Any
    ) -> TrainerMessage:
        order = RoundOrder(
            plan=canonical(two_rounds),
            plan_hash=plan_hash(two_rounds),
            round=round_,
            task=task,
            study="captured",
            arrays=digest(arrays) if arrays else "",
            **more,
        )
        return TrainerMessage("order", dict(sign_order(key, order).to_flat()), arrays)

    model = threshold_model(two_rounds, 1.0)
    captured = signed("evaluate", 1, model)
    first = connector.ask("evaluate", captured)
    assert first.kind == "counts", first.record
    again = connector.ask("evaluate", captured)
    assert again.record == first.record
    for name, value in first.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], value)

    def changed(**fields: Any) -> TrainerMessage:
        return TrainerMessage("order", captured.record | fields, captured.arrays)

    other = threshold_model(two_rounds, 2.0)
    own = Ed25519PrivateKey.generate()
    stolen = RoundOrder.from_flat(captured.record | {"arrays": digest(other)})
    attempts = {
        "another model": TrainerMessage("order", captured.record, other),
        "its digest": TrainerMessage("order", captured.record | {"arrays": digest(other)}, other),
        "an own key": TrainerMessage("order", dict(sign_order(own, stolen).to_flat()), other),
        "another round": changed(round=2),
        "another part": changed(part="test"),
        "training patients": changed(part="train"),
        "another study": changed(study="captured-2"),
        "another seed": changed(seed=7),
        "more sites": changed(sites=9),
        "another backbone": changed(frozen=digest(other)),
        "no model": TrainerMessage("order", captured.record, {}),
        "an unknown key": changed(mu=50.0),
    }
    for name, packet in attempts.items():
        answer = connector.ask("evaluate", packet)
        assert answer.kind == "refusal", name
        assert answer.record["kind"] in ("protocol", "policy"), (name, answer.record)
    # An order for one task is none for another.
    assert connector.ask("train", captured).kind == "refusal"
    train = signed("train", 1, model)
    assert connector.ask("evaluate", train).kind == "refusal"
    assert connector.ask("train", train).kind == "update"


def test_what_a_plan_does_not_say_changes_nothing(
    connector: TrainerClient, key: Ed25519PrivateKey, two_rounds: Plan
) -> None:
    """A proximal weight beside a signed FedAvg plan: there is no place left to put it."""
    model = to_arrays(build_model(two_rounds, 0))
    order = RoundOrder(
        plan=canonical(two_rounds),
        plan_hash=plan_hash(two_rounds),
        round=1,
        study="prox",
        arrays=digest(model),
    )
    record = dict(sign_order(key, order).to_flat())
    plain = connector.ask("train", TrainerMessage("order", record, model))
    assert plain.kind == "update"
    for extra in ({"proximal-mu": 50.0}, {"mu": float("inf")}, {"learning_rate": 10.0}):
        with_more = {**record, **{k: str(v) if v == float("inf") else v for k, v in extra.items()}}
        assert connector.ask("train", TrainerMessage("order", with_more, model)).kind == "refusal"
    again = connector.ask("train", TrainerMessage("order", record, model))
    for name, value in plain.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], value)
