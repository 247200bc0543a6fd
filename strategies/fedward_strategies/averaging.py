"""Exponential moving average of the global models; pure array arithmetic.

Averaging what was already released needs no privacy budget (post-processing) and takes out most
of the jitter that few sites and private noise put into the last rounds (Polyak and Juditsky,
1992, doi:10.1137/0330046).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def decay_at(step: int, decay: float) -> float:
    """The decay of a step (from 1): it rises to ``decay``, so that the start is soon forgotten."""
    return min(decay, step / (step + 9.0)) if step > 1 else 0.0


def blend(average: Arrays, newest: Arrays, decay: float) -> dict[str, NDArray[Any]]:
    """``decay`` times the average plus the rest of the newest; equal arrays stay bit-identical.

    Arrays keep their dtype; those that are not floating point are taken from the newest.
    """
    mixed = {}
    for name, value in newest.items():
        before = average[name]
        same = decay == 0.0 or np.array_equal(before, value)
        if same or not np.issubdtype(value.dtype, np.floating):
            mixed[name] = value
        else:
            mixed[name] = (decay * before + (1.0 - decay) * value).astype(value.dtype)
    return mixed
