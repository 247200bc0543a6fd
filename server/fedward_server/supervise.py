"""Run the SuperLink and the service."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path

from fedward.child_process import supervise
from fedward.flower.link_settings import LinkSettings
from fedward_server.config import ServerConfig


def run_aggregator(config: ServerConfig, path: Path, stop: threading.Event) -> int:
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
    link = LinkSettings(
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
    python = [sys.executable, "-m"]
    commands = {
        "SuperLink": [*python, "fedward.flower.superlink", *link.command()],
        "service": [*python, "fedward_server.service", "--config", str(path)],
    }
    return supervise(commands, stop, logging.getLogger("fedward.server"), grace=15.0)
