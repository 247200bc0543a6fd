"""On-disk cache of prepared arrays: written aside, renamed when complete, memory-mapped to read.

Who writes an entry holds a lock on the folder that it writes into, so that others wait for it
instead of doing the same, and a folder without its writer is known to be abandoned.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedward.errors import OutputError
from fedward.files import PARTIAL
from fedward.rule_codes import RuleCode

# Room in the cache of prepared images: locks, leftovers, and what makes room for new entries.
#
# Locks are those of ``flock(2)``: they end with the process that holds them, however it ends. Where
# the file system has none, leftovers are told by their age, and two writers may do the same work.

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
            RuleCode.CACHE_ROOM,
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


_META: Final = "meta.json"
FLAT: Final = frozenset({"voxels", "labels", "truth"})
"""Arrays of an entry that hold images of different sizes, one after another."""


class Rows(Protocol):
    """Collects rows of one shape and dtype."""

    def append(self, row: NDArray[Any]) -> None:
        """Add a row."""

    def finish(self) -> NDArray[Any]:
        """All rows as one array ``(N, *row.shape)``."""


class MemoryRows:
    """Rows in memory."""

    def __init__(self) -> None:
        self._rows: list[NDArray[Any]] = []

    def append(self, row: NDArray[Any]) -> None:
        """Add a row."""
        self._rows.append(row)

    def finish(self) -> NDArray[Any]:
        """All rows as one array."""
        return np.stack(self._rows)


class FileRows:
    """Rows that go straight into a ``.npy`` file, so that the whole never is in memory.

    NumPy's header leaves room for the first axis to grow; the number of rows is filled in last.

    Parameters
    ----------
    path : Path
        The file.
    most : int
        Rows for which there must be room on the disk when the first one comes: a full disk is
        found out then, and not hours later.
    """

    def __init__(self, path: Path, most: int = 0) -> None:
        self._path, self._count, self._most = path, 0, most
        self._file: IO[bytes] = path.open("w+b")
        self._last: NDArray[Any] | np.generic

    def append(self, row: NDArray[Any]) -> None:
        """Add a row."""
        if self._count == 0:
            self._write_header(row, 0)
            self._reserve(self._file.tell() + self._most * row.nbytes)
        self._file.write(np.ascontiguousarray(row).tobytes())
        self._count += 1
        self._last = row

    def _reserve(self, size: int) -> None:
        try:
            os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def finish(self) -> NDArray[Any]:
        """All rows as one read-only memory map."""
        self._file.truncate()
        self._write_header(self._last, self._count)
        _to_disk(self._file)
        return _map(self._path)

    def close(self) -> None:
        """Let go of the file; what is unfinished stays so."""
        self._file.close()

    def _write_header(self, row: NDArray[Any] | np.generic, count: int) -> None:
        self._file.seek(0)
        header = {
            "descr": np.lib.format.dtype_to_descr(row.dtype),
            "fortran_order": False,
            "shape": (count, *row.shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


class FlatRows(FileRows):
    """Rows of different shapes, one after another as ``(M,)``.

    Parameters
    ----------
    path : Path
        The file.
    room_for : callable, optional
        Called with the bytes of a row before it is written: nobody knows them before.
    """

    def __init__(self, path: Path, room_for: Callable[[int], None] = lambda _: None) -> None:
        super().__init__(path)
        self._room_for = room_for

    def append(self, row: NDArray[Any]) -> None:
        """Add a row."""
        self._room_for(row.nbytes)
        if self._count == 0:
            self._last = row.dtype.type(0)
            self._write_header(self._last, 0)
        self._reserve(self._file.tell() + row.nbytes)
        self._file.write(np.ascontiguousarray(row).data)
        self._count += row.size


class FlatMemory(MemoryRows):
    """The same in memory."""

    def finish(self) -> NDArray[Any]:
        """All rows as one array."""
        return np.concatenate([row.ravel() for row in self._rows])


@dataclass(frozen=True)
class Stored:
    """What the cache gives back."""

    arrays: Mapping[str, NDArray[Any]]
    meta: Mapping[str, Any]


def load(place: Path, names: tuple[str, ...]) -> Stored | None:
    """Read an entry; None when it is not there or damaged (a damaged one is removed).

    Its arrays are of one length, but for those of the names in :data:`FLAT`.
    """
    if not place.is_dir():
        return None
    with together(place.parent):
        return _load(place, names)


def _load(place: Path, names: tuple[str, ...]) -> Stored | None:
    try:
        meta = json.loads((place / _META).read_text("utf-8"))
        arrays = {name: _map(place / f"{name}.npy") for name in names}
        if len({len(array) for name, array in arrays.items() if name not in FLAT}) != 1:
            raise ValueError("arrays of different length")
        with suppress(OSError):  # a cache that is only read is not bounded by who reads it
            os.utime(place)
        return Stored(arrays, dict(meta))
    except (OSError, ValueError, TypeError):
        shutil.rmtree(place, ignore_errors=True)
        return None


@contextmanager
def building(place: Path, size: int = 0, most: int | None = None) -> Iterator[Path]:
    """A private folder to write an entry into; it is gone afterwards unless published.

    Waits while another process writes the same entry, so look again whether it is there.

    Parameters
    ----------
    place : Path
        The entry.
    size : int
        Bytes that it may come to.
    most : int, optional
        Bytes that the whole cache may take; entries that were used longest ago make room.

    Raises
    ------
    OutputError
        The cache cannot be written, or has no room for the entry.
    """
    temporary: Path | None = None
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary, handle = _begin(place, size, most)
        with owned(handle):
            yield temporary
    except OSError as error:
        raise OutputError(
            RuleCode.CACHE_WRITABLE,
            value=os.strerror(error.errno) if error.errno else None,
            fix="Free some space, or set the cache to another folder",
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _begin(place: Path, size: int, most: int | None) -> tuple[Path, int]:
    """A folder for the entry, and the handle that holds its lock."""
    start = f"{PARTIAL}{place.name[:16]}-"
    while True:
        with alone(place.parent):
            others = [path for path in sweep(place.parent) if path.name.startswith(start)]
            if not others:
                make_room(place.parent, size, most)
                return _claim(place.parent, f"{start}{size}-")
        wait_for(others[0])


def _claim(cache: Path, start: str) -> tuple[Path, int]:
    folder = Path(tempfile.mkdtemp(prefix=start, dir=cache))
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # a file system without locks: two may do the same work
        fcntl.flock(handle, fcntl.LOCK_EX)
    return folder, handle


def publish(
    temporary: Path,
    place: Path,
    arrays: Mapping[str, NDArray[Any]],
    meta: Mapping[str, Any],
    names: tuple[str, ...],
) -> Stored | None:
    """Add small arrays and the description, then give the entry its name in one step.

    Returns the entry as :func:`load` does.
    """
    for name, array in arrays.items():
        with (temporary / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            _to_disk(file)
    with (temporary / _META).open("wb") as file:
        file.write(json.dumps(meta, sort_keys=True).encode())
        _to_disk(file)
    with alone(place.parent):
        try:
            temporary.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was faster with the same content
                raise
        return _load(place, names)


def _map(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
