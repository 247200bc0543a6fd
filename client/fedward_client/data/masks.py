"""Label maps: the form in which every reader returns masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward import rule_codes


def label_map(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Whole numbers from 0 to 255 as uint8, whatever type they were stored in.

    Raises
    ------
    DataError
        "unknown class in mask": some value is not such a number.
    """
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    labels = np.ascontiguousarray(values)
    if labels.dtype.kind not in "biuf" or not (labels.min() >= 0 and labels.max() <= 255):
        raise rule_codes.unusable(rule_codes.MASK_CLASS)
    whole: NDArray[np.uint8] = labels.astype(np.uint8)
    if not np.array_equal(whole, labels):
        raise rule_codes.unusable(rule_codes.MASK_CLASS)
    return whole
