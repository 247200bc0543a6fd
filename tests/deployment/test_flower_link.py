"""Enrol, start, send, answer: against a real SuperLink."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedward.errors import StudyError
from fedward.flower.control_client import ControlClient
from fedward.flower.fleet_client import FleetClient, LeaseHeld, LinkDown, LinkRefused, RunOver
from fedward.flower.server_session import RunSession
from fedward.flower.study_grid import StudyGrid
from fedward.tensors import pack, unpack
from fedward_server import certificates

pytestmark = pytest.mark.integration
NewKey = Callable[[], tuple[Any, bytes]]


def test_a_message_goes_there_and_back_and_only_fleet_calls_pass(
    superlink: Any, new_key: NewKey, tmp_path: Any
) -> None:
    link = ControlClient(superlink.address, superlink.ca, superlink.control_secret)
    key, public = new_key()
    node = link.register(public, "north")
    session = RunSession(link, superlink.runtime_secret, tmp_path / "lock")
    fleet = FleetClient(superlink.address, superlink.ca, key, 1 << 30)
    assert fleet.activate() == node
    assert [(n.node_id, n.status) for n in link.nodes()] == [(node, "online")]

    value = np.random.default_rng(0).normal(size=2_000_000).astype(np.float32)

    def answer() -> None:
        while (message := fleet.pull()) is None:
            time.sleep(0.02)
        got = unpack(message.content.array_records["arrays"]["packed"].numpy())["w"]
        doubled = ArrayRecord({"packed": Array(pack({"w": got * 2}))})
        fleet.push(Message(RecordDict({"arrays": doubled}), reply_to=message))

    thread = threading.Thread(target=answer)
    thread.start()
    content = RecordDict(
        {"arrays": ArrayRecord({"w": Array(value)}), "config": ConfigRecord({"x": 1})}
    )
    grid = StudyGrid(session.grid, [node], threading.Event())
    ((_, reply),) = grid.replies([Message(content, node, MessageType.TRAIN)], 60)
    thread.join()
    np.testing.assert_array_equal(reply.content.array_records["arrays"]["w"].numpy(), value * 2)

    context = ssl.create_default_context(cadata=superlink.ca.decode())
    with httpx.Client(base_url=f"https://{superlink.address}", verify=context) as anyone:
        closed = ("/v1/control/list-nodes", "/v1/control/start-run", "/docs", "/openapi.json")
        for path in (*closed, "/v1/fleet/register-node", "/v1/fleet/get-fab", "/v1/nothing"):
            assert anyone.post(path).status_code == 404, path
        wrong = {"x-fedward-control": "0" * 64}
        assert anyone.post("/v1/control/list-nodes", headers=wrong).status_code == 404
        assert anyone.get("/health").status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"https://{superlink.address}/health")
    fleet.close()
    session.close(complete=True)


def test_an_answer_counts_though_its_hospital_has_left_and_a_damaged_part_does_not(
    superlink: Any, new_key: NewKey, tmp_path: Any
) -> None:
    link = ControlClient(superlink.address, superlink.ca, superlink.control_secret)
    key, public = new_key()
    node = link.register(public, "north")
    session = RunSession(link, superlink.runtime_secret, tmp_path / "lock")
    fleet = Breaking(superlink.address, superlink.ca, key, 1 << 20)
    fleet.activate()
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.arange(4.0))})})
    (asked,) = session.grid.push_messages([Message(content, node, MessageType.TRAIN)])
    order = fleet.pull(20.0)
    assert order is not None
    fleet.confirm(order)
    fleet.spoils = True
    with pytest.raises(LinkDown, match="409"):
        fleet.push(Message(content, reply_to=order))
    fleet.spoils = False
    assert list(session.grid.pull_messages([asked])) == []
    fleet.push(Message(content, reply_to=order))
    fleet.close()
    assert {n.node_id: n.status for n in link.nodes()}[node] == "offline"
    (reply,) = session.grid.pull_messages([asked])
    np.testing.assert_array_equal(
        reply.content.array_records["arrays"]["w"].numpy(), np.arange(4.0)
    )
    assert {n.node_id: n.status for n in link.nodes()}[node] == "offline"
    session.close(complete=True)


def test_who_may_connect(superlink: Any, new_key: NewKey, tmp_path: Any) -> None:
    link = ControlClient(superlink.address, superlink.ca, superlink.control_secret)
    key, public = new_key()
    node = link.register(public, "north")
    with pytest.raises(StudyError, match="use"):
        link.register(public, "again")
    with pytest.raises(StudyError, match="public key"):
        link.register(b"no key", "bad")
    stranger = FleetClient(superlink.address, superlink.ca, new_key()[0], 1 << 20)
    with pytest.raises((LeaseHeld, LinkRefused)):
        stranger.activate()

    first = FleetClient(superlink.address, superlink.ca, key, 1 << 20)
    first.activate()
    second = FleetClient(superlink.address, superlink.ca, key, 1 << 20)
    with pytest.raises(LeaseHeld):
        second.activate()
    assert second.activate(known_as=node) == node
    with pytest.raises(LinkRefused):
        stranger.activate(known_as=node)
    link.remove(node)
    with pytest.raises(LinkRefused):
        second.beat()
    with pytest.raises(LinkRefused):
        second.pull()


def test_a_certificate_that_has_ended_or_is_another_authoritys_ends_the_call(
    make_superlink: Callable[..., Any], new_key: NewKey
) -> None:
    expired = make_superlink(days=-1)
    key, public = new_key()
    with pytest.raises(StudyError, match="must be reachable"):
        ControlClient(expired.address, expired.ca, expired.control_secret).register(public, "north")
    with pytest.raises(LinkDown, match="certificate"):
        FleetClient(expired.address, expired.ca, key, 1 << 20).activate()
    elsewhere = certificates.certificate_pem(
        certificates.make_ca("another", certificates.new_key())
    )
    with pytest.raises(LinkDown, match="certificate"):
        FleetClient(expired.address, elsewhere, key, 1 << 20).activate()


def test_a_killed_superlink_comes_back_with_the_run(
    superlink: Any, new_key: NewKey, tmp_path: Any
) -> None:
    link = ControlClient(superlink.address, superlink.ca, superlink.control_secret)
    key, public = new_key()
    node = link.register(public, "north")
    session = RunSession(link, superlink.runtime_secret, tmp_path / "lock")
    fleet = FleetClient(superlink.address, superlink.ca, key, 1 << 20)
    fleet.activate()
    order = RecordDict({"config": ConfigRecord({"x": 1})})
    (identifier,) = session.grid.push_messages([Message(order, node, MessageType.QUERY)])
    message = fleet.pull()
    assert message is not None

    superlink.kill()
    superlink.start()

    fleet.push(Message(RecordDict({"config": ConfigRecord({"y": 2})}), reply_to=message))
    replies = list(session.grid.pull_messages([identifier]))
    assert dict(replies[0].content.config_records["config"]) == {"y": 2}

    (identifier,) = session.grid.push_messages([Message(order, node, MessageType.QUERY)])
    message = fleet.pull()
    assert message is not None
    link.stop_run(session.run_id)
    with pytest.raises(RunOver):
        fleet.push(Message(RecordDict({"config": ConfigRecord({"y": 2})}), reply_to=message))
    # A new run may start where another was left unclaimed.
    link.start_run()
    again = RunSession(link, superlink.runtime_secret, tmp_path / "lock")
    assert again.run_id != session.run_id
    again.close(complete=True)


class Breaking(FleetClient):
    """A connection that breaks after so many pieces of what is sent, or bytes of what comes."""

    sends: int | None = None
    hears: int | None = None
    spoils = False

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._unbroken, self._client.whole = self._client.whole, self._whole  # type: ignore[method-assign]

    @contextlib.contextmanager
    def _whole(
        self, path: str, method: str, request: Any, body: Iterator[bytes], headers: Any
    ) -> Iterator[httpx.Response]:
        pieces = body if self.sends is None else broken_after(body, self.sends)
        if self.spoils:
            *most, last = pieces
            pieces = iter([*most, last[:-1] + bytes([last[-1] ^ 1])])
        with self._unbroken(path, method, request, pieces, headers) as response:
            if self.hears is not None:
                response.stream = Cut(response.stream, self.hears)
            yield response


class CutOff(LinkDown):
    """The test broke the link, and nothing else did."""


def broken_after(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    for number, piece in enumerate(pieces):
        if number == count:
            raise CutOff("the link broke")
        yield piece


class Cut(httpx.SyncByteStream):
    """The first bytes of an answer."""

    def __init__(self, whole: Any, count: int) -> None:
        self._whole, self._count = whole, count

    def __iter__(self) -> Iterator[bytes]:
        single = (piece[k : k + 1] for piece in self._whole for k in range(len(piece)))
        return broken_after(single, self._count)

    def close(self) -> None:
        self._whole.close()


def test_a_link_that_breaks_in_the_middle_loses_no_order_and_holds_up_nobody(
    superlink: Any, new_key: NewKey, tmp_path: Any
) -> None:
    link = ControlClient(superlink.address, superlink.ca, superlink.control_secret)
    fleets = []
    for name in ("north", "south"):
        key, public = new_key()
        node = link.register(public, name)
        fleets.append(Breaking(superlink.address, superlink.ca, key, 1 << 20))
        assert fleets[-1].activate() == node
    north, south = fleets
    nodes = [int(fleet.node.node_id) for fleet in fleets]
    session = RunSession(link, superlink.runtime_secret, tmp_path / "lock")
    grid = StudyGrid(session.grid, nodes, threading.Event())
    # So much that does not compress that the cut below is in its middle.
    noise = np.random.default_rng(0).normal(size=500)
    content = RecordDict({"arrays": ArrayRecord({"w": Array(noise)})})

    # Receiving: the order comes again until it is confirmed, and then never.
    answers = grid.replies([Message(content, n, MessageType.TRAIN) for n in nodes], 20)
    waiting = threading.Thread(target=lambda: got.extend(answers), daemon=True)
    got: list[tuple[int, Message]] = []
    waiting.start()
    # What is still on its way comes empty and is asked for apart: once north has the parts that
    # both share, they are there.
    assert any(north.pull(2.0) for _ in range(10))
    south.hears = 1000
    with pytest.raises(CutOff):
        assert not any(south.pull(2.0) for _ in range(10))
    south.hears = None
    order, again = south.pull(), south.pull()
    assert order is not None
    assert again is not None
    assert order.metadata.message_id == again.metadata.message_id
    south.confirm(order)
    assert south.pull() is None

    # Sending: what is there in part is not there, and whoever is whole is taken at once.
    south.sends = 6
    with pytest.raises(LinkDown):
        south.push(Message(content, reply_to=order))
    south.sends = None
    to_north = north.pull()
    assert to_north is not None
    north.push(Message(content, reply_to=to_north))
    began = time.monotonic()
    while not got:
        assert time.monotonic() - began < 5
        time.sleep(0.01)
    assert [node for node, _ in got] == [nodes[0]]

    # Another answer to the same order takes the place of the half; a third one changes nothing.
    for value in (1.0, 2.0):
        record = ArrayRecord({"w": Array(np.full(4, value))})
        south.push(Message(RecordDict({"arrays": record}), reply_to=order))
    waiting.join(25)
    assert [node for node, _ in got] == nodes
    np.testing.assert_array_equal(got[1][1].content.array_records["arrays"]["w"].numpy(), 1.0)

    # Who never comes back with the rest costs the others no more than the deadline.
    answers = grid.replies([Message(content, nodes[1], MessageType.TRAIN)], 1.5)
    began = time.monotonic()
    waiting = threading.Thread(target=lambda: got.extend(answers), daemon=True)
    waiting.start()
    while (order := south.pull()) is None:
        time.sleep(0.01)
    south.confirm(order)
    south.sends = 6
    with pytest.raises(LinkDown):
        south.push(Message(content, reply_to=order))
    waiting.join(10)
    assert time.monotonic() - began < 5
    assert len(got) == 2
    for fleet in fleets:
        fleet.close()
    session.close(complete=True)
