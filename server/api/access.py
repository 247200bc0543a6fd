"""Who calls: bearer tokens, roles, rates, and the audit of what was changed."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import Request
from starlette.responses import Response

from fedward.errors import ProtocolError
from server.api.problems import Denied, answer_problem
from server.config import LimitsSection
from server.registry import Registry
from server.registry.tokens import Role, Token

_MINUTE: Final = 60.0
_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Rate:
    """At most so many events per minute and key."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._seen: defaultdict[str, deque[float]] = defaultdict(deque)

    def full(self, key: str) -> bool:
        """Whether one more would be too many."""
        seen, now = self._seen[key], self._clock()
        while seen and seen[0] < now - _MINUTE:
            seen.popleft()
        if not seen:
            del self._seen[key]
        return len(seen) >= self._most

    def add(self, key: str) -> None:
        """Count one."""
        self._seen[key].append(self._clock())


class Access:
    """Checks each call.

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

    def need(self, role: Role) -> Callable[[Request], Token]:
        """A dependency that lets tokens with a role (or a higher one) pass."""

        def check(request: Request) -> Token:
            token = self._token(request)
            request.state.token = token
            if not token.may(role):
                raise Denied(403, f"this call needs the role {role}", "Ask an admin for a token")
            return token

        check.role = role  # type: ignore[attr-defined]
        return check

    async def watch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Middleware: bounded bodies, and an audit entry for what may change something."""
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.request_bytes:
            too_long = ProtocolError(
                f"a request has at most {self._limits.request_bytes} bytes", value=length[:20],
                fix="Send less", where="body",
            )  # fmt: skip
            return await answer_problem(request, too_long)
        if "transfer-encoding" in request.headers:
            return await answer_problem(
                request, ProtocolError("a request must say how long it is", where="body")
            )
        response = await call_next(request)
        if request.method not in _READS:
            token: Token | None = getattr(request.state, "token", None)
            self._registry.audit.add(
                actor=token.name if token else "", role=token.role if token else "",
                address=_address(request), action=f"{request.method} {request.url.path}",
                status=response.status_code,
            )  # fmt: skip
        return response

    def _token(self, request: Request) -> Token:
        address = _address(request)
        if self._failures.full(address):
            raise Denied(429, "too many calls without a valid token", "Wait a minute")
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        token = self._registry.tokens.check(text.strip()) if kind.lower() == "bearer" else None
        if token is None:
            self._failures.add(address)
            raise Denied(401, "a call needs a valid token", "Give one with --token")
        if self._calls.full(token.id):
            raise Denied(429, "too many calls with this token", "Wait a minute")
        self._calls.add(token.id)
        return token


def _address(request: Request) -> str:
    client: Any = request.client
    return client.host if client else ""
