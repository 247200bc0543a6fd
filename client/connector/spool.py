"""Messages in hand, on disk: whoever kills the connector does not lose a round."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from client.link.packets import Packet
from fedward.errors import ProtocolError
from fedward.packing import Arrays, pack, unpack

_MOST: Final = 16


@dataclass(frozen=True)
class InHand:
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
    order: Packet
    until: float


class Spool:
    """A folder of messages in hand.

    Parameters
    ----------
    folder : Path
        Made when it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, message: InHand) -> None:
        """Keep a message; a full disk only means that it is not kept."""
        head = {
            "envelope": message.envelope.hex(),
            "what": message.what,
            "record": message.order.record,
            "until": message.until,
        }
        with suppress(OSError):
            if message.order.arrays:
                self._write(f"{message.name}.safetensors", pack(message.order.arrays).tobytes())
            self._write(f"{message.name}.json", json.dumps(head).encode())

    def drop(self, name: str) -> None:
        """Forget a message that was answered."""
        for ending in ("json", "safetensors"):
            with suppress(OSError):
                (self._folder / f"{name}.{ending}").unlink(missing_ok=True)

    def left(self) -> Iterator[InHand]:
        """What an earlier process left behind, oldest first; damaged ones are dropped."""
        found = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in found[-_MOST:]:
            try:
                yield self._read(path)
            except (OSError, ValueError, KeyError, ProtocolError):
                self.drop(path.stem)

    def _read(self, path: Path) -> InHand:
        head = json.loads(path.read_bytes())
        tensors = path.with_suffix(".safetensors")
        arrays = _arrays(tensors) if tensors.exists() else {}
        order = Packet("order", dict(head["record"]), arrays)
        envelope, what = bytes.fromhex(head["envelope"]), str(head["what"])
        return InHand(path.stem, envelope, what, order, float(head["until"]))

    def _write(self, name: str, content: bytes) -> None:
        path = self._folder / name
        part = path.with_suffix(path.suffix + ".part")
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


def _arrays(path: Path) -> Arrays:
    return unpack(np.frombuffer(path.read_bytes(), np.uint8))
