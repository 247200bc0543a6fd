"""Who calls: bearer tokens, roles, rates, and the audit of what was changed."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from contextlib import nullcontext
from typing import Any, Final

from fastapi import Request
from sqlalchemy.exc import InterfaceError, OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from fedward.connections import identified, network_of
from fedward.errors import FedwardError, ProtocolError
from fedward_server.api.problems import Denied, answer_problem
from fedward_server.config import LimitsSection
from fedward_server.registry import Registry
from fedward_server.registry.tokens import TOKEN_TEXT, Role, Token

_MINUTE: Final = 60.0
_MOST_KEYS: Final = 4096
_SLOW_SECONDS: Final = 1.0
_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
# Calls that need no token; none of them reads a body.
_OPEN: Final = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json"})


class Rate:
    """At most so many events per minute and key, for a bounded number of keys."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._seen: dict[str, deque[float]] = {}

    def full(self, key: str) -> bool:
        """Whether one more would be too many."""
        seen, now = self._seen.get(key, deque()), self._clock()
        while seen and seen[0] < now - _MINUTE:
            seen.popleft()
        if not seen:
            self._seen.pop(key, None)
        return len(seen) >= self._most

    def add(self, key: str) -> None:
        """Count one."""
        # The key that was used last is the last one; the first gives way.
        seen = self._seen.pop(key, None) or deque(maxlen=self._most)
        seen.append(self._clock())
        self._seen[key] = seen
        if len(self._seen) > _MOST_KEYS:
            del self._seen[next(iter(self._seen))]


class Access:
    """Checks each call, before its body is read.

    A valid token is served whatever others send from the same address. What is no valid token is
    counted by its prefix and network; beyond the limit it is answered late and with 429, and
    prefixes that no valid token has shown are looked up one at a time.

    Parameters
    ----------
    registry : Registry
        Knows the tokens and keeps the audit.
    limits : LimitsSection
        How often anybody may call.
    """

    def __init__(self, registry: Registry, limits: LimitsSection) -> None:
        self._registry, self._limits = registry, limits
        self._calls = Rate(limits.requests_per_minute)
        self._failures = Rate(limits.failures_per_minute)
        self._known, self._others = set[str](), asyncio.Semaphore(1)

    def need(self, role: Role) -> Callable[[Request], Token]:
        """A dependency that lets tokens with a role (or a higher one) pass."""

        def check(request: Request) -> Token:
            token: Token = request.state.token
            if not token.may(role):
                raise Denied(403, f"this call needs the role {role}", "Ask an admin for a token")
            return token

        check.role = role  # type: ignore[attr-defined]
        return check

    def around(self, app: ASGIApp) -> ASGIApp:
        """Middleware: a token first, then a bounded body, then an audit entry of a change."""

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or (scope["path"] in _OPEN and scope["method"] in _READS):
                await app(scope, receive, send)
                return
            request = Request(scope)
            try:
                token = request.state.token = await self._token(request)
                identified(scope)
                self._check_body(request)
            except (FedwardError, OperationalError, InterfaceError) as error:
                await (await answer_problem(request, error))(scope, receive, send)
                return
            audited = request.method not in _READS
            await app(scope, receive, self._audited(request, token, send) if audited else send)

        return call

    def _check_body(self, request: Request) -> None:
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.request_bytes:
            raise ProtocolError(
                f"a request has at most {self._limits.request_bytes} bytes",
                value=length[:20],
                fix="Send less",
                where="body",
            )
        if "transfer-encoding" in request.headers:
            raise ProtocolError("a request must say how long it is", where="body")

    def _audited(self, request: Request, token: Token, send: Send) -> Send:
        lost = False

        async def told(event: MutableMapping[str, Any]) -> None:
            nonlocal lost
            if event["type"] == "http.response.start":
                try:
                    await run_in_threadpool(
                        self._registry.audit.add,
                        actor=token.name,
                        role=token.role,
                        address=_address(request),
                        status=event["status"],
                        action=f"{request.method} {request.url.path}",
                    )
                except (OperationalError, InterfaceError) as error:
                    lost = True
                    await (await answer_problem(request, error))(
                        request.scope, request.receive, send
                    )
            if not lost:
                await send(event)

        return told

    async def _token(self, request: Request) -> Token:
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        form = TOKEN_TEXT.fullmatch(text.strip()) if kind.lower() == "bearer" else None
        prefix = form[1] if form and form[1] in self._known else ""
        network = network_of(_address(request))
        key = f"{prefix} {network}"
        held_up = not prefix or self._failures.full(key)
        token = None
        if form:
            async with self._others if held_up else nullcontext():
                token = await run_in_threadpool(self._registry.tokens.check, form[0])
        if token is None:
            too_many = self._failures.full(key)
            self._failures.add(key)
            self._registry.audit.count_unknown(_address(request))
            if too_many:
                await asyncio.sleep(_SLOW_SECONDS)
                raise Denied(429, "too many calls without a valid token", "Wait a minute")
            raise Denied(401, "a call needs a valid token", "Give one with --token")
        self._known.add(token.id)
        if self._calls.full(token.id):
            raise Denied(429, "too many calls with this token", "Wait a minute")
        self._calls.add(token.id)
        return token


def _address(request: Request) -> str:
    client: Any = request.client
    return client.host if client else ""
