"""Room in the cache of prepared images: locks, leftovers, and what makes room for new entries.

Locks are those of ``flock(2)``: they end with the process that holds them, however it ends. Where
the file system has none, leftovers are told by their age, and two writers may do the same work.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

from fedward.errors import OutputError

PARTIAL: Final = ".partial-"
_ENTRY: Final = re.compile(r"[0-9a-f]{64}")
_RESERVED: Final = re.compile(re.escape(PARTIAL) + r"[0-9a-f]{16}-(\d+)-.*")
_STALE_AFTER: Final = 86_400.0  # seconds; without locks, a half-written folder that old is left
_GIB: Final = 1 << 30


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process looks at or changes the entries meanwhile."""
    with _locked(folder, fcntl.LOCK_EX):
        yield


@contextmanager
def together(folder: Path) -> Iterator[None]:
    """No other process changes the entries meanwhile."""
    with _locked(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with owned(handle):
        with suppress(OSError):
            fcntl.flock(handle, kind)
        yield


@contextmanager
def owned(handle: int) -> Iterator[None]:
    """Give a lock back and close its handle at the end."""
    try:
        yield
    finally:
        with suppress(OSError):
            # A process forked meanwhile has the handle too, and would keep the lock.
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def wait_for(folder: Path) -> None:
    """Wait until nobody writes into a folder any more."""
    with suppress(FileNotFoundError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with owned(handle):
            fcntl.flock(handle, fcntl.LOCK_EX)


def sweep(cache: Path) -> list[Path]:
    """Remove what processes that are gone left half written; the folders still written into."""
    living = []
    for folder in cache.glob(f"{PARTIAL}*"):
        match _state(folder):
            case "left":
                shutil.rmtree(folder, ignore_errors=True)
            case "locked":
                living.append(folder)
    return living


def _state(folder: Path) -> Literal["locked", "left", "unknown"]:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return "unknown"
    with owned(handle):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return "left"
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                return "locked"
            old = time.time() - os.fstat(handle).st_mtime > _STALE_AFTER
            return "left" if old else "unknown"


def make_room(cache: Path, size: int, most: int | None) -> None:
    """Remove the entries that were used longest ago until there is room for another.

    Memory maps of a removed entry stay valid; its space is free once they are closed.

    Parameters
    ----------
    cache : Path
        The folder, which the caller has locked.
    size : int
        Bytes of the new entry.
    most : int or None
        Bytes that all entries may take together; None for no bound.

    Raises
    ------
    OutputError
        There is no room even without any other entry.
    """
    if most is None:
        return
    # Earlier releases kept features of frozen layers beside the entries, and counted none.
    for left in cache.glob("features-*.npy"):
        left.unlink(missing_ok=True)
    found = sorted((_used(path), path) for path in cache.iterdir() if _ENTRY.fullmatch(path.name))
    sizes = {path: _bytes(path) for _, path in found}
    writing = sum(_writing(path) for path in cache.glob(f"{PARTIAL}*"))
    if size + writing > most:
        raise OutputError(
            "prepared images must have room in the cache",
            value=f"{(size + writing) / _GIB:.3g} GiB of {most / _GIB:.3g} GiB",
            fix="Raise cache_gib, or wait until other studies are prepared",
            where="cache_gib",
        )
    over = size + writing + sum(sizes.values()) - most
    for _, path in found:
        if over <= 0:
            return
        shutil.rmtree(path, ignore_errors=True)
        over -= sizes[path]


def _used(entry: Path) -> int:
    try:
        return entry.stat().st_mtime_ns
    except OSError:
        return 0


def _bytes(entry: Path) -> int:
    total = 0
    for file in entry.glob("*"):
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _writing(folder: Path) -> int:
    known = _RESERVED.fullmatch(folder.name)
    return max(int(known[1]) if known else 0, _bytes(folder))
