"""The ledger's tables in SQLite: durable before a call returns, readable by the owner alone."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from client.cohort.private import write_private
from fedward.errors import BudgetError

_VERSION: Final = 1
_SCHEMA: Final = (
    """CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID""",
    """CREATE TABLE cohorts (sha256 TEXT PRIMARY KEY, dataset TEXT NOT NULL, number INTEGER)
       STRICT, WITHOUT ROWID""",
    """CREATE TABLE members (patient TEXT, cohort TEXT REFERENCES cohorts (sha256),
       PRIMARY KEY (patient, cohort)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE studies (study TEXT PRIMARY KEY, plan_hash TEXT NOT NULL,
       cohort TEXT NOT NULL REFERENCES cohorts (sha256)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE charges (id INTEGER PRIMARY KEY, study TEXT NOT NULL REFERENCES studies (study),
       round INTEGER NOT NULL, noise REAL, rate REAL, steps INTEGER NOT NULL, delta REAL,
       state TEXT NOT NULL CHECK (state IN ('reserved', 'committed', 'lost')),
       digest TEXT NOT NULL DEFAULT '', made REAL NOT NULL, UNIQUE (study, round)) STRICT""",
    "INSERT INTO meta VALUES ('counter', 0)",
    f"PRAGMA user_version = {_VERSION}",
)


class Store:
    """The database, its lock and its anchor.

    A number that only grows stands in the database and, beside it, in a file of its own: a
    database that was replaced by an older copy has forgotten charges, and is found out.

    Parameters
    ----------
    folder : Path
        Made when it is missing.
    read_only : bool
        To look at it while a trainer has it open.

    Raises
    ------
    BudgetError
        It is damaged, was replaced by an older copy, or another trainer has it open.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self._anchor = folder / "ledger.anchor"
        path = folder / "ledger.sqlite"
        self._lock = -1
        self._connection: sqlite3.Connection | None = None
        try:
            if not read_only:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = _lock(folder / "ledger.lock")
                self._refuse_missing(path)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            mode = "ro" if read_only else "rw"
            self._connection = sqlite3.connect(
                f"file:{path}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
            )
            self._open(read_only=read_only)
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise _damaged(type(error).__name__) from None
        except BudgetError:
            self.close()
            raise

    @property
    def connection(self) -> sqlite3.Connection:
        """Open until :meth:`close`."""
        if self._connection is None:
            raise sqlite3.ProgrammingError("closed")
        return self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction; on the disk when it ends."""
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            yield self.connection
            self.connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'counter'")
            self.connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise BudgetError(
                "the privacy ledger must be writable", value=type(error).__name__,
                fix="Make room on the disk of the state folder; nothing was released",
            ) from None  # fmt: skip
        finally:
            if self.connection.in_transaction:
                with suppress(sqlite3.Error):
                    self.connection.execute("ROLLBACK")
        write_private(self._anchor, str(self._counter()).encode())

    def close(self) -> None:
        """Let go."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _open(self, *, read_only: bool) -> None:
        sql = self.connection.execute
        sql("PRAGMA busy_timeout = 10000")
        if not read_only:
            sql("PRAGMA journal_mode = WAL")
            sql("PRAGMA synchronous = FULL")
            sql("PRAGMA foreign_keys = ON")
            if sql("PRAGMA user_version").fetchone()[0] == 0:
                sql("BEGIN IMMEDIATE")
                for statement in _SCHEMA:
                    sql(statement)
                sql("COMMIT")
        if sql("PRAGMA user_version").fetchone()[0] != _VERSION:
            raise _damaged("another version")
        if sql("PRAGMA quick_check").fetchone()[0] != "ok":
            raise _damaged("a check of the file")
        self._refuse_older()

    def _counter(self) -> int:
        row = self.connection.execute("SELECT value FROM meta WHERE key = 'counter'").fetchone()
        return int(row[0])

    def _refuse_missing(self, path: Path) -> None:
        if self._anchor.exists() and not path.exists():
            raise _damaged("the file is gone")

    def _refuse_older(self) -> None:
        try:
            anchored = int(self._anchor.read_text())
        except FileNotFoundError:
            anchored = 0
        except ValueError:
            raise _damaged("its anchor") from None
        if self._counter() < anchored:
            raise BudgetError(
                "the privacy ledger must not be older than what was charged",
                value=f"entry {self._counter()} of {anchored}",
                fix="Restore the newest copy of ledger.sqlite; an older one has forgotten charges",
            )


def _lock(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise BudgetError(
            "one trainer at a time uses the privacy ledger", fix="End the other trainer"
        ) from None
    return handle


def _damaged(what: str) -> BudgetError:
    return BudgetError(
        "the privacy ledger must be whole", value=what,
        fix="Restore ledger.sqlite and ledger.anchor from a backup; a new one would forget what "
        "was spent",
    )  # fmt: skip
