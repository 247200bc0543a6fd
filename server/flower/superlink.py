"""Flower's own SuperLink as a process, of which the network reaches only what hospitals need.

Fleet, Control and Runtime API of a SuperLink share one port, and without accounts anybody who
reaches the Control API may start a run. Here a guard stands before all of it: the network sees the
Fleet API (every call of which is signed by an enrolled key) and a health page; the Control API
needs a secret of this machine; the Runtime API answers this machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import os
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import uvicorn

from server.flower.asgi import App, Receive, Scope, Send

CONTROL_HEADER: Final = "x-fedward-control"
_OPEN: Final = ("/v1/fleet/", "/health")
_CONTROL: Final = "/v1/control/"
_RUNTIME: Final = "/v1/runtime/"
_LOOPBACK: Final = ("127.0.0.1", "::1")
# A hospital that asks for a run's files gets none, and no node enrols itself.
_CLOSED: Final = ("/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/get-fab")
# Longer than a hospital's pauses: a connection that is kept costs no new handshake.
_KEEP_ALIVE_SECONDS: Final = 75


@dataclass(frozen=True)
class LinkSettings:
    """What a SuperLink process needs to know.

    Attributes
    ----------
    host, port : str, int
        Where it listens for hospitals.
    certificate, key, ca : Path
        PEM files.
    database : Path
        Flower's own database.
    control_secret, runtime_secret : Path
        Files with this machine's secrets, readable by the service only.
    """

    host: str
    port: int
    certificate: Path
    key: Path
    ca: Path
    database: Path
    control_secret: Path
    runtime_secret: Path

    def command(self) -> list[str]:
        """Arguments of the process."""
        return [
            part
            for name, value in vars(self).items()
            for part in (f"--{name.replace('_', '-')}", str(value))
        ]


class Guard:
    """ASGI middleware that lets through what the network may ask for.

    Parameters
    ----------
    app : callable
        The SuperLink.
    secret : bytes
        What a caller of the Control API must show.
    """

    def __init__(self, app: App, secret: bytes) -> None:
        self._app, self._secret = app, secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 404 as if there were nothing."""
        if scope["type"] != "http" or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def _allowed(self, scope: Scope) -> bool:
        path = str(scope["path"])
        if path.startswith(_CONTROL):
            return self._knows_secret(scope)
        if path.startswith(_RUNTIME):
            client = scope.get("client") or ("",)
            return client[0] in _LOOPBACK
        return path.startswith(_OPEN) and path not in _CLOSED

    def _knows_secret(self, scope: Scope) -> bool:
        wanted = CONTROL_HEADER.encode()
        given = [value for name, value in scope["headers"] if name.lower() == wanted]
        return len(given) == 1 and hmac.compare_digest(given[0], self._secret)


class _Server(uvicorn.Server):
    """A server that lets go of held questions as soon as it is told to end."""

    def __init__(self, config: uvicorn.Config, parts: Any) -> None:
        super().__init__(config)
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

    from server.flower.parts import Parts
    from server.flower.state import Lifespan

    console_handler.setLevel("WARNING")
    app = create_app(_flower_settings(settings), Lifespan)
    parts = Parts(app, app.state.linkstate_factory.state)
    config = uvicorn.Config(
        Guard(parts, settings.control_secret.read_bytes().strip()),
        host=settings.host,
        port=settings.port,
        ssl_certfile=str(settings.certificate),
        ssl_keyfile=str(settings.key),
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=2,
    )
    _Server(config, parts).run()


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
        parse = {"str": str, "int": int}.get(str(kind), Path)
        parser.add_argument(f"--{name.replace('_', '-')}", type=parse, required=True)
    serve(LinkSettings(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
