"""Prepared arrays on disk: written aside, renamed when whole, memory-mapped when read again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedward.errors import OutputError

_PARTIAL: Final = ".partial-"
_META: Final = "meta.json"
_STALE_AFTER: Final = 86_400.0  # seconds; a half-written folder that old has been abandoned


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
    """

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        self._file: IO[bytes] = path.open("w+b")

    def append(self, row: NDArray[Any]) -> None:
        """Add a row."""
        if self._count == 0:
            self._write_header(row, 0)
        self._file.write(np.ascontiguousarray(row).tobytes())
        self._count += 1
        self._last = row

    def finish(self) -> NDArray[Any]:
        """All rows as one read-only memory map."""
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
    try:
        meta = json.loads((place / _META).read_text("utf-8"))
        arrays = {name: _map(place / f"{name}.npy") for name in names}
        if len({len(array) for array in arrays.values()}) != 1:
            raise ValueError("arrays of different length")
        return Stored(arrays, dict(meta))
    except (OSError, ValueError, TypeError):
        shutil.rmtree(place, ignore_errors=True)
        return None


@contextmanager
def building(cache: Path) -> Iterator[Path]:
    """A private folder to write an entry into; it is gone afterwards unless published.

    Raises
    ------
    OutputError
        The cache cannot be written.
    """
    temporary: Path | None = None
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(cache)
        temporary = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=cache))
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


def publish(
    temporary: Path, place: Path, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
) -> None:
    """Add small arrays and the description, then give the entry its name in one step."""
    for name, array in arrays.items():
        with (temporary / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            _to_disk(file)
    with (temporary / _META).open("wb") as file:
        file.write(json.dumps(meta, sort_keys=True).encode())
        _to_disk(file)
    try:
        temporary.rename(place)
    except OSError:
        if not place.is_dir():  # else another process was faster with the same content
            raise


def _map(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sweep(cache: Path) -> None:
    for left in cache.glob(f"{_PARTIAL}*"):
        if time.time() - left.stat().st_mtime > _STALE_AFTER:
            shutil.rmtree(left, ignore_errors=True)
