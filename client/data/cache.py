"""Prepared arrays on disk: written aside, renamed when whole, memory-mapped when read again.

Who writes an entry holds a lock on the folder that it writes into, so that others wait for it
instead of doing the same, and a folder without its writer is known to be abandoned.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from client.data.room import PARTIAL, alone, make_room, owned, sweep, together, wait_for
from fedward.errors import OutputError

_META: Final = "meta.json"


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

    def _write_header(self, row: NDArray[Any], count: int) -> None:
        self._file.seek(0)
        header = {
            "descr": np.lib.format.dtype_to_descr(row.dtype),
            "fortran_order": False,
            "shape": (count, *row.shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


@dataclass(frozen=True)
class Stored:
    """What the cache gives back."""

    arrays: Mapping[str, NDArray[Any]]
    meta: Mapping[str, Any]


def load(place: Path, names: tuple[str, ...]) -> Stored | None:
    """Read an entry; None when it is not there or damaged (a damaged one is removed)."""
    if not place.is_dir():
        return None
    with together(place.parent):
        return _load(place, names)


def _load(place: Path, names: tuple[str, ...]) -> Stored | None:
    try:
        meta = json.loads((place / _META).read_text("utf-8"))
        arrays = {name: _map(place / f"{name}.npy") for name in names}
        if len({len(array) for array in arrays.values()}) != 1:
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
            "the cache of prepared images must be writable",
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
