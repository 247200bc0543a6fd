"""A Flower grid that packs models into one array and sends messages whole."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.constant import SType
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedward.errors import ProtocolError
from fedward.flower.runtime_client import RuntimeClient
from fedward.flower.study_grid import StudyGrid, WaitingGrid
from fedward.tensors import PACKED, pack, unpack_bytes


class PackedGrid(WaitingGrid):
    """Packs what goes to the hospitals and unpacks what comes back.

    Parameters
    ----------
    grid : Grid
        Flower's grid over HTTP.
    courier : Courier
        Carries the messages.
    """

    def __init__(self, grid: Grid, courier: RuntimeClient) -> None:
        self._grid, self._courier = grid, courier

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Flower's run."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message from this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are online."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; records that several of them share are packed once."""
        known: dict[int, ArrayRecord] = {}
        packed = [_packed(message, known) for message in messages]
        return self._courier.deliver(packed) if packed else []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there now."""
        return self.wait_for_messages(message_ids, 0.0)

    def wait_for_messages(self, message_ids: Iterable[str], seconds: float) -> list[Message]:
        """Replies that are there; at once when one comes."""
        return [_unpacked(one) for one in self._courier.collect(message_ids, seconds)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, and wait for all replies or the timeout (seconds)."""
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


class SharedArray(Array):
    """An array that is in memory once: Flower's own holds it in serialised form.

    Parameters
    ----------
    value : NDArray
        Not to be changed any more.
    """

    def __init__(self, value: NDArray[Any]) -> None:
        super().__init__(str(value.dtype), tuple(value.shape), SType.NUMPY, b"")
        self.__dict__["_value"] = value

    def numpy(self) -> NDArray[Any]:
        """The array itself."""
        value: NDArray[Any] = self.__dict__["_value"]
        return value


def _unpacked(message: Message) -> Message:
    """The reply with its arrays; one that is damaged stays as it is, and is refused by name."""
    if not message.has_content():
        return message
    for name, record in list(message.content.array_records.items()):
        if list(record) == [PACKED]:
            try:
                arrays = unpack_bytes(_content(record[PACKED]))
            except (ProtocolError, ValueError, TypeError, EOFError):
                continue
            record.clear()  # else its bytes stay until Python's collector comes by
            made = ArrayRecord()  # given a mapping, it would make arrays of Flower's own
            for key, value in arrays.items():
                made[key] = SharedArray(value)
            message.content[name] = made
    return message


def _content(array: Array) -> bytes:
    """The bytes of a packed array, with one copy of them instead of three.

    Raises
    ------
    ValueError
        It is no array of bytes.
    """
    file = BytesIO(array.data)
    if array.stype != SType.NUMPY or np.lib.format.read_magic(file) != (1, 0):
        raise ValueError
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    content = array.data[file.tell() :]
    if dtype != np.uint8 or shape != (len(content),) or fortran:
        raise ValueError
    return content
