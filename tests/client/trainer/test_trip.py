"""An update's trip from trainer to aggregation: packed once, unpacked once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedward import tensors
from fedward.flower.grid import PackedGrid
from fedward.models import build_model, to_arrays
from fedward.plan.schema import Plan
from fedward_client.connector.inbox import Inbox
from fedward_client.link.client import TrainerClient
from fedward_client.link.service import serve
from fedward_client.link.state import LinkState
from fedward_server.reply_validation import Update, read_update

Make = Callable[..., Any]
pytestmark = pytest.mark.integration


class Attached:
    """The connector's end of a trainer's socket."""

    stopping = False

    def __init__(self, client: TrainerClient) -> None:
        self._client, self.state = client, LinkState()

    def caller(self) -> TrainerClient:
        return self._client

    def tell(self, state: str) -> None:
        """Nobody asks."""


def over_the_wire(message: Message) -> Message:
    """The message as it is after it was sent: made again from its bytes."""
    message.metadata.__dict__["_message_id"] = message.object_id
    parts = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    made: Message = inflate_object_from_contents(message.object_id, parts)  # type: ignore[assignment]
    made.metadata.__dict__["_message_id"] = message.object_id
    return made


class Link:
    """A wire between an aggregator's grid and a hospital's connector."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox, self._replies = inbox, list[Message]()

    def deliver(self, messages: Sequence[Message]) -> list[str]:
        sent = [over_the_wire(message) for message in messages]
        for one in sent:
            self._inbox.accept(one)
        return [one.metadata.message_id for one in sent]

    def push(self, reply: Message) -> int:
        self._replies.append(over_the_wire(reply))
        return 1

    def collect(self, identifiers: Any, seconds: float) -> list[Message]:
        end = time.monotonic() + 60
        while not self._replies and time.monotonic() < end:
            self._inbox.send_ready(self, 0.1)  # type: ignore[arg-type]
        found, self._replies = self._replies, []
        return found


@pytest.fixture
def attached(
    make_hospital: Make, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, PackedGrid]]:
    """A hospital with trainer, socket and connector, and the aggregator's grid to it."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    hospital = make_hospital()
    path = hospital.folder / "run" / "t.sock"
    end = serve(hospital.desk, path, most_bytes=64 << 20)
    client = TrainerClient(path, "1", "hidden")
    inbox = Inbox("north", hospital.folder / "inbox", Attached(client))  # type: ignore[arg-type]
    yield hospital, PackedGrid(None, Link(inbox))  # type: ignore[arg-type]
    inbox.close()
    client.close()
    end(1.0)


@pytest.mark.parametrize("kind", ["plain", "private", "private again"])
def test_an_update_is_packed_once_and_unpacked_once(
    attached: tuple[Any, PackedGrid],
    plan: Plan,
    private_plan: Plan,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hospital, grid = attached
    asked = plan if kind == "plain" else private_plan
    counts: Counter[str] = Counter()
    save, load, use = tensors.save, tensors.load, hospital.trainers.use

    def counting(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            counts[name] += 1
            return act(*given)

        return counted

    def trained(*given: Any) -> Any:
        made = use(*given)
        counts.clear()  # the order's trip ends here, the update's begins
        return made

    monkeypatch.setattr(tensors, "save", counting("packed", save))
    monkeypatch.setattr(tensors, "load", counting("unpacked", load))
    monkeypatch.setattr(hospital.trainers, "use", trained)
    model = to_arrays(build_model(asked, 0))

    def ask() -> Message:
        content = RecordDict(
            {
                "arrays": ArrayRecord({name: Array(value) for name, value in model.items()}),
                "config": ConfigRecord(dict(hospital.order(asked, 1).record)),
            }
        )
        sent = Message(content, 7, MessageType.TRAIN)
        sent.metadata.ttl = 600.0
        (reply,) = grid.wait_for_messages(grid.push_messages([sent]), 1.0)  # type: ignore[attr-defined]
        return reply

    reply = ask()
    if kind == "private again":
        first = reply.content.array_records["arrays"]
        monkeypatch.setattr(hospital.desk._executor, "_again", _begins(hospital, counts))
        reply = ask()
        for name, array in reply.content.array_records["arrays"].items():
            np.testing.assert_array_equal(array.numpy(), first[name].numpy())
    update = read_update(reply, "north", 1, model)
    assert isinstance(update, Update), update
    assert update.norm > 0
    # A released update is kept packed; the audit log's digest looks at its arrays.
    assert counts == ({"unpacked": 2} if "again" in kind else {"packed": 1, "unpacked": 1})


def _begins(hospital: Any, counts: Counter[str]) -> Callable[..., Any]:
    again = hospital.desk._executor._again

    def begun(*given: Any) -> Any:
        counts.clear()
        return again(*given)

    return begun
