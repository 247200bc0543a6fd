"""How a DICOM file proposes to show its values: VOI window and VOI LUT (PS3.3, C.11.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from client.data import reasons
from client.data.types import Lookup

_BITS: Final = (8, *range(10, 17))  # of an entry (C.11.2.1.1)
_ALL: Final = 1 << 16  # what 0 entries stand for


def window(flat: Dataset) -> tuple[float, float] | None:
    """Lowest and highest value of the first VOI window (C.11.2.1.2), or of the first VOI LUT."""
    centre, width = _first(flat.get("WindowCenter")), _first(flat.get("WindowWidth"))
    if centre is not None and width is not None:
        if str(flat.get("VOILUTFunction") or "LINEAR").upper() == "LINEAR":
            centre, width = centre - 0.5, width - 1
        return (centre - width / 2, centre + width / 2) if width > 0 else None
    for item in (flat.get("VOILUTSequence") or [])[:1]:
        entries, low, _ = (int(v) for v in item.LUTDescriptor)
        return float(low), float(low + (entries or _ALL) - 1)
    return None


def _first(value: object) -> float | None:
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if len(value) else None
    if value is None or value == "":
        return None
    number = float(str(value))
    return number if np.isfinite(number) else None


def lookup(flat: Dataset) -> Lookup | None:
    """The first VOI LUT (C.11.2.1.1), its entries scaled to 0 and 1; None where there is none.

    Raises
    ------
    DataError
        "not readable": the table is shorter than it says, or of an unknown depth.
    """
    items = flat.get("VOILUTSequence") or []
    if not items:
        return None
    entries, first, bits = (int(v) for v in items[0].LUTDescriptor)
    data = items[0]["LUTData"]
    if bits not in _BITS:
        raise reasons.unusable(reasons.NOT_READABLE)
    if isinstance(data.value, bytes):  # OW, against US
        table = np.frombuffer(data.value, "<u2" if _is_little(flat) else ">u2")
    else:
        table = np.atleast_1d(np.asarray(data.value, np.int64))
    count = entries or _ALL
    if len(table) < count:
        raise reasons.unusable(reasons.NOT_READABLE)
    top = 2.0**bits - 1
    return Lookup(float(first), np.clip(table[:count] / top, 0, 1).astype(np.float32))


def _is_little(flat: Dataset) -> bool:
    return flat.original_encoding[1] is not False


def turned(table: Lookup | None, ends: float) -> Lookup | None:
    """The same for values that were turned over (`ends` minus the value), bright being high."""
    if table is None:
        return None
    return replace(table, first=ends - table.first, table=1 - table.table, backwards=True)
