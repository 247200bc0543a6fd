"""ASGI middleware: a message with all its parts in one request, and long polling.

Flower's APIs take a request for each part of a message, and are asked again and again whether
there is something new. Each request costs the SuperLink tens of milliseconds of one core, on top of
what it transports. This layer before it takes a message in whole and gives it out whole, and holds
a question until there is something to answer, at most for the time that the question allows. What
a request may do is still for Flower to say: each begins with Flower's own answer to it. Requests
without our header pass as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    MutableMapping,
)
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from google.protobuf.message import DecodeError, Message
from starlette.concurrency import run_in_threadpool

from fedward.errors import ProtocolError
from fedward.flower.framing import (
    LONGEST_WAIT,
    PARTS_HEADER,
    PARTS_TYPE,
    WAIT_HEADER,
    Frames,
    frame,
    object_frame,
    read_object,
)

# Where the parts of messages lie: Flower's own object store, read and written in large pieces.

_BATCH: Final = 8 << 20


class ObjectStore:
    """Gives out the parts of messages and takes them in.

    Parameters
    ----------
    state : callable
        Gives the SuperLink's state.
    """

    def __init__(self, state: Callable[[], Any]) -> None:
        # One writer at a time: SQLite lets others wait in naps, and the unlucky ones too long.
        self._state, self._writing = state, asyncio.Lock()

    async def frames(self, run: int, wanted: list[str], hospital: bool) -> AsyncIterator[bytes]:
        """Objects as frames, in the order in which they are wanted; hospitals' traffic counts."""
        while wanted:
            found = await run_in_threadpool(self._some, run, wanted, hospital)
            wanted = wanted[len(found) :]
            for identifier, content in found:
                for piece in object_frame(identifier, content):
                    yield piece

    def _some(self, run: int, wanted: Iterable[str], hospital: bool) -> list[tuple[str, bytes]]:
        """The first objects of a list, until they are large; what is not there yet is empty."""
        state, found, size = self._state(), list[tuple[str, bytes]](), 0
        with state.session():
            for identifier in wanted:
                content = state.get_object(run, identifier) or b""
                found.append((identifier, content))
                size += len(content)
                if size > _BATCH:
                    break
            if size and hospital:
                state.store_traffic(run, bytes_sent=size, bytes_recv=0)
        return found

    async def forget(self, message: str) -> None:
        """Let go of a message's parts."""
        async with self._writing:
            await run_in_threadpool(self._state().object_store.delete, message)

    async def keep(
        self,
        run: int,
        session: str,
        missing: set[str],
        frames: AsyncIterator[bytes],
        hospital: bool,
    ) -> bool:
        """Store the objects that are missing, as they come; whether all of them came."""
        batch, size, fine = list[tuple[str, bytes]](), 0, True
        async for content in frames:
            identifier, value = read_object(content)
            if identifier in missing:
                missing.discard(identifier)
                batch.append((identifier, value))
                size += len(value)
            if size > _BATCH:
                fine = fine and await self._store(run, session, batch, hospital)
                batch, size = [], 0
        return fine and await self._store(run, session, batch, hospital) and not missing

    async def _store(
        self, run: int, session: str, batch: list[tuple[str, bytes]], hospital: bool
    ) -> bool:
        async with self._writing:
            return await run_in_threadpool(self._stored, run, session, batch, hospital)

    def _stored(
        self, run: int, session: str, batch: list[tuple[str, bytes]], hospital: bool
    ) -> bool:
        """Store objects in one transaction: all, or none."""
        state = self._state()
        try:
            with state.session():
                for identifier, content in batch:
                    if not state.store_object(run, session, identifier, content):
                        raise _NotStored
                size = sum(len(content) for _, content in batch)
                if size and hospital:
                    state.store_traffic(run, bytes_sent=0, bytes_recv=size)
        except _NotStored:
            return False
        return True


class _NotStored(Exception):
    """An object was not taken."""


# The four calls of Flower's APIs that move whole messages, and what each waits or rings for.


@dataclass(frozen=True)
class Pull:
    """A question for messages: how it is read, and what rings for it."""

    asked: type[Message]
    told: type[Message]
    waits_for: Callable[[Any], Iterable[Hashable]]
    hospital: bool


@dataclass(frozen=True)
class Push:
    """A delivery of messages: how it is read, and for whom it rings."""

    asked: type[Message]
    told: type[Message]
    rings: Callable[[Any], Iterable[Hashable]]
    hospital: bool


