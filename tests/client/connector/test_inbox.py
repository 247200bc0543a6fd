"""Orders in hand, before a trainer that a test plays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedward_client.connector.inbox import Inbox
from fedward_client.link.client import TrainerGone
from fedward_client.link.messages import TrainerMessage
from fedward_client.link.state import LinkState


class Attachment:
    """A trainer that dies as often as it is told to, and answers once it may."""

    def __init__(self, deaths: int = 0) -> None:
        self.state, self.asked, self.free = LinkState(), list[Any](), threading.Event()
        self.deaths, self.stopping = deaths, False

    def caller(self) -> Attachment:
        return self

    def ask(self, what: str, packet: TrainerMessage) -> TrainerMessage:
        self.asked.append(packet.record)
        if self.deaths:
            self.deaths -= 1
            raise TrainerGone("the trainer must answer on its socket")
        assert self.free.wait(20)
        return TrainerMessage("facts", {"y": 1})

    def tell(self, state: str) -> None: ...


class Fleet:
    """Takes replies."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def push(self, message: Message) -> int:
        self.sent.append(message)
        return 1


def message(study: str, **more: Any) -> Message:
    record = RecordDict({"config": ConfigRecord({"study": study, **more})})
    made = Message(record, 7, MessageType.TRAIN)
    made.metadata.ttl = 60.0
    made.metadata.__dict__["_message_id"] = f"{study} {more}"
    return made


@pytest.fixture(autouse=True)
def _a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    def wait(condition: Callable[[], object]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    return wait


def test_a_study_with_many_orders_does_not_hold_up_another(
    tmp_path: Path, until: Callable[[Callable[[], object]], None]
) -> None:
    trainer: Any = Attachment()
    orders = Inbox("north", tmp_path, trainer)
    for number in range(10):
        orders.accept(message("many", round=number))
    until(lambda: len(trainer.asked) == 4)  # so many are at the trainer at once
    for number in range(2):
        orders.accept(message("few", round=number))
    trainer.free.set()
    until(lambda: len(trainer.asked) == 12)
    asked = [one["study"] for one in trainer.asked]
    assert asked[4:].index("few") <= 1
    assert {asked[4:8].count("few"), asked[8:].count("few")} == {2, 0}
    fleet: Any = Fleet()
    for _ in range(12):
        orders.send_ready(fleet, 5.0)
    assert len(fleet.sent) == 12
    assert not list(tmp_path.iterdir())
    orders.close()


@pytest.mark.parametrize("readable", [True, False])
def test_what_must_be_written_down_is_told_to_the_next_trainer(
    tmp_path: Path, *, readable: bool
) -> None:
    trainer: Any = Attachment(deaths=2)
    trainer.free.set()
    orders = Inbox("north", tmp_path, trainer)
    orders.accept(message("s") if readable else message("s", bytes=b"are not allowed"))
    fleet: Any = Fleet()
    orders.send_ready(fleet, 5.0)
    (answer,) = fleet.sent
    assert ("refusal" in answer.content.config_records) is readable
    assert len(trainer.asked) == (1 if readable else 3)
    orders.close()
