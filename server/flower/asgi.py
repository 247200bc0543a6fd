"""What ASGI applications are made of, and small helpers to ask one from within."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

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
