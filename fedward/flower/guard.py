"""Authorisation of calls to the SuperLink's APIs from the request headers alone.

Without accounts anybody who reaches Flower's Control API may start a run, and Flower reads the
whole body of a call before it looks at the caller. Here the caller comes first: a call of the Fleet
API is signed by an enrolled key, one of the Control API carries a secret of this machine, and the
Runtime API answers this machine only. No body is read for anybody else.
"""

from __future__ import annotations

import asyncio
import hmac
from base64 import b64decode
from collections.abc import Callable, MutableMapping
from contextlib import nullcontext
from typing import Any, Final

from fastapi import HTTPException, Request
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, TASK_TOKEN_HEADER
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from starlette.concurrency import run_in_threadpool

from fedward.connections import identified
from fedward.flower.batch_middleware import (
    CONTROL_HEADER,
    Answer,
    App,
    Receive,
    Scope,
    Send,
    header,
)
from fedward.flower.framing import PARTS_HEADER

_HEALTH: Final = "/health"
_FLEET: Final = "/v1/fleet/"
_CONTROL: Final = "/v1/control/"
_RUNTIME: Final = "/v1/runtime/"
_LOOPBACK: Final = ("127.0.0.1", "::1")
# A hospital that asks for a run's files gets none, and no node enrols itself.
_CLOSED: Final = ("/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/get-fab")
# To claim a run, a process of this machine signs a small body.
_MOST_UNSIGNED: Final = 64 << 10
# Of a hospital's call that Flower reads as a whole; its objects are smaller.
_MOST_SIGNED: Final = 64 << 20
_NOTHING: Final = Answer(404, [(b"content-length", b"0")], b"")
_UNKNOWN: Final = Answer(
    401, [(b"content-type", b"application/json")], b'{"detail":"Invalid SuperNode authentication"}'
)


class Guard:
    """ASGI middleware that lets through whom the headers identify.

    Parameters
    ----------
    app : callable
        The SuperLink.
    secret : bytes
        What a caller of the Control API must show.
    state : callable
        Gives Flower's state, which knows the enrolled keys and the runs' tokens.
    """

    def __init__(self, app: App, secret: bytes, state: Callable[[], Any]) -> None:
        self._app, self._secret, self._state = app, secret, state
        # Keys that were shown with a valid signature. All others are looked at one at a time.
        self._seen, self._others = set[str](), asyncio.Semaphore(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 404 as if there were nothing, or 401."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"])
        if path.startswith(_FLEET) and path not in _CLOSED:
            if not await self._signed(scope):
                await _UNKNOWN.send(send)
                return
            if header(scope, PARTS_HEADER) is None:  # else it is stored piece by piece
                receive = _at_most(_MOST_SIGNED, receive)
        elif path.startswith(_CONTROL) and self._knows_secret(scope):
            pass
        elif path.startswith(_RUNTIME) and (scope.get("client") or ("",))[0] in _LOOPBACK:
            if not await self._runs(scope):
                # Flower's own answer tells a run that it has ended.
                await self._app(scope, _at_most(_MOST_UNSIGNED, receive), send)
                return
        elif path == _HEALTH:
            await self._app(scope, _at_most(0, receive), send)
            return
        else:
            await _NOTHING.send(send)
            return
        identified(scope)
        await self._app(scope, receive, send)

    async def _signed(self, scope: Scope) -> bool:
        shown = header(scope, FLEET_HTTP_PUBLIC_KEY_HEADER)
        if shown is None:
            return False
        async with nullcontext() if shown in self._seen else self._others:
            fine = await run_in_threadpool(self._verified, shown, scope["headers"])
        if fine:
            self._seen.add(shown)
        return fine

    def _verified(self, shown: str, headers: Any) -> bool:
        """Whether a key is enrolled, and has signed the time in these headers."""
        try:
            key = b64decode(shown, validate=True)
        except ValueError:
            return False
        if self._state().get_node_id_by_public_key(key) is None:
            return False
        # Flower's own check, of a call that says no more than the key.
        request = Request({"type": "http", "headers": headers})
        request.state.protobuf_request = ActivateNodeRequest(public_key=key)
        try:
            authenticate_node(request)
        except HTTPException:
            return False
        return True

    async def _runs(self, scope: Scope) -> bool:
        token = header(scope, TASK_TOKEN_HEADER)
        return bool(token) and await run_in_threadpool(self._task_of, token) is not None

    def _task_of(self, token: str | None) -> Any:
        return self._state().get_task_by_token(token)

    def _knows_secret(self, scope: Scope) -> bool:
        wanted = CONTROL_HEADER.encode()
        given = [value for name, value in scope["headers"] if name.lower() == wanted]
        return len(given) == 1 and hmac.compare_digest(given[0], self._secret)


def _at_most(most: int, receive: Receive) -> Receive:
    """Receive a body up to a size; who sends more has left."""
    taken = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal taken
        event = await receive()
        taken += len(event.get("body", b""))
        return event if taken <= most else {"type": "http.disconnect"}

    return bounded
