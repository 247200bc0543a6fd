"""``fedward-client doctor``: everything that a hospital's part in a study depends on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from fedward_client.config import (
    SiteConfig,
    hidden_places,
    importer_hidden_places,
    trusted_places,
)
from fedward_client.daemon.isolation import find_network, find_readable, find_writable
from fedward_client.doctor.line import Line, Status
from fedward_client.doctor.machine import (
    connector_user,
    datasets,
    device,
    disk,
    memory,
    policy,
    wall_line,
    walls,
)

__all__ = ["Line", "Process", "Status", "examine", "worst"]
Process = Literal["trainer", "connector", "importer"]


def examine(config: SiteConfig, process: Process | None = None) -> Iterator[Line]:
    """Look at everything, one line after the other.

    Parameters
    ----------
    config : SiteConfig
        The site.
    process : str or None
        Look only at what this one needs, from within walls that are there already: in its
        container, or as its user. None: at all of it, and build the walls.
    """
    if process in (None, "importer"):
        yield from _inwards(config)
    if process == "importer":
        found = find_readable(importer_hidden_places(config))
        allowed = config.importer.allow_unconfined
        yield wall_line("importer and ledger", found, allowed=allowed)
        return
    if process != "trainer":
        yield from _outwards(config)
    if process == "connector":
        found = find_readable(hidden_places(config))
        yield wall_line(
            "connector and images", found, allowed=config.trainer.allow_unconfined_connector
        )
        yield wall_line("connector and code", find_writable(trusted_places(config)), allowed=True)
        return
    yield disk(config)
    yield memory()
    yield from device(config)
    if process == "trainer":
        allowed = config.trainer.allow_networked_trainer
        yield wall_line("trainer's network", find_network(), allowed=allowed)
    else:
        yield from walls(config)
        yield from connector_user(config)
    yield from datasets(config)
    yield from policy(config)


def _outwards(config: SiteConfig) -> Iterator[Line]:
    # Where only the trainer is installed, there is no Flower.
    from fedward_client.doctor.link import enrolment, network

    if config.server is None:
        yield Line(
            "aggregator", "fail", "site.toml has no [server]", "Add it: fedward-client enrol"
        )
        return
    yield from network(config.server)
    yield from enrolment(config.server)


def _inwards(config: SiteConfig) -> Iterator[Line]:
    if not config.pacs:
        return
    from fedward_client.doctor.pacs import examine_pacs

    for name, one in config.pacs.items():
        yield from examine_pacs(f"PACS {name}", one)


def worst(lines: Iterable[Line]) -> Status:
    """The gravest status of all."""
    found = {line.status for line in lines}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"
