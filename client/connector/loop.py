"""The connector: keeps the link to the aggregator, and carries orders to the trainer and back."""

from __future__ import annotations

import logging
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from client.connector.attachment import Attachment
from client.connector.fleet import Fleet, LeaseHeld, LinkDown, LinkRefused
from client.connector.line import Line
from client.connector.orders import Orders
from client.connector.wire import read_ca
from client.daemon.settings import ServerSection
from fedward.console import wait_until
from fedward.errors import FedwardError

_LOG = logging.getLogger("fedward.connector")
# What a stop gives the link to sign off; a dead network may hold it for much longer.
_GOODBYE: Final = 3.0


@dataclass
class Connector:
    """A hospital's connector.

    Attributes
    ----------
    site : str
        The site's name.
    server : ServerSection
        The aggregator.
    socket : Path
        The trainer's.
    key : EllipticCurvePrivateKey
        The site's.
    isolation : str
        What the process found when it tried to read the images.
    version : str
        Fedward's release.
    stop : threading.Event
        Ends it.
    """

    site: str
    server: ServerSection
    socket: Path
    key: ec.EllipticCurvePrivateKey
    isolation: str
    version: str
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        folder = self.server.state
        self._attachment = Attachment(self.socket, self.version, self.isolation, folder, self.stop)
        self._orders = Orders(self.site, folder / "spool", self._attachment)

    def run(self) -> None:
        """Work until stopped; a broken link or trainer is waited for, for ever."""
        # What a killed one wrote last would pass for this one's.
        self._attachment.tell("starting")
        self._orders.resume()
        link = threading.Thread(target=self._keep, daemon=True, name="link")
        link.start()
        wait_until(self.stop)
        link.join(_GOODBYE)
        self._attachment.tell("stopped")
        self._orders.close()
        self._attachment.close()

    def _keep(self) -> None:
        """Connect again and again."""
        attempt = 0
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                self._connected()
            except FedwardError as error:
                self._attachment.tell(_state_of(error), error)
            except Exception:
                _LOG.exception("an unexpected error broke the link")
                unknown = LinkDown("an unexpected error broke the link", fix="See its log")
                self._attachment.tell("down", unknown)
            if time.monotonic() - began > self.server.retry_seconds:
                attempt = 0
            attempt += 1
            self.stop.wait(_pause(attempt, self.server.retry_seconds))

    def _connected(self) -> None:
        """One connection, from its making to its break."""
        # Who is online is asked; without a trainer there would be no answer.
        self._attachment.caller()
        ca, most = read_ca(self.server), self.server.max_download_mib << 20
        fleet = Fleet(self.server.address, ca, self.key, most)
        try:
            self._remember(fleet.activate(self._known_as()))
            self._attachment.state.clock_seconds = round(fleet.clock_seconds)
            self._attachment.tell("online")
            line = Line(fleet, self._orders, self._attachment, self.server.idle_seconds)
            line.hold(self.stop)
            fleet.close()
        finally:
            fleet.drop()

    def _known_as(self) -> int:
        with suppress(OSError, ValueError):
            return int((self.server.state / "node").read_text())
        return 0

    def _remember(self, node: int) -> None:
        self._attachment.state.node_id = str(node)
        with suppress(OSError):
            (self.server.state / "node").write_text(str(node))


def _state_of(error: FedwardError) -> str:
    return {LinkRefused: "refused", LeaseHeld: "waiting for an old connection to lapse"}.get(
        type(error), "down"
    )


def _pause(attempt: int, most: float) -> float:
    """Full jitter over an exponential back-off, so that hospitals do not come back at once."""
    return random.uniform(0.1, 1.0) * min(most, 0.25 * 2.0 ** min(attempt, 16))
