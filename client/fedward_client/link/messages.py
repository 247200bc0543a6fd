"""Orders and answers on the socket: a record, and tensors in chunks with their size and digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from numpy.typing import NDArray

from fedward.errors import ProtocolError
from fedward.rule_codes import RuleCode
from fedward.tensors import PackedArrays, pack_bytes, unpack_bytes
from fedward_client.link.trainer_pb2 import Head, Part

CHUNK: Final = 1 << 20
MOST_BYTES: Final = 4 << 30
_MOST_RECORD: Final = 2 << 20

Kind = Literal["order", "facts", "update", "counts", "refusal"]


@dataclass(frozen=True)
class TrainerMessage:
    """What crosses the socket in one direction.

    Attributes
    ----------
    kind : str
        Which record it is.
    record : dict
        The record, flat.
    arrays : mapping
        Named tensors; may be empty, or packed.
    lease : str
        Down: who asks.
    """

    kind: str
    record: dict[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    lease: str = ""


def to_parts(packet: TrainerMessage) -> Iterator[Part]:
    """A packet as messages of at most a mebibyte and a bit."""
    tensors = pack_bytes(packet.arrays) if packet.arrays else b""
    yield Part(
        head=Head(
            lease=packet.lease,
            kind=packet.kind,
            record=json.dumps(packet.record, allow_nan=False),
            tensor_bytes=len(tensors),
            tensor_sha256=hashlib.sha256(tensors).digest(),
        )
    )
    view = memoryview(tensors)
    for start in range(0, len(view), CHUNK):
        yield Part(chunk=bytes(view[start : start + CHUNK]))


def from_parts(
    parts: Iterable[Part], most_bytes: int = MOST_BYTES, *, unpacked: bool = True
) -> TrainerMessage:
    """Put a packet together again.

    Parameters
    ----------
    most_bytes : int
        Of tensors.
    unpacked : bool
        Whether tensors are unpacked and checked; else they stay packed, for who hands them on.

    Raises
    ------
    ProtocolError
        It has no head, is larger or smaller than it says, or is damaged.
    """
    stream = iter(parts)
    first = next(stream, None)
    if first is None or first.WhichOneof("body") != "head":
        raise _broken("a packet must begin with its head")
    head = first.head
    if head.tensor_bytes > most_bytes:
        raise _broken(f"a packet holds at most {most_bytes} bytes of tensors", head.tensor_bytes)
    tensors = _gather(stream, head)
    return TrainerMessage(
        kind=head.kind,
        record=_record(head.record),
        arrays=_unpacked(tensors) if unpacked else PackedArrays(tensors),
        lease=head.lease,
    )


def _gather(stream: Iterator[Part], head: Head) -> bytes:
    digest, found = hashlib.sha256(), bytearray()
    for part in stream:
        if part.WhichOneof("body") != "chunk":
            raise _broken("a packet has one head")
        found += part.chunk
        digest.update(part.chunk)
        if len(found) > head.tensor_bytes:
            raise _broken("a packet holds the bytes that its head declares", len(found))
    if len(found) != head.tensor_bytes:
        raise _broken("a packet holds the bytes that its head declares", len(found))
    if digest.digest() != head.tensor_sha256:
        raise _broken("a packet's tensors must have the digest that came with them")
    return bytes(found)


def _record(text: str) -> dict[str, Any]:
    if len(text) > _MOST_RECORD:
        raise _broken(f"a record has at most {_MOST_RECORD} bytes", len(text))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _broken("a record must be a JSON object")
    return value


def _unpacked(tensors: bytes) -> Mapping[str, NDArray[Any]]:
    return unpack_bytes(tensors) if tensors else {}


def _broken(rule: str, value: object = None) -> ProtocolError:
    fix = "Run the same Fedward release in both processes"
    return ProtocolError(rule, value=value, fix=fix, code=RuleCode.PACKET)
