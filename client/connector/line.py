"""One connection to the aggregator, from its making to its break."""

from __future__ import annotations

import queue
import random
import threading
import time
from pathlib import Path
from typing import Final

from flwr.app import Message

from client.connector.attachment import Attachment
from client.connector.fleet import HEARTBEAT_SECONDS, Fleet, LinkDown, RunOver, Unreadable
from client.connector.orders import Orders
from client.link.state import touch
from fedward.errors import FedwardError, ProtocolError

_LOOK_SECONDS: Final = 0.1
# Of an aggregator that answers questions at once though it has nothing, as when it shuts down.
_BREATH_SECONDS: Final = 0.2
_MOST_LOST_BEATS: Final = 3


class Line:
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
        self, fleet: Fleet, orders: Orders, attachment: Attachment, idle_seconds: float
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
