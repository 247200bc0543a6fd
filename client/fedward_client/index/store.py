"""The index of a dataset in SQLite: one row per file, readable by its owner only."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fedward.errors import OutputError
from fedward_client.index.extract import FileFacts

_VERSION: Final = 4
_COLUMNS: Final = tuple(field.name for field in fields(FileFacts))
_KINDS: Final = {"int": "INTEGER", "bool": "INTEGER", "float": "REAL"}
_TYPED: Final = ", ".join(
    f"{f.name} {_KINDS.get(str(f.type), 'TEXT')}{' PRIMARY KEY' * (f.name == 'path')}"
    for f in fields(FileFacts)
)
_SCHEMA: Final = (
    f"CREATE TABLE IF NOT EXISTS files ({_TYPED}, scan INTEGER, settings TEXT) WITHOUT ROWID",
    *(
        f"CREATE INDEX IF NOT EXISTS by_{column} ON files ({column})"
        for column in (
            "patient",
            "series",
            "study",
            "instance",
            "pixels",
            "accession",
            "patientid",
        )
    ),
    f"PRAGMA user_version = {_VERSION}",
)


class Index:
    """The files of one dataset; use it as a context manager.

    Parameters
    ----------
    state : Path
        The site's state folder.
    name : str
        The dataset.

    Raises
    ------
    OutputError
        The file cannot be opened, or is of another version.
    """

    def __init__(self, state: Path, name: str) -> None:
        folder = state / "index"
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            path = folder / f"{name}.sqlite"
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self.connection = sqlite3.connect(path, isolation_level=None)
            self._open()
        except (OSError, sqlite3.Error):
            raise OutputError(
                "the index must be a file that can be written",
                fix="Free some space, or remove "
                "the dataset's file in the state folder and index again",
                where=name,
            ) from None

    def _open(self) -> None:
        sql = self.connection.execute
        sql("PRAGMA journal_mode = WAL")
        sql("PRAGMA synchronous = NORMAL")
        with self._transaction():
            version = sql("PRAGMA user_version").fetchone()[0]
            if version > _VERSION:
                raise sqlite3.DatabaseError("of a later release")
            if version < _VERSION:
                sql("DROP TABLE IF EXISTS files")  # the next scan reads all files again
            for statement in _SCHEMA:
                sql(statement)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            yield
            self.connection.execute("COMMIT")
        finally:
            # Ctrl-C may fall in here too; what was begun must not stand in the next one's way.
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.connection.close()

    def next_scan(self) -> int:
        """A number above that of every scan before."""
        last = self.connection.execute("SELECT max(scan) FROM files").fetchone()[0]
        return int(last or 0) + 1

    def is_known(
        self, path: str, size: int, modified: int, changed: int, settings: str = ""
    ) -> bool:
        """Whether the file was read before, with the same settings, and is as it was."""
        row = self.connection.execute(
            "SELECT size, modified, changed, settings FROM files WHERE path = ?", (path,)
        ).fetchone()
        return bool(row == (size, modified, changed, settings))

    def put(
        self, found: Iterable[FileFacts], seen: Iterable[str], scan: int, settings: str = ""
    ) -> None:
        """Write new facts and mark known files as seen, in one transaction.

        Parameters
        ----------
        found : iterable of FileFacts
            Files that were read.
        seen : iterable of str
            Names of files that are as they were.
        scan : int
            Of which scan; see `next_scan`.
        settings : str
            Under which `found` were read; see `is_known`.

        Raises
        ------
        OutputError
            The index cannot be written; nothing of it is.
        """
        sql = self.connection
        marks = ", ".join("?" * (len(_COLUMNS) + 2))
        into = f"INSERT OR REPLACE INTO files ({', '.join(_COLUMNS)}, scan, settings)"
        try:
            with self._transaction():
                sql.executemany(
                    f"{into} VALUES ({marks})", ((*_row(one), scan, settings) for one in found)
                )
                sql.executemany(
                    "UPDATE files SET scan = ? WHERE path = ?", ((scan, p) for p in seen)
                )
        except sqlite3.Error:
            raise OutputError(
                "the index must be writable", fix="Free some space and index again"
            ) from None

    def drop_before(self, scan: int) -> int:
        """Remove the files that a finished scan did not meet; returns how many."""
        with self._transaction():
            return self.connection.execute("DELETE FROM files WHERE scan < ?", (scan,)).rowcount

    def facts(self, reason: str | None = None) -> Iterator[FileFacts]:
        """Files, one after another.

        Parameters
        ----------
        reason : str, optional
            Only those that cannot serve for this reason; "" for those that can.
        """
        rows = self.connection.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM files WHERE reason = coalesce(?, reason)", (reason,)
        )
        yield from map(_facts, rows)

    def reason(self, path: str) -> str:
        """Why a file cannot serve; "" when it can, or is not known."""
        row = self.connection.execute("SELECT reason FROM files WHERE path = ?", (path,)).fetchone()
        return str(row[0]) if row else ""

    def pixels(self, path: str, *, empty: bool = True) -> str:
        """The hash of a file's decoded pixels; "" when there is none.

        With `empty` False, "" for an image of one value too.
        """
        row = self.connection.execute(
            "SELECT pixels, low IS NOT high FROM files WHERE path = ?", (path,)
        ).fetchone()
        return str(row[0]) if row and (empty or row[1]) else ""

    def count(self) -> int:
        """Files in the index."""
        return int(self.connection.execute("SELECT count(*) FROM files").fetchone()[0])


def open_index(state: Path, name: str) -> Index:
    """The index of a dataset, made when there is none (see :class:`Index`)."""
    return Index(state, name)


def _row(facts: FileFacts) -> tuple[Any, ...]:
    values = dict(zip(_COLUMNS, astuple(facts), strict=True))
    values["spacing"] = json.dumps(list(facts.spacing))
    for name in ("low", "high"):
        values[name] = None if math.isnan(values[name]) else values[name]
    return tuple(values[name] for name in _COLUMNS)


def _facts(row: tuple[Any, ...]) -> FileFacts:
    values = dict(zip(_COLUMNS, row, strict=True))
    values["spacing"] = tuple(json.loads(values["spacing"]))
    for name in ("synthetic", "method"):
        values[name] = bool(values[name])
    for name in ("low", "high"):
        values[name] = float("nan") if values[name] is None else values[name]
    return FileFacts(**values)
