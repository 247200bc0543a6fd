"""Which objects were fetched, or stored: a SQLite file that a kill at any moment leaves true."""

from __future__ import annotations

import ctypes
import os
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fedward.errors import OutputError

_GROUP: Final = 64  # rows in a transaction
_PATIENCE: Final = 1.0  # seconds after which fewer are written
_VARIABLES: Final = 500  # of one statement
_SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS objects "
    "(uid TEXT PRIMARY KEY, reason TEXT, sha256 TEXT, bytes INTEGER) WITHOUT ROWID"
)
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Journal:
    """The objects of one dataset; may be used by several threads.

    A row is written after its file is safe on the disk, so a row is never without its file. A
    file without its row is found by its name, which follows from the object's UID.

    Parameters
    ----------
    path : Path
        The file.
    root : Path
        The dataset.

    Raises
    ------
    OutputError
        It cannot be written.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self._lock, self._written = threading.RLock(), time.monotonic()
        self._waiting: dict[str, tuple[str, str, int]] = {}
        self._root = root
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._sql = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._sql.execute("PRAGMA journal_mode = WAL")
            self._sql.execute(_SCHEMA)
        except (OSError, sqlite3.Error):
            raise OutputError(
                "the importer's folder must be writable",
                fix="Free some space, or give it to the importer's user",
                where="importer.state",
            ) from None

    def known(self, uids: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Reason ("" for an object that is in the dataset) and SHA-256 of those that have a row."""
        with self._lock:
            asked = list(uids)
            found = {u: self._waiting[u][:2] for u in asked if u in self._waiting}
            for start in range(0, len(asked), _VARIABLES):
                some = asked[start : start + _VARIABLES]
                marks = ", ".join("?" * len(some))
                rows = self._sql.execute(
                    f"SELECT uid, reason, sha256 FROM objects WHERE uid IN ({marks})", some
                )
                found |= {uid: (reason, sha256) for uid, reason, sha256 in rows}
        return found

    def add(self, uid: str, reason: str, sha256: str, size: int) -> None:
        """Note an object; it is written with the next few.

        Raises
        ------
        OutputError
            It cannot be written.
        """
        with self._lock:
            self._waiting[uid] = (reason, sha256, size)
            if len(self._waiting) >= _GROUP or time.monotonic() - self._written > _PATIENCE:
                self.write()

    def write(self) -> None:
        """Write what waits, once the files are safe on the disk (syncfs(2))."""
        with self._lock:
            try:
                _sync(self._root)
                self._sql.execute("BEGIN IMMEDIATE")
                self._sql.executemany(
                    "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?)",
                    [(uid, *row) for uid, row in self._waiting.items()],
                )
                self._sql.execute("COMMIT")
            except (OSError, sqlite3.Error):
                if self._sql.in_transaction:
                    self._sql.execute("ROLLBACK")
                raise OutputError(
                    "the importer's folder must be writable",
                    fix="Free some space, and fetch again",
                    where="importer.state",
                ) from None
            self._waiting, self._written = {}, time.monotonic()

    def forget_refused(self, but: str = "") -> int:
        """Have objects that were refused, but for one reason, asked for again; how many."""
        return self._sql.execute("DELETE FROM objects WHERE reason NOT IN ('', ?)", [but]).rowcount

    def close(self) -> None:
        """Write what waits, and close the file."""
        try:
            if self._waiting:
                self.write()
        finally:
            self._sql.close()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        if _libc.syncfs(handle):
            raise OSError(ctypes.get_errno(), "the disk did not take it")
    finally:
        os.close(handle)
