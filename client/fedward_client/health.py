"""Whether one of the two processes is well: what a container's health check asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from fedward.errors import ConfigError, FedwardError
from fedward_client.config import SiteConfig
from fedward_client.link.state import link_file, read_state
from fedward_client.trainer.admin_client import admin_socket, ask

Which = Literal["trainer", "connector"]
# Heartbeats come every six seconds at most, and a connection breaks after three that failed.
_OLD: Final = 60.0


@dataclass(frozen=True)
class Health:
    """What was found.

    Attributes
    ----------
    process : str
        ``trainer`` or ``connector``.
    healthy : bool
        Whether it does what it is there for.
    found : str
        In words without path or address.
    """

    process: Which
    healthy: bool
    found: str


def examine(config: SiteConfig, which: Which) -> Health:
    """Ask the trainer on this machine, or read what the connector wrote last."""
    try:
        return _trainer(config) if which == "trainer" else _connector(config)
    except FedwardError as error:
        return Health(which, False, error.rule)


def _trainer(config: SiteConfig) -> Health:
    """Well when it answers and has no network, or is allowed one."""
    now = ask(admin_socket(config), "status")["trainer"]
    walls = now["walls"] or config.trainer.allow_networked_trainer
    return Health("trainer", walls, f"{now['doing']}; network: {now['network']}")


def _connector(config: SiteConfig) -> Health:
    """Well when trainer and aggregator both answer it."""
    if config.server is None:
        raise ConfigError(
            "the connector needs to know its aggregator",
            fix="Add [server] to site.toml",
            where="server",
        )
    link, age = read_state(link_file(config.server.state))
    if link.state == "online" and age > _OLD:
        return Health("connector", False, f"no sign of life for {age:.0f} s")
    well = link.state == "online" and link.trainer == "attached"
    return Health("connector", well, f"link {link.state}; trainer {link.trainer}")
