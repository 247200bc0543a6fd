"""Start the SuperLink and the service, and start again what ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedward.child_process import end_with_parent
from fedward.flower.superlink import LinkSettings
from fedward_server.config import ServerConfig

_LOG = logging.getLogger("fedward.server")
_CALM: Final = 60.0
_LONGEST: Final = 30.0
_GRACE: Final = 15.0
# What is wrong with the configuration, another try does not change.
_HOPELESS: Final = frozenset({2, 19})


@dataclass
class Child:
    """A process that is kept running."""

    name: str
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    not_before: float = 0.0

    def look(self) -> int:
        """Start it if it does not run; an exit code that ends everything, or 0."""
        code = None if self.process is None else self.process.poll()
        if code is not None:
            if code in _HOPELESS:
                return code
            self._plan_next(code)
        if self.process is None and time.monotonic() >= self.not_before:
            promise = end_with_parent(signal.SIGTERM)
            self.process = subprocess.Popen(list(self.command), preexec_fn=promise)
            self.started = time.monotonic()
        return 0

    def _plan_next(self, code: int) -> None:
        calm = time.monotonic() - self.started > _CALM
        self.failures = 1 if calm else self.failures + 1
        pause = min(_LONGEST, 0.2 * 2.0 ** (self.failures - 1)) if self.failures > 1 else 0.0
        _LOG.warning("the %s ended (%d); it starts again in %.1f s", self.name, code, pause)
        self.process, self.not_before = None, time.monotonic() + pause


def supervise(config: ServerConfig, path: Path, stop: threading.Event) -> int:
    """Keep SuperLink and service running until stopped; gives the exit code.

    Parameters
    ----------
    config, path : ServerConfig, Path
        The aggregator, and where its configuration lies.
    stop : threading.Event
        Ends both.
    """
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_HOME"] = str(config.server.state / "flwr")
    python = sys.executable
    children = [
        Child("SuperLink", [python, "-m", "fedward.flower.superlink", *link_of(config).command()]),
        Child("service", [python, "-m", "fedward_server.service", "--config", str(path)]),
    ]
    try:
        while not stop.wait(0.1):
            for child in children:
                if code := child.look():
                    return code
    finally:
        _end([child.process for child in children if child.process is not None])
    return 0


def link_of(config: ServerConfig) -> LinkSettings:
    """The SuperLink of a configuration."""
    return LinkSettings(
        host=config.sites.address,
        port=config.sites.port,
        certificate=config.tls.certificate,
        key=config.tls.key,
        ca=config.tls.ca,
        database=config.superlink_database,
        control_secret=config.control_secret,
        runtime_secret=config.runtime_secret,
        unauthenticated_connections=config.limits.unauthenticated_connections,
        unauthenticated_connections_per_network=(
            config.limits.unauthenticated_connections_per_network
        ),
        unauthenticated_seconds=config.limits.unauthenticated_seconds,
    )


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    for process in reversed(running):
        process.terminate()
    end = time.monotonic() + _GRACE
    for process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
