"""Silence warnings of decoding libraries.

pydicom, nibabel and Pillow print odd values that they meet, and in a hospital such a value may be
a name or an id. The warning filters of Python belong to the whole process, so nested and
concurrent uses share one change of them.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_depth = 0
_outer: warnings.catch_warnings[None] | None = None

for _name in ("pydicom", "nibabel.global", "PIL"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)
    logging.getLogger(_name).propagate = False


@contextmanager
def quiet() -> Iterator[None]:
    """No warning is shown while the block runs, in any thread."""
    global _depth, _outer
    with _lock:
        if _depth == 0:
            _outer = warnings.catch_warnings()
            _outer.__enter__()
            warnings.simplefilter("ignore")
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and _outer is not None:
                _outer.__exit__(None, None, None)
                _outer = None
