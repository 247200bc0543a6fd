"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

_TRIM_THRESHOLD: Final = -1  # numbers of malloc.h
_MMAP_THRESHOLD: Final = -3
_LARGEST_KEPT: Final = 32 << 20  # glibc takes no more


def keep_freed(size: int) -> None:
    """Have glibc keep up to so many bytes for what comes next (mallopt(3)).

    It gives the pages back and asks for them again, which costs as much time as reading a CT slice,
    and a tenth to a quarter of a private step of a U-Net (``benchmarks/dp.py``). Another C library
    goes on as it is.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, size)
