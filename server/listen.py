"""The service's two ports: the operator API, and gRPC health."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedward.errors import ConfigError, ServiceError
from server.api.health import Health
from server.config import ServerConfig

_LOG = logging.getLogger("fedward.server")
_LOOK: Final = 1.0
_BACKLOG: Final = 2048


class ApiThread:
    """The operator API in a thread; where that ends by itself, the service is told to stop.

    Parameters
    ----------
    config : ServerConfig
        Where it listens.
    app : callable
        The application.
    stop : threading.Event
        Is set when the thread ends.

    Raises
    ------
    ServiceError
        The port is taken.
    """

    def __init__(self, config: ServerConfig, app: Any, stop: threading.Event) -> None:
        self._stop = stop
        self._socket = _listen(config.api.address, config.api.port)
        self._server = uvicorn.Server(_uvicorn(config, app))
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._run, name="api")
        self._thread.start()

    def end(self) -> None:
        """Answer what was asked, and end.

        Raises
        ------
        ServiceError
            It had ended by itself.
        """
        itself = self._server.should_exit or not self._thread.is_alive()
        self._server.should_exit = True
        self._thread.join(5)
        if itself:
            raise ServiceError("the operator API must go on", fix="See the log before this line")

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except Exception as error:
            _LOG.error("the operator API broke: %s", type(error).__name__)
        finally:
            self._socket.close()
            self._stop.set()


def serve_health(config: ServerConfig, found: Health, stop: threading.Event) -> grpc.Server:
    """gRPC health (grpc.health.v1): SERVING only while a study could run.

    Raises
    ------
    ServiceError
        The port is taken.
    """
    # Without the option two processes would share the port, and each answer for the other.
    options = [("grpc.so_reuseport", 0)]
    server = grpc.server(ThreadPoolExecutor(4, "health"), options=options)
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    pair = (config.tls.key.read_bytes(), config.tls.certificate.read_bytes())
    address = f"{config.api.address}:{config.api.health_port}"
    try:
        server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError:
        raise _taken("api.health_port", config.api.health_port) from None
    server.start()
    threading.Thread(target=_look, args=(servicer, found, stop), daemon=True, name="health").start()
    return server


def _look(servicer: Any, found: Health, stop: threading.Event) -> None:
    status = health_pb2.HealthCheckResponse
    while True:
        servicer.set("", status.SERVING if found.ready else status.NOT_SERVING)
        if stop.wait(_LOOK):
            servicer.set("", status.NOT_SERVING)
            return


def check_tls(config: ServerConfig) -> None:
    """See that certificate, key and authority can be used, before anybody is told of a port.

    Raises
    ------
    ConfigError
        They cannot.
    """
    context, tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config.tls
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        context.load_verify_locations(tls.ca)
    except OSError as error:  # of ssl too
        raise ConfigError(
            "certificate and key must be PEM files that belong together, the authority one too",
            value=type(error).__name__, fix="Restore them from a backup with keys", where="tls",
        ) from None  # fmt: skip


def _uvicorn(config: ServerConfig, app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app, ssl_certfile=str(config.tls.certificate), ssl_keyfile=str(config.tls.key),
        access_log=False, log_level="warning", server_header=False, timeout_graceful_shutdown=2,
    )  # fmt: skip


def _listen(address: str, port: int) -> socket.socket:
    host = address.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError:
        raise _taken("api.port", port) from None


def _taken(key: str, port: int) -> ServiceError:
    return ServiceError(
        "a port of the service must be free, on an address of this machine", value=port,
        fix=f"End what listens there, or change {key}", where=key,
    )  # fmt: skip
