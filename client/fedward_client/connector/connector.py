"""The connector: keeps the link to the aggregator, and carries orders to the trainer and back."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

from fedward.console import wait_until
from fedward.errors import FedwardError, ProtocolError
from fedward.flower.fleet_client import (
    HEARTBEAT_SECONDS,
    FleetClient,
    LeaseHeld,
    LinkDown,
    LinkRefused,
    RunOver,
    Unreadable,
)
from fedward.https import read_ca
from fedward_client.config import ServerSection
from fedward_client.connector.inbox import Inbox
from fedward_client.connector.trainer_session import TrainerSession
from fedward_client.link.state import CERTIFICATE_DAYS, touch

# One connection to the aggregator, from its making to its break.

_LOOK_SECONDS: Final = 0.1
# Of an aggregator that answers questions at once though it has nothing, as when it shuts down.
_BREATH_SECONDS: Final = 0.2
_MOST_LOST_BEATS: Final = 3


class Connection:
    """What goes on while a site is online: beats, questions, answers.

    Parameters
    ----------
    fleet : Fleet
        The connection, online.
    orders : Orders
        What is in hand.
    attachment : Attachment
        The trainer.
    idle_seconds : float
        How long a question for orders may wait for its answer.
    """

    def __init__(
        self, fleet: FleetClient, orders: Inbox, attachment: TrainerSession, idle_seconds: float
    ) -> None:
        self._fleet, self._orders, self._attachment = fleet, orders, attachment
        self._idle = idle_seconds
        self._broken: queue.SimpleQueue[FedwardError] = queue.SimpleQueue()
        self._quiet = threading.Event()

    def hold(self, stop: threading.Event) -> None:
        """Work until told to stop.

        Raises
        ------
        FedwardError
            What broke the connection.
        """
        try:
            for work in (self._beat, self._listen):
                threading.Thread(target=work, daemon=True, name="link").start()
            while not stop.is_set() and self._broken.empty():
                self._attachment.look(self._quiet)
                self._orders.send_ready(self._fleet, _LOOK_SECONDS)
            if not self._broken.empty():
                raise self._broken.get()
        finally:
            self._quiet.set()

    def _beat(self) -> None:
        """Heartbeats until the connection ends; several in a row that fail end it."""
        file: Path = self._attachment.file
        failed = 0
        while not self._quiet.wait(HEARTBEAT_SECONDS * random.uniform(0.4, 0.6)):
            try:
                self._fleet.beat()
                touch(file)
                failed = 0
            except LinkDown as error:
                failed += 1
                if failed == _MOST_LOST_BEATS:
                    self._broken.put(error)
                    return
            except FedwardError as error:
                self._broken.put(error)
                return

    def _listen(self) -> None:
        """Take messages as they come, until the connection ends."""
        while not self._quiet.is_set():
            if self._orders.full:
                self._quiet.wait(_LOOK_SECONDS)
                continue
            try:
                self._ask()
            except RunOver:
                continue
            except Unreadable as error:
                self._orders.refuse(error)
                self._confirm(error.envelope)
            except ProtocolError as error:
                # No message, so nobody to answer; who sends that is not asked again at once.
                self._orders.note_garbage(error)
                self._broken.put(LinkDown(error.rule, fix="Tell the aggregator's operator"))
                return
            except FedwardError as error:
                self._broken.put(error)
                return
            except Exception as error:
                # A connection that is let go of breaks in this thread in any way it likes.
                self._broken.put(
                    LinkDown("a question must be answered", value=type(error).__name__)
                )
                return

    def _ask(self) -> None:
        """One question, and what comes of it."""
        asked = time.monotonic()
        message = self._fleet.pull(self._idle)
        if message is None:
            self._quiet.wait(max(0.0, asked + _BREATH_SECONDS - time.monotonic()))
        elif not self._quiet.is_set():  # else it comes again
            self._orders.accept(message)
            self._fleet.confirm(message)

    def _confirm(self, message: Message) -> None:
        try:
            self._fleet.confirm(message)
        except FedwardError as error:
            self._broken.put(error)


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
        self._attachment = TrainerSession(
            self.socket, self.version, self.isolation, folder, self.stop
        )
        self._orders = Inbox(self.site, folder / "spool", self._attachment)

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
        fleet = FleetClient(self.server.address, ca, self.key, most)
        try:
            self._remember(fleet.activate(self._known_as()))
            self._attachment.state.clock_seconds = round(fleet.clock_seconds)
            self._note_certificate(fleet.certificate_ends, ca)
            self._attachment.tell("online")
            line = Connection(fleet, self._orders, self._attachment, self.server.idle_seconds)
            line.hold(self.stop)
            fleet.close()
        finally:
            fleet.drop()

    def _note_certificate(self, ends: float | None, ca: bytes) -> None:
        """Tell weeks before that the aggregator will have no valid certificate."""
        authority = min(one.not_valid_after_utc for one in x509.load_pem_x509_certificates(ca))
        last = min(authority.timestamp(), ends or authority.timestamp())
        days = int((last - time.time()) // 86400)
        self._attachment.state.certificate_days = days
        if days < CERTIFICATE_DAYS:
            _LOG.warning("the aggregator's certificate ends in %d days; it must be renewed", days)

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
