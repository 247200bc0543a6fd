"""Hospitals in the registry and at the SuperLink; the registry says who there is.

Each change is first written where a try that breaks off does no harm, and what is left of one is
tidied up: at the service's start, and as soon as the SuperLink answers again.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from sqlalchemy.exc import InterfaceError, OperationalError

from fedward.errors import FedwardError, StudyError
from fedward.flower.control_client import ControlClient, Node, stored_key
from fedward_server.registry import Registry
from fedward_server.registry.sites import Site

_LOG = logging.getLogger("fedward.server")
_AGAIN: Final = 1.0
_LONGEST: Final = 60.0


class Enrolment:
    """Enrols hospitals, cuts them off, and makes the SuperLink know whom the registry knows.

    Parameters
    ----------
    registry : Registry
        Who there is.
    link : Link
        The SuperLink, which lets in whom it knows.
    """

    def __init__(self, registry: Registry, link: ControlClient) -> None:
        self.registry, self.link = registry, link
        # A hospital that one call enrols must not be tidied up by another.
        self._lock = threading.Lock()
        self._untidy = threading.Event()
        self._untidy.set()
        self._told: set[str] = set()

    def add(self, name: str, public_key: str, **limits: int | None) -> Site:
        """Enrol a hospital; where the SuperLink does not take its key, nothing has changed.

        Raises
        ------
        ConfigError
            The registry does not take name or key.
        StudyError
            The SuperLink does not take the key, or cannot be reached.
        """
        with self._lock:
            added = self.registry.sites.add(name, public_key, **limits)
            try:
                node = self._register(added.public_key, name)
            except BaseException:
                self.registry.sites.forget(name)
                raise
            return self.registry.sites.set_node(name, node)

    def remove(self, name: str) -> Site:
        """Cut a hospital off; the SuperLink forgets it now, or when it answers again.

        Raises
        ------
        ConfigError
            There is no such hospital.
        """
        with self._lock:
            removed = self.registry.sites.remove(name)
            self._let_go(removed.node_id)
            return removed

    def rotate(self, name: str, public_key: str) -> Site:
        """Take another key for a hospital (see :meth:`add` for errors)."""
        with self._lock:
            old = self.registry.sites.get(name)
            node = self._register(self.registry.sites.check_new(public_key), name)
            rotated = self.registry.sites.rotate(name, public_key, node)
            self._let_go(old.node_id)
            return rotated

    def reconcile(self) -> list[str]:
        """Enrol at the SuperLink whom it does not know, and end there who has left.

        One hospital's error does not stop the others; gives the names of the enrolled.

        Raises
        ------
        StudyError
            The SuperLink cannot be reached, or did not take everything.
        """
        with self._lock:
            known = _known(self.link)
            sites = self.registry.sites.list()
            missing = [site for site in sites if site.node_id not in known]
            done = [site.name for site in missing if self._try_enrol(site)]
            whole = len(done) == len(missing) and self._end_leftovers(known)
        for name in done:
            _LOG.info("%s was enrolled at the SuperLink again", name)
        if not whole:
            raise StudyError("the SuperLink must know the registry's sites", fix="See the log")
        return done

    def keep(self, stop: threading.Event) -> None:
        """Tidy up whenever there is something to, until stopped."""
        pause = _AGAIN
        while not stop.is_set():
            if self._untidy.is_set():
                self._untidy.clear()
                pause = _AGAIN if self._tidied() else min(2 * pause, _LONGEST)
            stop.wait(pause)

    def _tidied(self) -> bool:
        try:
            self.reconcile()
        except (FedwardError, OperationalError, InterfaceError):
            self._untidy.set()
            return False
        return True

    def _register(self, pem: str, name: str) -> int:
        """A key's number at the SuperLink, which may have it from a try that broke off."""
        wanted = stored_key(pem.encode())
        for node in _known(self.link).values():
            if node.public_key == wanted:
                return node.node_id
        return self.link.register(pem.encode(), name)

    def _try_enrol(self, site: Site) -> bool:
        try:
            node = self._register(site.public_key, site.name)
        except FedwardError as error:
            self._tell_once(f"{site.name}: {error}")
            return False
        self.registry.sites.set_node(site.name, node)
        return True

    def _let_go(self, node: int | None) -> None:
        # Without a number it may still be there, from a try that was killed.
        if node is None or not self._try_end(node):
            self._untidy.set()

    def _try_end(self, node: int) -> bool:
        """End a node; one that is not there has ended."""
        try:
            if node in _known(self.link):
                self.link.remove(node)
        except FedwardError as error:
            self._tell_once(str(error))
            return False
        return True

    def _end_leftovers(self, known: dict[int, Node]) -> bool:
        # A key that the registry never had waits for the next try of the call that broke off:
        # ended once, the SuperLink would never take it again. No study reaches its node.
        over = {
            stored_key(site.public_key.encode())
            for site in self.registry.sites.list(history=True)
            if site.state in ("removed", "rotated")
        }
        left = [number for number, node in known.items() if node.public_key in over]
        return not [number for number in left if not self._try_end(number)]

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            _LOG.warning("the SuperLink did not take a change: %s", text)


def _known(link: ControlClient) -> dict[int, Node]:
    return {node.node_id: node for node in link.nodes() if node.status != "unregistered"}
