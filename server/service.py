"""The service as a process: operator API, health, and a runner for each study."""

from __future__ import annotations

import argparse
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedward.console import log_to_stderr, stop_on_signals
from fedward.errors import ServiceError
from server.api.app import build_api
from server.api.health import Health
from server.config import ServerConfig, load_config
from server.dispatch import Dispatcher
from server.enrolment import Enrolment
from server.flower.control import Link
from server.registry import open_registry

_LOG = logging.getLogger("fedward.server")
_LOOK: Final = 1.0


def serve(path: Path, stop: threading.Event) -> None:
    """Serve until stopped.

    Raises
    ------
    FedwardError
        The registry, a key or a port cannot be used.
    """
    config = load_config(path)
    os.environ["FLWR_HOME"] = str(config.server.state / "flwr")
    registry = open_registry(config)
    secret = config.control_secret.read_bytes().strip()
    link = Link(config.superlink_address, config.tls.ca.read_bytes(), secret)
    enrolment = Enrolment(registry, link)
    found = Health(config, registry, link)
    api = uvicorn.Server(
        uvicorn.Config(
            build_api(config, enrolment, found), host=config.api.address,
            port=config.api.port, ssl_certfile=str(config.tls.certificate),
            ssl_keyfile=str(config.tls.key), access_log=False, log_level="warning",
            server_header=False, timeout_graceful_shutdown=2,
        )
    )  # fmt: skip
    api.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=api.run, name="api")
    thread.start()
    grpc_server = _serve_health(config, found, stop)
    threading.Thread(target=enrolment.keep, args=(stop,), daemon=True, name="enrolment").start()
    try:
        Dispatcher(path, registry).run(stop)
    finally:
        api.should_exit = True
        grpc_server.stop(1)
        thread.join(5)
        registry.close()
        link.close()


def _serve_health(config: ServerConfig, found: Health, stop: threading.Event) -> grpc.Server:
    """gRPC health (grpc.health.v1): SERVING only while a study could run."""
    server = grpc.server(ThreadPoolExecutor(4, "health"))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    pair = (config.tls.key.read_bytes(), config.tls.certificate.read_bytes())
    address = f"{config.api.address}:{config.api.health_port}"
    try:
        server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError:
        raise ServiceError(
            "the health service's port must be free", value=config.api.health_port,
            fix="Change api.health_port", where="api.health_port",
        ) from None  # fmt: skip
    server.start()
    status = health_pb2.HealthCheckResponse

    def look() -> None:
        while True:
            servicer.set("", status.SERVING if found.ready else status.NOT_SERVING)
            if stop.wait(_LOOK):
                servicer.set("", status.NOT_SERVING)
                return

    threading.Thread(target=look, daemon=True, name="health").start()
    return server


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description="The aggregator's service.")
    parser.add_argument("--config", type=Path, required=True)
    path = parser.parse_args().config
    log_to_stderr()
    stop = threading.Event()
    stop_on_signals(stop)
    serve(path, stop)


if __name__ == "__main__":
    main()
