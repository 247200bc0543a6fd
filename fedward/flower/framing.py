"""Length-prefixed frames: several byte strings in one HTTP body.

Between aggregator and hospital a message and all its parts travel in one request, where Flower
makes one for each part. Whoever sends such a body, or wants one as the answer, says so in a header.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fedward.errors import ProtocolError

PARTS_HEADER: Final = "x-fedward-parts"
WAIT_HEADER: Final = "x-fedward-wait"
PARTS_TYPE: Final = "application/x-fedward-parts"
LONGEST_WAIT: Final = 25.0

_LENGTH: Final = 8
_DIGEST: Final = 32
# Flower cuts arrays into objects of 5 MiB; a frame that says more than this is none of ours.
_MOST: Final = 64 << 20


def frame(*parts: bytes) -> Iterator[bytes]:
    """One frame of these parts, in pieces that need no copy of the large ones."""
    yield sum(map(len, parts)).to_bytes(_LENGTH, "big")
    yield from parts


def object_frame(identifier: str, content: bytes) -> Iterator[bytes]:
    """One frame of an object and its id (SHA-256, as 64 hexadecimal digits)."""
    return frame(bytes.fromhex(identifier), content)


def read_object(content: bytes) -> tuple[str, bytes]:
    """Id and content of an object's frame."""
    return content[:_DIGEST].hex(), content[_DIGEST:]


class Frames:
    """Puts frames together from the pieces in which they arrive."""

    def __init__(self) -> None:
        self._head, self._body = bytearray(), list[bytes]()
        self._missing = -1

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The frames that end within a piece.

        Raises
        ------
        ProtocolError
            A frame says that it is too long.
        """
        view = memoryview(piece)
        while len(view):
            view = self._take_length(view) if self._missing < 0 else self._take_body(view)
            if self._missing == 0:
                yield b"".join(self._body)
                self._body, self._missing = [], -1

    @property
    def whole(self) -> bool:
        """Whether nothing was begun and not ended."""
        return self._missing < 0 and not self._head

    def _take_length(self, view: memoryview) -> memoryview:
        needed = _LENGTH - len(self._head)
        self._head += view[:needed]
        if len(self._head) == _LENGTH:
            self._missing = int.from_bytes(self._head, "big")
            self._head.clear()
            if self._missing > _MOST:
                raise ProtocolError("a part of a message is of a bounded size", value=self._missing)
        return view[needed:]

    def _take_body(self, view: memoryview) -> memoryview:
        taken = view[: self._missing]
        self._body.append(bytes(taken))
        self._missing -= len(taken)
        return view[len(taken) :]
