"""The connector: keeps the link to the aggregator, and carries orders to the trainer and back."""

from __future__ import annotations

import hashlib
import logging
import math
import queue
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

from client.connector import fleet as links
from client.connector.fleet import (
    HEARTBEAT_SECONDS,
    Fleet,
    LeaseHeld,
    LinkDown,
    LinkRefused,
    Unreadable,
)
from client.connector.spool import InHand, Spool
from client.connector.translate import refusal, to_order, to_reply
from client.connector.wire import read_ca
from client.daemon.settings import ServerSection
from client.link.caller import Caller, TrainerGone, TrainerTaken
from client.link.packets import Packet
from client.link.state import MOST_TEXT, LinkState, link_file, touch, write_state
from fedward.console import wait_until
from fedward.errors import FedwardError, ProtocolError

_LOG = logging.getLogger("fedward.connector")
_PAIRS: Final = 4
# Orders in hand; whoever sends more of them waits, and fills no disk here.
_MOST_IN_HAND: Final = 16
_LOOK_SECONDS: Final = 0.1
# Of an aggregator that answers questions at once though it has nothing, as when it shuts down.
_BREATH_SECONDS: Final = 0.2
# A trainer that starts imports a lot, and opens ledger and audit log.
_TRAINER_SECONDS: Final = 120.0
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
        self._spool = Spool(self.server.state / "spool")
        self._state = LinkState(isolation=self.isolation[:MOST_TEXT], since=time.time())
        self._file = link_file(self.server.state)
        self._replies: queue.SimpleQueue[tuple[InHand, Packet]] = queue.SimpleQueue()
        self._unsent: list[tuple[InHand, Packet]] = []
        self._pool = ThreadPoolExecutor(_PAIRS, "order")
        self._in_hand: set[str] = set()
        self._caller: Caller | None = None
        self._calling = threading.Lock()
        self._attaching = Future[None]()
        self._attaching.set_result(None)

    def run(self) -> None:
        """Work until stopped; a broken link or trainer is waited for, for ever."""
        for left in self._spool.left():
            self._take(left)
        link = threading.Thread(target=self._keep, daemon=True, name="link")
        link.start()
        wait_until(self.stop)
        link.join(_GOODBYE)
        self._tell("stopped")
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._caller:
            self._caller.close()

    def _keep(self) -> None:
        """Connect again and again."""
        attempt = 0
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                self._connected()
            except FedwardError as error:
                self._tell(_state_of(error), error)
            except Exception:
                _LOG.exception("an unexpected error broke the link")
                self._tell(
                    "down", LinkDown("an unexpected error broke the link", fix="See its log")
                )
            if time.monotonic() - began > self.server.retry_seconds:
                attempt = 0
            attempt += 1
            self.stop.wait(_pause(attempt, self.server.retry_seconds))

    def _connected(self) -> None:
        """One connection, from its making to its break."""
        # Who is online is asked; without a trainer there would be no answer.
        self._caller_now()
        ca, most = read_ca(self.server), self.server.max_download_mib << 20
        fleet = Fleet(self.server.address, ca, self.key, most)
        broken: queue.SimpleQueue[FedwardError] = queue.SimpleQueue()
        quiet = threading.Event()
        try:
            self._remember(fleet.activate(self._known_as()))
            self._state.clock_seconds = round(fleet.clock_seconds)
            self._tell("online")
            for work in (partial(_beat, file=self._file), self._listen):
                threading.Thread(
                    target=work, args=(fleet, quiet, broken), daemon=True, name="link"
                ).start()
            while not self.stop.is_set() and broken.empty():
                if self._caller and self._caller.gone.is_set() and self._attaching.done():
                    self._attaching = self._pool.submit(self._attach_again, quiet)
                self._send_ready(fleet)
            if not broken.empty():
                raise broken.get()
            fleet.close()
        finally:
            quiet.set()
            fleet.drop()

    def _listen(
        self, fleet: Fleet, quiet: threading.Event, broken: queue.SimpleQueue[FedwardError]
    ) -> None:
        """Take messages as they come, until the connection ends."""
        while not quiet.is_set():
            if len(self._in_hand) >= _MOST_IN_HAND:
                quiet.wait(_LOOK_SECONDS)
                continue
            asked = time.monotonic()
            try:
                message = fleet.pull(self.server.idle_seconds)
                if message is None:
                    early = asked + _BREATH_SECONDS - time.monotonic()
                    quiet.wait(max(0.0, early))
                elif not quiet.is_set():  # else it comes again
                    self._accept(message)
                    fleet.confirm(message)
            except links.RunOver:
                continue
            except Unreadable as error:
                self._refuse(error)
                self._confirm(fleet, error.envelope, broken)
            except ProtocolError as error:
                # No message, so nobody to answer; who sends that is not asked again at once.
                self._note_garbage(error)
                broken.put(LinkDown(error.rule, fix="Tell the aggregator's operator"))
                return
            except FedwardError as error:
                broken.put(error)
                return
            except Exception as error:
                # A connection that is let go of breaks in this thread in any way it likes.
                broken.put(LinkDown("a question must be answered", value=type(error).__name__))
                return

    def _confirm(
        self, fleet: Fleet, message: Message, broken: queue.SimpleQueue[FedwardError]
    ) -> None:
        try:
            fleet.confirm(message)
        except FedwardError as error:
            broken.put(error)

    def _send_ready(self, fleet: Fleet) -> None:
        """Send what is ready; waits a moment for it."""
        if not self._unsent:
            with suppress(queue.Empty):
                self._unsent.append(self._replies.get(timeout=_LOOK_SECONDS))
        if self._unsent:
            self._send(fleet, *self._unsent[0])
            self._unsent.pop(0)

    def _accept(self, message: Message) -> None:
        self._state.messages += 1
        try:
            what, order = to_order(message)
        except ProtocolError as error:
            self._refuse(Unreadable(error, message))
            return
        self._take(_in_hand(message, what, order), keep=True)

    def _refuse(self, error: Unreadable) -> None:
        """The trainer hears of it first, so that its audit log has it; then the asker does."""
        _LOG.warning("a message could not be read: %s", error.rule)
        order = Packet("order", {"unreadable": error.rule})
        # What is written down at the trainer comes in time, whatever its sender says of its time.
        self._take(replace(_in_hand(error.envelope, "describe", order), until=math.inf), keep=True)

    def _take(self, message: InHand, *, keep: bool = False) -> None:
        if message.name in self._in_hand:
            return
        self._in_hand.add(message.name)
        if keep:
            self._spool.put(message)
        self._pool.submit(self._ask, message)

    def _ask(self, message: InHand) -> None:
        if time.time() > message.until:
            _LOG.info("an order waited until its round was over, and is not carried out")
            self._forget(message)
            return
        try:
            answer = self._caller_now().ask(message.what, message.order)
        except FedwardError as error:
            _LOG.warning("the trainer gave no answer: %s", error.rule)
            answer = refusal(self.site, message.order, error)
        except Exception as error:
            _LOG.exception("an order could not be handed on")
            answer = refusal(
                self.site, message.order,
                FedwardError("an unexpected error stopped the connector", value=type(error)),
            )  # fmt: skip
        self._replies.put((message, answer))

    def _send(self, fleet: Fleet, message: InHand, answer: Packet) -> None:
        try:
            content = to_reply(answer, message.order)
        except FedwardError as error:
            content = to_reply(refusal(self.site, message.order, error), message.order)
        with suppress(links.RunOver):
            self._state.bytes_up += fleet.push(links.reply_to(message.envelope, content))
        self._forget(message)
        self._tell("online")

    def _forget(self, message: InHand) -> None:
        self._in_hand.discard(message.name)
        self._spool.drop(message.name)

    def _note_garbage(self, error: ProtocolError) -> None:
        _LOG.warning("an answer could not be read: %s", error.rule)
        with suppress(FedwardError):
            self._caller_now().ask("describe", Packet("order", {"unreadable": error.rule}))

    def _caller_now(self) -> Caller:
        """The trainer, waited for while it starts again."""
        with self._calling:
            end = time.monotonic() + _TRAINER_SECONDS
            while self._caller is None or self._caller.gone.is_set():
                try:
                    self._caller = Caller(self.socket, self.version, self.isolation)
                    self._state.trainer = "attached"
                    self._caller.tell(self._state)
                except (TrainerGone, TrainerTaken) as error:
                    self._state.trainer = "gone"
                    self._tell("waiting for the trainer", error)
                    if time.monotonic() > end or self.stop.wait(0.2):
                        raise
            return self._caller

    def _attach_again(self, quiet: threading.Event) -> None:
        """A trainer that started again hears of its connector now, and not with the next order."""
        with suppress(FedwardError):
            self._caller_now()
            if not quiet.is_set():
                self._tell("online")

    def _tell(self, state: str, error: FedwardError | None = None) -> None:
        if state != self._state.state:
            self._state.since = time.time()
            if error:
                _LOG.warning("%s", error)
            else:
                _LOG.info("the link is %s", state)
        self._state.state = state
        self._state.last_error = str(error)[:MOST_TEXT] if error else self._state.last_error
        write_state(self._file, self._state)
        if self._caller and not self._caller.gone.is_set():
            with suppress(TrainerGone):
                self._caller.tell(self._state)

    def _known_as(self) -> int:
        with suppress(OSError, ValueError):
            return int((self.server.state / "node").read_text())
        return 0

    def _remember(self, node: int) -> None:
        self._state.node_id = str(node)
        with suppress(OSError):
            (self.server.state / "node").write_text(str(node))


