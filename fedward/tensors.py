"""Pack many arrays into one for transport between aggregator and hospital.

Flower sends and stores every array of a message on its own; a model has hundreds, and each costs a
signed request at both ends. One array that holds them all, in the safetensors format, costs one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedward.errors import ProtocolError
from fedward.rule_codes import RuleCode

PACKED: Final = "packed"
# The record of a message with the arrays that do not train.
FROZEN: Final = "frozen"

Arrays = dict[str, NDArray[Any]]


class PackedArrays(Mapping[str, NDArray[Any]]):
    """Arrays as :func:`pack` packed them; unpacked when somebody looks at one.

    Who only hands arrays on neither unpacks nor packs them.

    Parameters
    ----------
    content : bytes
        The packed arrays; "" for none.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> PackedArrays:
        """Pack arrays that are looked at as well."""
        made = cls(pack_bytes(arrays))
        made.__dict__["_arrays"] = dict(arrays)
        return made

    @cached_property
    def _arrays(self) -> Arrays:
        return unpack_bytes(self.content) if self.content else {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An array by name."""
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in order."""
        return iter(self._arrays)

    def __len__(self) -> int:
        """How many arrays there are."""
        return len(self._arrays)

    def __bool__(self) -> bool:
        """Whether there are some; told without unpacking them."""
        return bool(self.content)


def pack(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """All arrays, with names, order, shapes and dtypes, as one array of bytes."""
    return np.frombuffer(pack_bytes(arrays), np.uint8)


def pack_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of :func:`pack`; those of :class:`PackedArrays` are there already."""
    if isinstance(arrays, PackedArrays):
        return arrays.content
    whole = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    return save(whole, {"names": json.dumps(list(whole))})


def unpack(packed: NDArray[Any]) -> Arrays:
    """What :func:`pack` packed, in its order.

    Raises
    ------
    ProtocolError
        It is something else.
    """
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise _broken()
    return unpack_bytes(packed.tobytes())


def unpack_bytes(content: bytes) -> Arrays:
    """What :func:`pack` packed, from its bytes.

    Raises
    ------
    ProtocolError
        It is something else.
    """
    try:
        arrays = dict(load(content))
        length = int.from_bytes(content[:8], "little")
        names = json.loads(content[8 : 8 + length])["__metadata__"]["names"]
        return {name: arrays.pop(name) for name in json.loads(names)} if arrays else {}
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise _broken() from None


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over names, dtypes, shapes and values of all arrays, whatever their order."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        # Each header states its own length and that of the values: no two models read alike.
        header = json.dumps([name, value.dtype.str, list(np.shape(arrays[name])), value.nbytes])
        found.update(len(header).to_bytes(8, "little") + header.encode())
        found.update(value.data)
    return found.hexdigest()


def _broken() -> ProtocolError:
    return ProtocolError(
        RuleCode.TENSORS,
        fix="Run the same Fedward release on both ends",
    )
