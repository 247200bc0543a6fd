"""Orders in hand: each is kept, carried to the trainer, and has its answer carried back."""

from __future__ import annotations

import hashlib
import logging
import math
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from flwr.app import Message

from client.connector import fleet as links
from client.connector.attachment import Attachment
from client.connector.fleet import Fleet, Unreadable
from client.connector.frozen import FrozenArrays, Lacking
from client.connector.inturn import InTurn
from client.connector.spool import InHand, Spool
from client.connector.translate import refusal, to_order, to_reply
from client.link.caller import TrainerGone
from client.link.packets import Packet
from fedward.errors import FedwardError, ProtocolError

_LOG = logging.getLogger("fedward.connector")
_PAIRS: Final = 4
_UNREADABLE: Final = "unreadable"
# Whoever sends more of them waits, and fills no disk here.
_MOST: Final = 16


class Orders:
    """What came and has no answer yet.

    Parameters
    ----------
    site : str
        The site's name.
    folder : Path
        Where they are kept over a kill.
    attachment : Attachment
        The trainer.
    """

    def __init__(self, site: str, folder: Path, attachment: Attachment) -> None:
        self._site, self._attachment, self._spool = site, attachment, Spool(folder)
        self._frozen = FrozenArrays(folder / "frozen")
        self._answers: queue.SimpleQueue[tuple[InHand, Packet]] = queue.SimpleQueue()
        self._unsent: list[tuple[InHand, Packet]] = []
        self._names: set[str] = set()
        self._waiting = InTurn()
        self._pool = ThreadPoolExecutor(_PAIRS, "order")

    @property
    def full(self) -> bool:
        """Whether no further one is taken now."""
        return len(self._names) >= _MOST

    def resume(self) -> None:
        """Go on with what an earlier process left behind."""
        for left in self._spool.left():
            self._take(left)

    def accept(self, message: Message) -> None:
        """Take a message into hand; one that is no order is refused."""
        self._attachment.state.messages += 1
        try:
            what, order = to_order(message, self._frozen)
        except Lacking as error:
            self._ask_for_arrays(message, error)
            return
        except ProtocolError as error:
            self.refuse(Unreadable(error, message))
            return
        self._take(_in_hand(message, what, order), keep=True)

    def _ask_for_arrays(self, message: Message, error: Lacking) -> None:
        """The trainer hears of the order once it is whole."""
        config = dict(message.content.config_records["config"])
        order = _in_hand(message, "train", Packet("order", config))
        if order.name not in self._names:
            self._names.add(order.name)
            self._answers.put((order, refusal(self._site, order.order, error)))

    def refuse(self, error: Unreadable) -> None:
        """The trainer hears of it first, so that its audit log has it; then the asker does."""
        _LOG.warning("a message could not be read: %s", error.rule)
        order = Packet("order", {_UNREADABLE: error.rule})
        # What is written down at the trainer comes in time, whatever its sender says of its time.
        self._take(replace(_in_hand(error.envelope, "describe", order), until=math.inf), keep=True)

    def note_garbage(self, error: ProtocolError) -> None:
        """Have the audit log say that something came that was no message at all."""
        _LOG.warning("an answer could not be read: %s", error.rule)
        with suppress(FedwardError):
            self._attachment.caller().ask("describe", Packet("order", {_UNREADABLE: error.rule}))

    def send_ready(self, fleet: Fleet, seconds: float) -> None:
        """Send an answer that is ready; waits so long for one.

        Raises
        ------
        LinkDown, LinkRefused
            The connection broke; it is sent over the next one.
        """
        if not self._unsent:
            with suppress(queue.Empty):
                self._unsent.append(self._answers.get(timeout=seconds))
        if self._unsent:
            self._send(fleet, *self._unsent[0])
            self._unsent.pop(0)

    def close(self) -> None:
        """Begin no further one; what is kept comes up again at the next start."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, order: InHand, *, keep: bool = False) -> None:
        if order.name in self._names:
            return
        self._names.add(order.name)
        if keep:
            self._spool.put(order)
        self._waiting.put(order)
        self._pool.submit(self._hand_on)

    def _hand_on(self) -> None:
        order = self._waiting.take()
        if time.time() > order.until:
            _LOG.info("an order waited until its round was over, and is not carried out")
            self._forget(order)
            return
        self._answers.put((order, self._answer(order)))

    def _answer(self, order: InHand) -> Packet:
        try:
            return self._asked(order)
        except FedwardError as error:
            _LOG.warning("the trainer gave no answer: %s", error.rule)
            return refusal(self._site, order.order, error)
        except Exception as error:
            _LOG.exception("an order could not be handed on")
            return refusal(
                self._site,
                order.order,
                FedwardError("an unexpected error stopped the connector", value=type(error)),
            )

    def _asked(self, order: InHand) -> Packet:
        while True:
            try:
                return self._attachment.caller().ask(order.what, order.order)
            except TrainerGone:
                # A round that broke off is lost; what must be written down waits for its writer.
                if _UNREADABLE not in order.order.record or self._attachment.stopping:
                    raise

    def _send(self, fleet: Fleet, order: InHand, answer: Packet) -> None:
        try:
            content = to_reply(answer, order.order)
        except FedwardError as error:
            content = to_reply(refusal(self._site, order.order, error), order.order)
        with suppress(links.RunOver):
            reply = links.reply_to(order.envelope, content)
            self._attachment.state.bytes_up += fleet.push(reply)
        self._forget(order)
        self._attachment.tell("online")

    def _forget(self, order: InHand) -> None:
        self._names.discard(order.name)
        self._spool.drop(order.name)


def _in_hand(message: Message, what: str, order: Packet) -> InHand:
    # A file name, whatever the aggregator calls it.
    name = hashlib.sha256(message.metadata.message_id.encode("utf-8", "replace")).hexdigest()
    # The two clocks may differ, so its time counts from here, where it is a little late.
    until = time.time() + message.metadata.ttl
    return InHand(name, links.seal(message), what, order, until)
