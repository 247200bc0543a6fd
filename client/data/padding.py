"""Where a DICOM file says that there is no image (PS3.3, C.7.5.1.1.2)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

_HALF: Final = 1 << 15  # of the numbers of US; those from here on are negative in SS


def padding(flat: Dataset, pixels: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Which of a frame's stored values are no image."""
    value = flat.get("PixelPaddingValue")
    if not isinstance(value, int):
        return np.zeros(pixels.shape, bool)
    limit = flat.get("PixelPaddingRangeLimit")
    ends = (value, limit if isinstance(limit, int) else value)
    low, high = sorted(_as_stored(flat, end) for end in ends)
    stored: NDArray[Any] = pixels
    return np.asarray((stored >= low) & (stored <= high))


def _as_stored(flat: Dataset, value: int) -> int:
    """A value of the sign of the pixels, in whichever VR (US or SS) it was written."""
    signed = bool(flat.get("PixelRepresentation", 0))
    if signed and value >= _HALF:
        return value - 2 * _HALF
    return value + 2 * _HALF if value < 0 and not signed else value
