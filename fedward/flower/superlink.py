"""Flower's SuperLink as a process, with only the APIs that hospitals need on the network.

Fleet, Control and Runtime API of a SuperLink share one port (:mod:`fedward.flower.guard` says who
reaches which of them), and callers that are not known hold little of it
(:mod:`fedward.connections`).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Final

from fedward.startup import prepare

if __name__ == "__main__":
    prepare()  # before Flower and torch are imported

import uvicorn

from fedward.connections import BoundedServer, ConnectionLimits, bounded_config
from fedward.console import log_to_stderr
from fedward.errors import ServiceError
from fedward.flower.guard import Guard
from fedward.flower.link_settings import LinkSettings

# Longer than a hospital's pauses: a connection that is kept costs no new handshake.
_KEEP_ALIVE_SECONDS: Final = 75


class _Server(BoundedServer):
    """A server that lets go of held questions as soon as it is told to end."""

    def __init__(self, config: uvicorn.Config, limits: ConnectionLimits, parts: Any) -> None:
        super().__init__(config, limits)
        self._parts = parts

    async def serve(self, sockets: Any = None) -> None:
        """Serve until told to end."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._parts.close)


def serve(settings: LinkSettings) -> None:
    """Run the SuperLink until a signal ends it."""
    from flwr.supercore.logger import console_handler
    from flwr.superlink.main import create_app

    from fedward.flower.batch_middleware import BatchMiddleware
    from fedward.flower.link_state import Lifespan

    console_handler.setLevel("WARNING")
    app = create_app(_flower_settings(settings), Lifespan)
    state = app.state.linkstate_factory.state
    parts = BatchMiddleware(app, state)
    config = bounded_config(
        Guard(parts, settings.control_secret.read_bytes().strip(), state),
        settings.certificate,
        settings.key,
        host=settings.host,
        port=settings.port,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    limits = ConnectionLimits(
        settings.unauthenticated_connections,
        settings.unauthenticated_connections_per_network,
        settings.unauthenticated_seconds,
    )
    _Server(config, limits, parts).run()


def _flower_settings(settings: LinkSettings) -> Any:
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin

    files = (settings.ca, settings.certificate, settings.key)
    ca, certificate, key = (path.read_bytes() for path in files)
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=settings.host,
        port=settings.port,
        insecure=False,
        certificates=(ca, certificate, key),
        superexec_auth_secret=settings.runtime_secret.read_bytes().strip(),
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(settings.ca),
        ssl_certfile=str(settings.certificate),
        ssl_keyfile=str(settings.key),
        database=str(settings.database),
        isolation="process",
        runtime_dependency_install=False,
    )


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description="Flower's SuperLink behind a guard.")
    for name, kind in LinkSettings.__annotations__.items():
        parse = {"str": str, "int": int, "float": float}.get(str(kind), Path)
        parser.add_argument(f"--{name.replace('_', '-')}", type=parse, required=True)
    try:
        serve(LinkSettings(**vars(parser.parse_args())))
    except ServiceError as error:
        log_to_stderr()
        logging.getLogger("fedward.server").error("%s", error)
        sys.exit(1)  # whoever supervises it tries again


if __name__ == "__main__":
    main()
