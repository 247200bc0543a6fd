"""Orders in hand: each is kept, carried to the trainer, and has its answer carried back."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from flwr.app import Message

from fedward.errors import FedwardError, ProtocolError
from fedward.files import replace_file, sweep_partial
from fedward.flower import fleet_client
from fedward.flower.fleet_client import FleetClient, Unreadable
from fedward.rule_codes import RuleCode
from fedward.tensors import PackedArrays, pack_bytes, unpack_bytes
from fedward_client.connector.frozen import FrozenArrays, Lacking
from fedward_client.connector.trainer_session import TrainerSession
from fedward_client.fair_queue import FairQueue
from fedward_client.link.client import TrainerGone
from fedward_client.link.messages import TrainerMessage
from fedward_client.messages import refusal, to_order, to_reply

# Messages in hand, on disk: whoever kills the connector does not lose a round.


@dataclass(frozen=True)
class PendingRequest:
    """A message that has no answer yet.

    Attributes
    ----------
    name : str
        Of its files.
    envelope : bytes
        What a reply to it needs.
    what : str
        describe, train or evaluate.
    order : Packet
        For the trainer.
    until : float
        This machine's time after which nobody waits for an answer.
    """

    name: str
    envelope: bytes
    what: str
    order: TrainerMessage
    until: float


class RequestStore:
    """A folder of messages in hand.

    Parameters
    ----------
    folder : Path
        Made when it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep_partial(folder)

    def put(self, message: PendingRequest) -> None:
        """Keep a message; a full disk only means that it is not kept."""
        head = {
            "envelope": message.envelope.hex(),
            "what": message.what,
            "record": message.order.record,
            "until": message.until,
        }
        with suppress(OSError):
            if message.order.arrays:
                replace_file(
                    self._folder / f"{message.name}.safetensors", pack_bytes(message.order.arrays)
                )
            replace_file(self._folder / f"{message.name}.json", json.dumps(head).encode())

    def drop(self, name: str) -> None:
        """Forget a message that was answered."""
        for ending in ("json", "safetensors"):
            with suppress(OSError):
                (self._folder / f"{name}.{ending}").unlink(missing_ok=True)

    def left(self) -> Iterator[PendingRequest]:
        """What an earlier process left behind, oldest first; damaged ones are dropped."""
        found = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in found[-_MOST:]:
            try:
                yield self._read(path)
            except (OSError, ValueError, KeyError, ProtocolError):
                self.drop(path.stem)

    def _read(self, path: Path) -> PendingRequest:
        head = json.loads(path.read_bytes())
        tensors = path.with_suffix(".safetensors")
        arrays = _arrays(tensors) if tensors.exists() else {}
        order = TrainerMessage("order", dict(head["record"]), arrays)
        envelope, what = bytes.fromhex(head["envelope"]), str(head["what"])
        return PendingRequest(path.stem, envelope, what, order, float(head["until"]))


def _arrays(path: Path) -> PackedArrays:
    content = path.read_bytes()
    unpack_bytes(content)  # a damaged file is found here, and not at the trainer
    return PackedArrays(content)


_LOG = logging.getLogger("fedward.connector")
_PAIRS: Final = 4
_UNREADABLE: Final = "unreadable"
# Whoever sends more of them waits, and fills no disk here.
_MOST: Final = 16


class Inbox:
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

    def __init__(self, site: str, folder: Path, attachment: TrainerSession) -> None:
        self._site, self._attachment, self._spool = site, attachment, RequestStore(folder)
        self._frozen = FrozenArrays(folder / "frozen")
        self._answers: queue.SimpleQueue[tuple[PendingRequest, TrainerMessage]] = (
            queue.SimpleQueue()
        )
        self._unsent: list[tuple[PendingRequest, TrainerMessage]] = []
        self._names: set[str] = set()
        self._waiting = FairQueue[PendingRequest]()
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
        # Packed once, for the disk and for the socket.
        packed = PackedArrays(pack_bytes(order.arrays) if order.arrays else b"")
        self._take(_in_hand(message, what, replace(order, arrays=packed)), keep=True)

    def _ask_for_arrays(self, message: Message, error: Lacking) -> None:
        """The trainer hears of the order once it is whole."""
        config = dict(message.content.config_records["config"])
        order = _in_hand(message, "train", TrainerMessage("order", config))
        if order.name not in self._names:
            self._names.add(order.name)
            self._answers.put((order, refusal(self._site, order.order, error)))

    def refuse(self, error: Unreadable) -> None:
        """The trainer hears of it first, so that its audit log has it; then the asker does."""
        _LOG.warning("a message could not be read: %s", error.rule)
        order = TrainerMessage("order", {_UNREADABLE: error.rule})
        # What is written down at the trainer comes in time, whatever its sender says of its time.
        self._take(replace(_in_hand(error.envelope, "describe", order), until=math.inf), keep=True)

    def note_garbage(self, error: ProtocolError) -> None:
        """Have the audit log say that something came that was no message at all."""
        _LOG.warning("an answer could not be read: %s", error.rule)
        with suppress(FedwardError):
            self._attachment.caller().ask(
                "describe", TrainerMessage("order", {_UNREADABLE: error.rule})
            )

    def send_ready(self, fleet: FleetClient, seconds: float) -> None:
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

    def _take(self, order: PendingRequest, *, keep: bool = False) -> None:
        if order.name in self._names:
            return
        self._names.add(order.name)
        if keep:
            self._spool.put(order)
        self._waiting.put(str(order.order.record.get("study", "")), order)
        self._pool.submit(self._hand_on)

    def _hand_on(self) -> None:
        order = self._waiting.take()
        if time.time() > order.until:
            _LOG.info("an order waited until its round was over, and is not carried out")
            self._forget(order)
            return
        self._answers.put((order, self._answer(order)))

    def _answer(self, order: PendingRequest) -> TrainerMessage:
        try:
            return self._asked(order)
        except FedwardError as error:
            _LOG.warning("the trainer gave no answer: %s", error.rule)
            return refusal(self._site, order.order, error)
        except Exception:
            _LOG.exception("an order could not be handed on")
            return refusal(
                self._site,
                order.order,
                FedwardError(RuleCode.CONNECTOR_ERROR),
            )

    def _asked(self, order: PendingRequest) -> TrainerMessage:
        while True:
            try:
                return self._attachment.caller().ask(order.what, order.order)
            except TrainerGone:
                # A round that broke off is lost; what must be written down waits for its writer.
                if _UNREADABLE not in order.order.record or self._attachment.stopping:
                    raise

    def _send(self, fleet: FleetClient, order: PendingRequest, answer: TrainerMessage) -> None:
        try:
            content = to_reply(answer, order.order)
        except FedwardError as error:
            content = to_reply(refusal(self._site, order.order, error), order.order)
        with suppress(fleet_client.RunOver):
            reply = fleet_client.reply_to(order.envelope, content)
            self._attachment.state.bytes_up += fleet.push(reply)
        self._forget(order)
        self._attachment.tell("online")

    def _forget(self, order: PendingRequest) -> None:
        self._names.discard(order.name)
        self._spool.drop(order.name)


def _in_hand(message: Message, what: str, order: TrainerMessage) -> PendingRequest:
    # A file name, whatever the aggregator calls it.
    name = hashlib.sha256(message.metadata.message_id.encode("utf-8", "replace")).hexdigest()
    # The two clocks may differ, so its time counts from here, where it is a little late.
    until = time.time() + message.metadata.ttl
    return PendingRequest(name, fleet_client.serialize_envelope(message), what, order, until)
