"""The service's two ports: the operator API, and gRPC health."""

from __future__ import annotations

import logging
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedward.connections import BoundedServer, bounded_config, host_and_port, listen, taken
from fedward.errors import ConfigError, ServiceError
from fedward_server.api.health import Health
from fedward_server.config import ServerConfig

_LOG = logging.getLogger("fedward.server")
_LOOK: Final = 1.0
# A question names a service, in a few bytes; gRPC's own bound is 4 MiB, with compression too.
_MESSAGE_BYTES: Final = 4096
_STREAMS: Final = 8
_AGE_MS: Final = 60_000


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
        self._socket = listen(config.api.address, config.api.port, "api.port")
        self._server = BoundedServer(
            bounded_config(app, config.tls.certificate, config.tls.key), config.connection_limits
        )
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
    limits = config.connection_limits
    options = [
        # Without it two processes would share the port, and each answer for the other.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", _MESSAGE_BYTES),
        ("grpc.max_metadata_size", _MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", _STREAMS),
        ("grpc.max_allowed_incoming_connections", limits.total),
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.seconds)),
        ("grpc.max_connection_idle_ms", int(1000 * limits.seconds)),
        ("grpc.max_connection_age_ms", _AGE_MS),
        ("grpc.max_connection_age_grace_ms", int(1000 * limits.seconds)),
    ]
    server = grpc.server(ThreadPoolExecutor(4, "health"), options=options)
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    pair = (config.tls.key.read_bytes(), config.tls.certificate.read_bytes())
    address = host_and_port(config.api.address, config.api.health_port)
    try:
        server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError:
        raise taken("api.health_port", config.api.health_port) from None
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
            value=type(error).__name__,
            fix="Restore them from a backup with keys",
            where="tls",
        ) from None
