"""HTTP server that limits the resources of callers with unknown identity.

Before a caller has shown a valid signature or token, it can make a server hold connections, TLS
states, headers and queued requests. Here each of these is bounded: connections by number, network
and time, headers by size, and queued requests by number. Where there are too many connections, the
oldest of the network that has the most is closed: a caller that identifies itself at once is served
also while another one opens connections all the time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from fedward.errors import ServiceError


@dataclass(frozen=True)
class ConnectionLimits:
    """How much callers without an identity may hold of a port.

    Attributes
    ----------
    total, per_network : int
        Connections in all, and from one network (one IPv4 address, or one /64 of IPv6).
    seconds : float
        How long a connection may last without an identity, TLS handshake included.
    """

    total: int = 256
    per_network: int = 64
    seconds: float = 20.0


# Where a call comes from, by network.


def network_of(address: str, ipv4: int = 32, ipv6: int = 64) -> str:
    """The network of an address.

    Parameters
    ----------
    address : str
        IPv4 or IPv6.
    ipv4, ipv6 : int
        Length of the prefix in bits. One host may use a whole /64 of IPv6 (RFC 4291, 2.5.4).

    Returns
    -------
    str
        Such as ``192.0.2.0/24``; empty where the address is none.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    found = getattr(found, "ipv4_mapped", None) or found
    return str(ipaddress.ip_network((found, ipv4 if found.version == 4 else ipv6), strict=False))


# Of one request: the request line and all headers.
HEADER_BYTES: Final = 16 << 10
_MOST_HEADERS: Final = 100
_EXTENSION: Final = "fedward.caller"
_BACKLOG: Final = 2048
# For a caller to read its answer, while what it sends is thrown away.
_LINGER_SECONDS: Final = 2.0
_GRACE_SECONDS: Final = 0.5
# After a failed accept, such as with no file descriptor left.
_PAUSE_SECONDS: Final = 0.1


def identified(scope: Any) -> None:
    """Tell the server that the caller of a request has shown who it is."""
    caller = _caller(scope)
    if caller is not None:
        caller.leave()


def _caller(scope: Any) -> Unidentified | None:
    found: Unidentified | None = scope.get("extensions", {}).get(_EXTENSION)
    return found


class Unidentified:
    """A connection whose caller is not known.

    Parameters
    ----------
    table : Table
        Where it counts.
    network : str
        Where it comes from.
    close : callable
        Ends it at once.
    """

    def __init__(self, table: Table, network: str, close: Callable[[], object]) -> None:
        self._table, self.network, self.close = table, network, close
        self._timer = asyncio.get_running_loop().call_later(table.limits.seconds, self._late)
        table.add(self)

    def _late(self) -> None:
        # After a busy moment of this process its timers run before what has arrived is read.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_GRACE_SECONDS, lambda: self.close())

    @property
    def counts(self) -> bool:
        """Whether it counts still: it is there, and its caller is not known."""
        return self._table.has(self)

    def leave(self) -> None:
        """The caller is known, or gone: count it no more."""
        self._timer.cancel()
        self._table.remove(self)