def _beat(
    fleet: Fleet, quiet: threading.Event, broken: queue.SimpleQueue[FedwardError], file: Path
) -> None:
    """Heartbeats until the connection ends; one that fails three times ends it."""
    failed = 0
    while not quiet.wait(HEARTBEAT_SECONDS * random.uniform(0.4, 0.6)):
        try:
            fleet.beat()
            touch(file)
            failed = 0
        except LinkDown as error:
            failed += 1
            if failed == 3:
                broken.put(error)
                return
        except FedwardError as error:
            broken.put(error)
            return


def _in_hand(message: Message, what: str, order: Packet) -> InHand:
    # A file name, whatever the aggregator calls it.
    name = hashlib.sha256(message.metadata.message_id.encode("utf-8", "replace")).hexdigest()
    # The two clocks may differ, so its time counts from here, where it is a little late.
    until = time.time() + message.metadata.ttl
    return InHand(name, links.seal(message), what, order, until)


def _state_of(error: FedwardError) -> str:
    return {LinkRefused: "refused", LeaseHeld: "waiting for an old connection to lapse"}.get(
        type(error), "down"
    )


def _pause(attempt: int, most: float) -> float:
    """Full jitter over an exponential back-off, so that hospitals do not come back at once."""
    return random.uniform(0.1, 1.0) * min(most, 0.25 * 2.0 ** min(attempt, 16))
