"""The layer before the SuperLink, asked as an ASGI server asks it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message
from flwr.proto.node_pb2 import Node

from fedward.flower.batch_middleware import App, BatchMiddleware, Receive, Scope, Send, pieces
from fedward.flower.framing import Frames, read_object

PULL = "/v1/fleet/pull-messages"
PUSH = "/v1/fleet/push-messages"


class Link:
    """Answers questions with what it has; notes what it was asked."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.messages, self.asked = status, list[Message](), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b"".join([piece async for piece in pieces(receive)])
        self.asked += 1
        PullMessagesRequest.FromString(body)
        told = PullMessagesResponse(messages_list=self.messages)
        for _ in self.messages:
            told.message_object_trees.add(object_id="ab" * 32)
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": told.SerializeToString()})


async def call(
    app: App, path: str, body: Iterable[bytes], wait: float = 0.0, stay: bool = True
) -> tuple[int, bytes]:
    given, told, content = list(body), dict[str, Any](), bytearray()
    headers = [(b"x-fedward-parts", b"1"), (b"x-fedward-wait", str(wait).encode())]
    scope = {"type": "http", "path": path, "headers": headers}

    async def receive() -> dict[str, Any]:
        if given:
            piece = given.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(given)}
        if stay:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(event: Any) -> None:
        told.update(event)
        content.extend(event.get("body", b""))

    await app(scope, receive, send)
    return int(told.get("status", 0)), bytes(content)


def question(node: int) -> list[bytes]:
    return [PullMessagesRequest(node=Node(node_id=node)).SerializeToString()]


class Store:
    """Has one object, whatever it is called."""

    def session(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_object(self, run: int, identifier: str) -> bytes:
        return b"part"

    def store_traffic(self, run: int, *, bytes_sent: int, bytes_recv: int) -> None:
        assert (bytes_sent, bytes_recv) == (4, 0)


def within(link: Link) -> BatchMiddleware:
    return BatchMiddleware(link, Store)


def test_a_question_waits_until_its_own_bell_rings_and_no_longer() -> None:
    async def run() -> None:
        link = Link()
        parts = within(link)
        asked = asyncio.create_task(call(parts, PULL, question(7), wait=20.0))
        await asyncio.sleep(0.05)
        assert link.asked == 1
        parts._bells.ring([8])
        await asyncio.sleep(0.05)
        assert link.asked == 1
        link.messages.append(Message())
        parts._bells.ring([7])
        status, content = await asyncio.wait_for(asked, 5)
        assert status == 200
        answer, part = Frames().feed(content)
        assert read_object(part) == ("ab" * 32, b"part")
        assert len(PullMessagesResponse.FromString(answer).messages_list) == 1

    asyncio.run(run())


def test_a_question_is_answered_when_its_time_is_up_or_the_server_ends() -> None:
    async def run() -> None:
        parts = within(Link())
        began = time.monotonic()
        status, content = await call(parts, PULL, question(7), wait=0.2)
        assert time.monotonic() - began >= 0.2
        (answer,) = Frames().feed(content)
        assert (status, answer) == (200, b"")
        held = asyncio.create_task(call(parts, PULL, question(7), wait=20.0))
        await asyncio.sleep(0.05)
        parts.close()
        assert (await asyncio.wait_for(held, 5))[0] == 200

    asyncio.run(run())


@pytest.mark.parametrize("path", [PULL, PUSH])
def test_what_flower_refuses_is_refused(path: str) -> None:
    body = question(7) if path == PULL else [b"\0" * 8]
    assert asyncio.run(call(within(Link(status=401)), path, body, wait=20.0))[0] == 401


def test_who_leaves_gets_no_message_that_came_later() -> None:
    async def run() -> None:
        link = Link()
        parts = within(link)
        assert await call(parts, PULL, question(7), wait=20.0, stay=False) == (0, b"")
        assert link.asked == 1
        assert parts._bells._waiting == {}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PUSH, [b""]),
        (PUSH, [b"\0" * 7]),
        (PUSH, [b"\xff" * 8]),
        (PUSH, [(1 << 21).to_bytes(8, "big"), *[b"\0" * (1 << 20)] * 2]),
        (PULL, [b"\xff\xff\xff"]),
        (PULL, [b"\0" * (1 << 20)] * 3),
    ],
    ids=["empty", "half a length", "endless part", "huge message", "no question", "huge question"],
)
def test_garbage_is_refused_before_it_is_passed_on(path: str, body: list[bytes]) -> None:
    link = Link()
    status, _ = asyncio.run(call(within(link), path, body))
    assert status == 409
    assert link.asked == 0
