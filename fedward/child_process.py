"""Child processes that end with their parent."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def end_with_parent(signal: int) -> Callable[[], None]:
    """What a new process does first (``preexec_fn``) so that it ends with this one.

    Parameters
    ----------
    signal : int
        What it gets when this process ends.
    """
    parent = os.getpid()

    def promise() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal)
        # Whoever is gone already sends nothing. Not "is it 1?": in a container the parent is.
        if os.getppid() != parent:
            os._exit(1)

    return promise
