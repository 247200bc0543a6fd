"""A grid on which models travel as one array, and which asks no more often than needed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Final

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedward.errors import ProtocolError, StudyError
from fedward.packing import PACKED, pack, unpack

_BETWEEN: Final = 0.08


class PackedGrid(Grid):
    """Packs what goes to the hospitals and unpacks what comes back.

    Parameters
    ----------
    grid : Grid
        Flower's grid over HTTP.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid, self._asked = grid, 0.0

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Flower's run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
        ttl: float | None = None,
    ) -> Message:  # fmt: skip
        """A message from this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are online."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; records that several of them share are packed once."""
        known: dict[int, ArrayRecord] = {}
        packed = [_packed(message, known) for message in messages]
        try:
            return self._grid.push_messages(packed) if packed else []
        except ObjectPushError:
            raise StudyError(
                "the SuperLink must take a message's parts", fix="Make room on its disk"
            ) from None

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there; waits a moment where it was asked just now."""
        time.sleep(max(0.0, self._asked + _BETWEEN - time.monotonic()))
        found = [_unpacked(message) for message in self._grid.pull_messages(message_ids)]
        self._asked = time.monotonic()
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, and wait for all replies or the timeout (seconds)."""
        from server.exchange import StudyGrid

        return StudyGrid.over(self).send_and_receive(messages, timeout=timeout)


def _packed(message: Message, known: dict[int, ArrayRecord]) -> Message:
    content = RecordDict()
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            if id(record) not in known:
                arrays = {key: array.numpy() for key, array in record.items()}
                known[id(record)] = ArrayRecord({PACKED: Array(pack(arrays))})
            content[name] = known[id(record)]
        else:
            content[name] = record
    about = message.metadata
    return Message(
        content, about.dst_node_id, about.message_type, ttl=about.ttl, group_id=about.group_id
    )


def _unpacked(message: Message) -> Message:
    """The reply with its arrays; one that is damaged stays as it is, and is refused by name."""
    if not message.has_content():
        return message
    for name, record in list(message.content.array_records.items()):
        if list(record) == [PACKED]:
            try:
                arrays = unpack(record[PACKED].numpy())
            except (ProtocolError, ValueError, TypeError):
                continue
            made = {key: Array(value) for key, value in arrays.items()}
            message.content[name] = ArrayRecord(made)
    return message
