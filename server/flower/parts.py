"""A message with all its parts in one request; a question that waits for its answer.

Flower's APIs take a request for each part of a message, and are asked again and again whether
there is something new. Each request costs the SuperLink tens of milliseconds of one core, on top of
what it transports. This layer before it takes a message in whole and gives it out whole, and holds
a question until there is something to answer, at most for the time that the question allows. What
a request may do is still for Flower to say: each begins with Flower's own answer to it. Requests
without our header pass as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from google.protobuf.message import DecodeError

from fedward.errors import ProtocolError
from fedward.frames import (
    LONGEST_WAIT,
    PARTS_HEADER,
    PARTS_TYPE,
    WAIT_HEADER,
    Frames,
    frame,
)
from server.flower.asgi import Answer, App, Gone, Receive, Scope, Send, ask, header, pieces
from server.flower.bells import Bells
from server.flower.kinds import PULLS, PUSHES, Pull, Push
from server.flower.shelf import Shelf

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


class Parts:
    """ASGI middleware around a SuperLink.

    Parameters
    ----------
    app : callable
        The SuperLink.
    state : callable
        Gives its state.
    """

    def __init__(self, app: App, state: Callable[[], Any]) -> None:
        self._app, self._shelf = app, Shelf(state)
        self._bells, self._closed = Bells(), False

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
