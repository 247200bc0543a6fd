"""The connector as a process: proves that it sees no image, then keeps the link."""

from __future__ import annotations

import logging
import os
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedward.console import stop_on_signals
from fedward.errors import ConfigError
from fedward.https import read_ca, use_proxy
from fedward_client.config import SiteConfig, hidden_places, trusted_places
from fedward_client.connector.connector import Connector
from fedward_client.daemon.isolation import find_readable, find_writable, undumpable

_LOG = logging.getLogger("fedward.connector")
KEY_NAME: Final = "site.key"


def run_connector(config: SiteConfig, stop: threading.Event | None = None) -> None:
    """Work until a signal comes.

    Raises
    ------
    ConfigError
        `[server]` is missing, or the key cannot be read.
    """
    server = config.server
    if server is None:
        raise ConfigError(
            "the connector needs to know its aggregator",
            fix="Add [server] to site.toml",
            where="server",
        )
    undumpable()
    stop = stop or threading.Event()
    stop_on_signals(stop)
    os.environ["FLWR_HOME"] = str(server.state / "flwr")
    use_proxy(server)
    read_ca(server)
    found = find_readable(hidden_places(config))
    if not found.holds:
        _LOG.warning("THE CONNECTOR CAN READ IMAGES: %s", found.text)
    if not find_writable(trusted_places(config)).holds:
        _LOG.warning("the connector can change what it runs; see fedward-client doctor")
    Connector(
        site=config.site.name,
        server=server,
        socket=config.trainer.socket,
        key=read_key(server.state / KEY_NAME),
        isolation=found.text,
        version=version("fedward"),
        stop=stop,
    ).run()


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The site's key.

    Raises
    ------
    ConfigError
        There is none, or others can read it.
    """
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
        key = load_pem_private_key(content, None)
    except (OSError, ValueError, TypeError):
        key, mode = None, 0o600
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            "the site's key must be there and readable",
            fix="Make one: fedward-client enrol",
            where="server.state",
        )
    if mode & 0o077:
        raise ConfigError(
            "the site's key must be readable by its owner only",
            fix="chmod 600 site.key",
            where="server.state",
        )
    return key