class Table:
    """The connections of a port whose callers are not known, by network, the oldest first."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._networks: defaultdict[str, dict[Unidentified, None]] = defaultdict(dict)
        self._total = 0

    def add(self, connection: Unidentified) -> None:
        """Count one more; where that is too many, close one."""
        mine = self._networks[connection.network]
        mine[connection] = None
        self._total += 1
        if len(mine) > self.limits.per_network:
            self._close_oldest(mine)
        elif self._total > self.limits.total:
            self._close_oldest(max(self._networks.values(), key=len))

    def has(self, connection: Unidentified) -> bool:
        """Whether a connection counts."""
        return connection in self._networks.get(connection.network, ())

    def remove(self, connection: Unidentified) -> None:
        """Count one no more."""
        mine = self._networks.get(connection.network, {})
        if connection in mine:
            del mine[connection]
            self._total -= 1
        if not mine:
            self._networks.pop(connection.network, None)

    def _close_oldest(self, network: dict[Unidentified, None]) -> None:
        oldest = next(iter(network))
        oldest.leave()
        oldest.close()


class BoundedHttp(HttpToolsProtocol):
    """HTTP/1.1 with headers of a bounded size, and few requests at a time.

    httptools joins the pieces of a header, each time all that came so far, and has no bound for
    them; uvicorn queues the requests that are sent before the first has its answer.

    Parameters
    ----------
    caller : Unidentified
        The connection, until its caller is known.
    **more
        uvicorn's.
    """

    def __init__(self, caller: Unidentified, **more: Any) -> None:
        super().__init__(**more)
        self._caller = caller
        self._in_head, self._head_bytes = True, 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The TLS handshake is done."""
        super().connection_made(transport)
        self._caller.close = transport.abort

    def connection_lost(self, exc: Exception | None) -> None:
        """It ended."""
        self._caller.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; of a head only so much as is allowed."""
        if self._in_head:
            head = data[: HEADER_BYTES - self._head_bytes]
            self._head_bytes += len(head)
            super().data_received(head)
            if self._in_head and self._head_bytes >= HEADER_BYTES:
                self._refuse_head()
            data = data[len(head) :]
        if data and self.transport and not self.transport.is_closing():
            super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins."""
        # One may wait: its caller has the whole answer to the one before, as that says how long it
        # is, a moment before the application says that it has ended.
        if self.pipeline:
            self.transport.abort()
            raise ValueError("requests before the answer to the one before")
        super().on_message_begin()
        self.scope["extensions"] = {_EXTENSION: self._caller}  # type: ignore[dict-item]

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header is whole; trailers (RFC 9110, section 6.5) are not wanted."""
        if not self._in_head:
            raise ValueError("a trailer")
        if len(self.headers) >= _MOST_HEADERS:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole."""
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def _refuse_head(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(
                STATUS_LINE[431] + b"content-length: 0\r\nconnection: close\r\n\r\n"
            )
            self.transport.close()


class BoundedServer(uvicorn.Server):
    """uvicorn on a TLS port, with bounds for callers that are not known.

    Parameters
    ----------
    config : uvicorn.Config
        From :func:`bounded_config`.
    limits : ConnectionLimits
        The bounds.
    """

    def __init__(self, config: uvicorn.Config, limits: ConnectionLimits) -> None:
        super().__init__(config)
        self._table = Table(limits)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            self.should_exit = True
            return
        found = sockets or [listen(self.config.host, self.config.port)]
        self.servers: list[Any] = [_Listener(one, self._serve_connection) for one in found]
        self.started = True

    async def _serve_connection(self, accepted: socket.socket, address: str) -> None:
        task: Any = asyncio.current_task()
        caller = Unidentified(self._table, network_of(address), task.cancel)
        make = partial(
            BoundedHttp,
            caller,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        seconds = self._table.limits.seconds
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                make,
                accepted,
                ssl=self.config.ssl,
                ssl_handshake_timeout=seconds,
                ssl_shutdown_timeout=_LINGER_SECONDS,
            )
        except (OSError, asyncio.CancelledError):  # of ssl too
            caller.leave()
            accepted.close()


class _Listener:
    """Accepts connections; to uvicorn it is an ``asyncio.Server``."""

    def __init__(self, port: socket.socket, serve: Callable[[socket.socket, str], Any]) -> None:
        self._port, self._serve = port, serve
        self._connections: set[asyncio.Task[None]] = set()
        port.setblocking(False)
        self._task = asyncio.get_running_loop().create_task(self._accept())

    def close(self) -> None:
        """Accept no more, and drop who has not begun to ask."""
        self._task.cancel()
        self._port.close()
        for task in self._connections:
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait for what :meth:`close` cancelled."""
        await asyncio.gather(self._task, *self._connections, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(self._port)
            except OSError:
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(self._serve(accepted, address[0]))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)


def bounded_config(app: Any, certificate: Any, key: Any, **more: Any) -> uvicorn.Config:
    """A configuration of uvicorn for a :class:`BoundedServer`.

    Parameters
    ----------
    app : callable
        The ASGI application.
    certificate, key : Path
        PEM files.
    **more
        Further settings of uvicorn.
    """
    return uvicorn.Config(
        _closing(app),
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        ws="none",
        # Not "warning": a stranger's requests would write into the log.
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
        **more,
    )


def _closing(app: Any) -> Any:
    """The application, with one answer on a connection whose caller is not known."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        caller = _caller(scope)

        async def told(event: Any) -> None:
            if event["type"] == "http.response.start" and caller is not None and caller.counts:
                event = {**event, "headers": [*event.get("headers", []), CLOSE_HEADER]}
            await send(event)

        await app(scope, receive, told)

    return call


def host_and_port(address: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets (RFC 3986)."""
    host = address.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(address: str, port: int, where: str = "sites.port") -> socket.socket:
    """A socket that listens.

    Raises
    ------
    ServiceError
        The port is taken.
    """
    host = address.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError:
        raise taken(where, port) from None


def taken(where: str, port: int) -> ServiceError:
    """The error for a port that is taken."""
    return ServiceError(
        "a port of the service must be free, on an address of this machine",
        value=port,
        fix=f"End what listens there, or change {where}",
        where=where,
    )
