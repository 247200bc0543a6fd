"""A hospital that misbehaves: it joins late, sends garbage, sends late, is put out and let in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from numpy.typing import NDArray

from fedward.errors import ProtocolError
from fedward.flower.fleet_client import FleetClient, LinkDown, LinkRefused, RunOver
from fedward.protocol import SiteFacts, TrainOutcome
from fedward_client.enrol import public_pem
from fedward_client.link.messages import TrainerMessage
from fedward_client.messages import refusal, to_order, to_reply

pytestmark = pytest.mark.integration
Make = Callable[..., Any]
Arrays = dict[str, NDArray[Any]]
Answer = Callable[[Arrays, TrainOutcome], tuple[Arrays, TrainOutcome]]
NAME = "mallory"
FACTS = SiteFacts(
    site=NAME,
    patients=12,
    images=12,
    train_patients=8,
    validation_patients=0,
    test_patients=0,
    train_images=8,
    validation_images=0,
    test_images=0,
)


def right(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return arrays, outcome


def _first(arrays: Arrays, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Arrays:
    name = next(iter(arrays))
    return {**arrays, name: change(arrays[name])}


def not_a_number(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return _first(arrays, lambda value: np.full_like(value, np.nan)), outcome


def wrong_shape(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return _first(arrays, lambda value: value[:1]), outcome


def wrong_dtype(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return _first(arrays, lambda value: value.astype(np.float64)), outcome


def huge_norm(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return _first(arrays, lambda value: np.full_like(value, 1e6)), outcome


def other_names(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return {f"x{name}": value for name, value in arrays.items()}, outcome


def too_many_patients(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return arrays, outcome.model_copy(update={"patients": 9})


def of_the_last_round(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return arrays, outcome.model_copy(update={"round": outcome.round - 1})


def in_anothers_name(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return arrays, outcome.model_copy(update={"site": "hospital 1"})


# Never three in a row, which is what puts a site out.
GARBAGE: dict[Answer, str] = {
    not_a_number: "an update must be finite",
    wrong_shape: "an update's arrays must have the model's shapes and dtypes",
    huge_norm: "an update must lie within a distance of the model",
    too_many_patients: "an update must not claim more patients than its site described",
    other_names: "an update must hold exactly the arrays that train",
    wrong_dtype: "an update's arrays must have the model's shapes and dtypes",
    of_the_last_round: "a reply must be for the round that was asked",
    in_anothers_name: "a reply must come from the site that was asked",
}


class Mallory:
    """A hospital's connector with a trainer of its own mind."""

    def __init__(self, address: str, ca: bytes) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        self._fleet = FleetClient(address, ca, self.key, 1 << 24)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.script: list[Answer | None] = []
        self.answers: dict[int, str] = {}
        self.kept: list[Message] = []
        self._beat = 0.0

    def start(self) -> None:
        """Come online."""
        self._fleet.activate()
        self._thread.start()

    def close(self) -> None:
        """Leave."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            self._fleet.close()

    def push_late(self) -> None:
        """Answer the orders that were left lying."""
        for message in self.kept:
            _, order = to_order(message)
            self._fleet.push(Message(to_reply(self._update(order, right), order), reply_to=message))

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
            except LinkRefused:  # it was removed
                return
            except (LinkDown, RunOver):
                self._stop.wait(0.5)

    def _turn(self) -> None:
        if time.monotonic() - self._beat > 4:
            self._fleet.beat()
            self._beat = time.monotonic()
        message = self._fleet.pull()
        if message is None:
            self._stop.wait(0.05)
            return
        self._fleet.confirm(message)
        what, order = to_order(message)
        packet = self._answer(what, order, message)
        if packet is not None:
            self._fleet.push(Message(to_reply(packet, order), reply_to=message))

    def _answer(self, what: str, order: TrainerMessage, message: Message) -> TrainerMessage | None:
        if what == "describe":
            return TrainerMessage("facts", dict(FACTS.to_flat()))
        if what == "evaluate":
            return refusal(NAME, order, ProtocolError("nothing to measure on"))
        answer = self.script.pop(0) if self.script else right
        self.answers[order.record["round"]] = answer.__name__ if answer else "silent"
        if answer is None:
            self.kept.append(message)
            return None
        return self._update(order, answer)

    @staticmethod
    def _update(order: TrainerMessage, answer: Answer) -> TrainerMessage:
        outcome = TrainOutcome(
            site=NAME, round=order.record["round"], patients=8, images=8, steps=1, seconds=0.1
        )
        arrays, outcome = answer(dict(order.arrays), outcome)
        return TrainerMessage("update", dict(outcome.to_flat()), arrays)


@pytest.fixture
def mallory(federation: Any, tmp_path: Path) -> Iterator[Mallory]:
    service = federation.service
    address = f"{federation.network.address}:{service.sites_port}"
    made = Mallory(address, (service.folder / "tls" / "ca.crt").read_bytes())
    (tmp_path / "mallory.pub").write_text(public_pem(made.key))
    service.ask("site", "add", NAME, tmp_path / "mallory.pub")
    yield made
    made.close()


def test_no_hospital_can_spoil_a_study(
    federation: Any, mallory: Mallory, make_plan: Make, tmp_path: Path, until: Make
) -> None:
    plan = make_plan(
        study={"name": "spoilt"},
        task={"classes": ["clear", "opacity"]},
        split={"given": None},
        training={"rounds": 900},
        participation={"sites": 1, "quorum": 1, "deadline": 8.0},
    )
    for number, garbage in enumerate(GARBAGE):
        mallory.script += [garbage] if number % 2 else [right, garbage]
    # Silent for a round, then put out for three bad answers.
    mallory.script += [right, None, right, not_a_number, not_a_number, not_a_number]
    federation.ready(1)
    study = federation.submit(plan, f"hospital 1,{NAME}", tmp_path)

    def rounds() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = federation.events(study, "round")
        return found

    until(lambda: len(rounds()) >= 1)
    assert list(rounds()[0]["sites"]) == ["hospital 1"]
    mallory.start()
    until(lambda: federation.events(study, "quarantined"))
    (quarantined,) = federation.events(study, "quarantined")
    assert quarantined["site"] == NAME
    assert quarantined["reason"].startswith("an update must be finite")
    listed = {one["name"]: one for one in federation.service.ask("site", "list")["sites"]}
    assert listed[NAME]["quarantined"][study].startswith("an update must be finite")

    # Its late answer goes nowhere, and nobody asks it any more.
    mallory.push_late()
    reached = len(rounds())
    until(lambda: len(rounds()) > reached + 1)
    by_round = {one["round"]: one for one in rounds()}
    joined = min(mallory.answers)
    assert all(list(by_round[number]["sites"]) == ["hospital 1"] for number in range(1, joined))
    for number, answer in mallory.answers.items():
        one = by_round[number]
        assert "hospital 1" in one["sites"], number
        assert (NAME in one["sites"]) == (answer == "right"), (number, answer)
        reasons = [failure["reason"] for failure in one["failures"] if failure["site"] == NAME]
        expected = {fault.__name__: text for fault, text in GARBAGE.items()}
        expected["silent"] = "no answer in time"
        if answer != "right":
            assert reasons[0].startswith(expected[answer]), (number, answer, reasons)
    assert max(mallory.answers) == quarantined["round"]

    federation.service.ask("site", "release", NAME, "--study", study)
    until(lambda: NAME in rounds()[-1]["sites"])
    federation.service.ask("site", "remove", NAME)
    federation.service.ask("study", "stop", study)
