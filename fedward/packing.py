"""Many arrays as one, for the way between aggregator and hospital.

Flower sends and stores every array of a message on its own; a model has hundreds, and each costs a
signed request at both ends. One array that holds them all, in the safetensors format, costs one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedward.errors import ProtocolError

PACKED: Final = "packed"

Arrays = dict[str, NDArray[Any]]


def pack(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """All arrays, with names, order, shapes and dtypes, as one array of bytes."""
    whole = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    return np.frombuffer(save(whole, {"names": json.dumps(list(whole))}), np.uint8)


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


def _broken() -> ProtocolError:
    return ProtocolError(
        "packed arrays must be in the safetensors format with their names",
        fix="Run the same Fedward release on both ends",
    )