PULLS: Final = {
    "/v1/fleet/pull-messages": Pull(
        PullMessagesRequest, PullMessagesResponse, lambda asked: (asked.node.node_id,), True
    ),
    "/v1/runtime/pull-messages": Pull(
        PullAppMessagesRequest, PullAppMessagesResponse, lambda asked: asked.message_ids, False
    ),
}
PUSHES: Final = {
    "/v1/fleet/push-messages": Push(
        PushMessagesRequest,
        PushMessagesResponse,
        lambda asked: (m.metadata.reply_to_message_id for m in asked.messages_list),
        True,
    ),
    "/v1/runtime/push-messages": Push(
        PushAppMessagesRequest,
        PushAppMessagesResponse,
        lambda asked: (m.metadata.dst_node_id for m in asked.messages_list),
        False,
    ),
}


# Wake those who wait for something that has just come.


class Notifier:
    """Who waits for what, within one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, set[asyncio.Event]] = {}

    @contextmanager
    def listen(self, keys: Iterable[Hashable]) -> Iterator[asyncio.Event]:
        """An event that is set whenever one of the keys is rung."""
        bell, known = asyncio.Event(), set(keys)
        for key in known:
            self._waiting.setdefault(key, set()).add(bell)
        try:
            yield bell
        finally:
            for key in known:
                self._waiting[key].discard(bell)
                if not self._waiting[key]:
                    del self._waiting[key]

    def ring(self, keys: Iterable[Hashable]) -> None:
        """Wake who waits for any of these."""
        for key in keys:
            for bell in self._waiting.get(key, ()):
                bell.set()

    def ring_all(self) -> None:
        """Wake everybody."""
        self.ring(list(self._waiting))


# What ASGI applications are made of, and small helpers to ask one from within.

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

# Carries this machine's secret in calls of the Control API.
CONTROL_HEADER: Final = "x-fedward-control"
_OF_THE_BODY = (b"content-length", b"transfer-encoding")


class Gone(Exception):
    """Whoever asked has left."""


@dataclass(frozen=True)
class Answer:
    """A response as a whole."""

    status: int
    headers: Headers
    body: bytes

    async def send(self, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


async def ask(app: App, scope: Scope, body: bytes) -> Answer:
    """Have an application answer a request with this body in place of its own."""
    told, content = dict[str, Any](), bytearray()
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> MutableMapping[str, Any]:
        if given:
            return given.pop()
        # Nobody leaves: the application's own listening for that ends with its answer.
        await asyncio.get_running_loop().create_future()
        raise Gone

    async def send(event: MutableMapping[str, Any]) -> None:
        told.update(event)
        content.extend(event.get("body", b""))

    kept = [pair for pair in scope["headers"] if pair[0].lower() not in _OF_THE_BODY]
    length = (b"content-length", str(len(body)).encode())
    # A state of its own: the application leaves there what it knows of a request.
    own = {**scope, "headers": [*kept, length], "state": dict(scope.get("state", {}))}
    await app(own, receive, send)
    return Answer(int(told["status"]), list(told["headers"]), bytes(content))


async def pieces(receive: Receive) -> AsyncIterator[bytes]:
    """The pieces of a request's body.

    Raises
    ------
    Gone
        It does not come to its end.
    """
    more = True
    while more:
        event = await receive()
        if event["type"] != "http.request":
            raise Gone
        more = bool(event.get("more_body"))
        yield event.get("body", b"")


def header(scope: Scope, name: str) -> str | None:
    """A header of a request."""
    wanted = name.encode()
    found = (value for key, value in scope["headers"] if key.lower() == wanted)
    value = next(found, None)
    return None if value is None else value.decode("latin-1")


# Of a question, or of a message without its parts: who asks is not known before that is read.
_MOST_ASKED: Final = 1 << 20
_START: Final = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", PARTS_TYPE.encode())],
}
_REFUSED: Final = Answer(409, [(b"content-type", b"application/json")], b"{}")
# Whoever sends part by part may have completed a message with any of these.
_PIECEMEAL: Final = ("/push-object", "/push-messages")


class BatchMiddleware:
    """ASGI middleware around a SuperLink.

    Parameters
    ----------
    app : callable
        The SuperLink.
    state : callable
        Gives its state.
    """

    def __init__(self, app: App, state: Callable[[], Any]) -> None:
        self._app, self._shelf = app, ObjectStore(state)
        self._bells, self._closed = Notifier(), False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what asks for whole messages; pass on everything else."""
        path = str(scope.get("path", ""))
        whole = scope["type"] == "http" and header(scope, PARTS_HEADER) is not None
        try:
            if whole and path in PULLS:
                await self._pull(PULLS[path], scope, receive, send)
            elif whole and path in PUSHES:
                await self._push(PUSHES[path], scope, receive, send)
            else:
                await self._app(scope, receive, send)
                if path.endswith(_PIECEMEAL):
                    self._bells.ring_all()
        except Gone:
            return
        except (DecodeError, ProtocolError):
            await _REFUSED.send(send)

    def close(self) -> None:
        """Answer every question now, and hold none any more; from the event loop's thread."""
        self._closed = True
        self._bells.ring_all()

    async def _pull(self, kind: Pull, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _bounded(receive)
        answer = await self._held(kind, scope, receive, body)
        if answer.status != 200:
            await answer.send(send)
            return
        await send(_START)
        for piece in frame(answer.body):
            await send(_more(piece))
        told: Any = kind.told.FromString(answer.body)
        for message, tree in zip(told.messages_list, told.message_object_trees, strict=True):
            run, wanted = message.metadata.run_id, [t.object_id for t in iterate_object_tree(tree)]
            async for piece in self._shelf.frames(run, list(dict.fromkeys(wanted)), kind.hospital):
                await send(_more(piece))
        await send({"type": "http.response.body", "body": b""})
        if not kind.hospital:  # who runs the study is on this machine, and needs no receipt
            for message in told.messages_list:
                await self._shelf.forget(message.metadata.message_id)

    async def _held(self, kind: Pull, scope: Scope, receive: Receive, body: bytes) -> Answer:
        """Flower's answer: at once if it tells of something, else when it does or time is up."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _seconds(header(scope, WAIT_HEADER))
        left = asyncio.ensure_future(receive())
        try:
            with self._bells.listen(kind.waits_for(kind.asked.FromString(body))) as bell:
                while True:
                    bell.clear()
                    answer = await ask(self._app, scope, body)
                    told: Any = kind.told.FromString(answer.body) if answer.status == 200 else None
                    told_all = told is None or told.messages_list
                    if told_all or self._closed or loop.time() >= end:
                        return answer
                    if not await _rung(bell, left, end - loop.time()):
                        return answer
        finally:
            left.cancel()

    async def _push(self, kind: Push, scope: Scope, receive: Receive, send: Send) -> None:
        frames = _frames(receive)
        try:
            body = await anext(frames)
        except StopAsyncIteration:
            raise ProtocolError("a delivery begins with its message") from None
        if kind.hospital and len(body) > _MOST_ASKED:
            raise ProtocolError("a message's envelope is small", value=len(body))
        answer = await ask(self._app, scope, body)
        if answer.status != 200:
            async for _ in frames:  # who is still sending would not hear the answer
                continue
            await answer.send(send)
            return
        asked: Any = kind.asked.FromString(body)
        told: Any = kind.told.FromString(answer.body)
        run = asked.messages_list[0].metadata.run_id
        missing = set(told.objects_to_push)
        kept = await self._shelf.keep(run, told.session_id, missing, frames, kind.hospital)
        if kept:
            self._bells.ring(kind.rings(asked))
        await (answer if kept else _REFUSED).send(send)


async def _bounded(receive: Receive) -> bytes:
    body = bytearray()
    async for piece in pieces(receive):
        body += piece
        if len(body) > _MOST_ASKED:
            raise ProtocolError("a question is small", value=len(body))
    return bytes(body)


async def _frames(receive: Receive) -> AsyncIterator[bytes]:
    frames = Frames()
    async for piece in pieces(receive):
        for content in frames.feed(piece):
            yield content
    if not frames.whole:
        raise ProtocolError("a delivery must be whole")


async def _rung(bell: asyncio.Event, left: asyncio.Future[Any], seconds: float) -> bool:
    """Wait for a bell; False when the time is up.

    Raises
    ------
    Gone
        Whoever asked has left: a message that is given out now would be lost for a while.
    """
    rung = asyncio.ensure_future(bell.wait())
    try:
        await asyncio.wait({rung, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if left.done():
            raise Gone
        return rung.done()
    finally:
        rung.cancel()


def _seconds(text: str | None) -> float:
    try:
        seconds = float(text or 0.0)
    except ValueError:
        return 0.0
    return min(seconds, LONGEST_WAIT) if seconds > 0.0 else 0.0  # NaN is not above 0 either


def _more(piece: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": piece, "more_body": True}
