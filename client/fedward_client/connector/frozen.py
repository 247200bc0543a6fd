"""Arrays that do not train, kept by their digest: a study sends them once, and names them after."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedward.errors import FedwardError, ProtocolError
from fedward.rule_codes import RuleCode
from fedward.tensors import Arrays, digest, pack_bytes, unpack_bytes

MOST_BYTES: Final = 1 << 30
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class Lacking(FedwardError):
    """An order names arrays that are not here (any more); its sender has them."""


class FrozenArrays:
    """A folder of arrays, one file for each digest; those used longest ago make room.

    Nothing rests on what is kept here: the trainer holds the whole model of an order against the
    digest that its coordinator signed.

    Parameters
    ----------
    folder : Path
        Made when it is needed.
    most_bytes : int
        Bytes of all files together.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self._folder, self._most = folder, most_bytes

    def keep(self, name: str, arrays: Arrays) -> None:
        """Keep arrays under their digest; a full disk only means that they are not kept.

        Raises
        ------
        ProtocolError
            They have another digest.
        """
        if digest(arrays) != name:
            raise ProtocolError("frozen arrays must have the digest that their order names")
        content = pack_bytes(arrays)
        if len(content) > self._most:
            return
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(len(content), name)
            part = self._folder / f"{name}.part"
            part.write_bytes(content)
            part.replace(self._folder / name)

    def get(self, name: str) -> Arrays:
        """The arrays of a digest.

        Raises
        ------
        Lacking
            They are not here, or damaged.
        """
        path = self._folder / name
        with suppress(OSError, ProtocolError):
            if _DIGEST.fullmatch(name):
                arrays = unpack_bytes(path.read_bytes())
                if digest(arrays) == name:
                    os.utime(path)
                    return arrays
                path.unlink()
        raise Lacking(RuleCode.FROZEN_ARRAYS, fix="Send them with the order")

    def _make_room(self, size: int, name: str) -> None:
        found = [path for path in self._folder.iterdir() if path.name != name]
        sizes = {path: path.stat() for path in found}
        over = size + sum(one.st_size for one in sizes.values()) - self._most
        for path in sorted(found, key=lambda path: sizes[path].st_mtime_ns):
            if over <= 0:
                return
            path.unlink()
            over -= sizes[path].st_size
