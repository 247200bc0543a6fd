"""Make the SuperLink know the hospitals that the registry knows."""

from __future__ import annotations

import logging
import threading
from typing import Final

from fedward.errors import FedwardError
from server.flower.control import Link
from server.registry import Registry

_LOG = logging.getLogger("fedward.server")
_AGAIN: Final = 1.0


def reconcile(registry: Registry, link: Link) -> list[str]:
    """Enrol at the SuperLink whom it does not know, as after a restore; gives their names.

    Raises
    ------
    StudyError
        The SuperLink cannot be reached.
    """
    known = {node.node_id for node in link.nodes() if node.status != "unregistered"}
    missing = [site for site in registry.sites.list() if site.node_id not in known]
    for site in missing:
        registry.sites.set_node(site.name, link.register(site.public_key.encode(), site.name))
    return [site.name for site in missing]


def reconcile_when_ready(registry: Registry, link: Link, stop: threading.Event) -> None:
    """Do it as soon as the SuperLink answers."""
    while not stop.is_set():
        try:
            for name in reconcile(registry, link):
                _LOG.info("%s was enrolled at the SuperLink again", name)
        except FedwardError:
            stop.wait(_AGAIN)
        else:
            return
