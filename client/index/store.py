"""The index of a dataset in SQLite: one row per file, readable by its owner only."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import astuple, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from client.index.facts import FileFacts
from fedward.errors import OutputError

_VERSION: Final = 1
_COLUMNS: Final = tuple(field.name for field in fields(FileFacts))
_KINDS: Final = {"int": "INTEGER", "bool": "INTEGER", "float": "REAL"}


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
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / f"{name}.sqlite"
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self.connection = sqlite3.connect(path, isolation_level=None)
            self._open()
        except (OSError, sqlite3.Error):
            raise OutputError(
                "the index must be a file that can be written", fix="Free some space, or remove "
                "the dataset's file in the state folder and index again", where=name,
            ) from None  # fmt: skip

    def _open(self) -> None:
        sql = self.connection.execute
        sql("PRAGMA journal_mode = WAL")
        sql("PRAGMA synchronous = NORMAL")
        version = sql("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError("another version")
        typed = ", ".join(
            f"{f.name} {_KINDS.get(str(f.type), 'TEXT')}{' PRIMARY KEY' * (f.name == 'path')}"
            for f in fields(FileFacts)
        )
        sql(f"CREATE TABLE IF NOT EXISTS files ({typed}, scan INTEGER) WITHOUT ROWID")
        for column in ("patient", "series", "instance", "pixels"):
            sql(f"CREATE INDEX IF NOT EXISTS by_{column} ON files ({column})")
        sql(f"PRAGMA user_version = {_VERSION}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.connection.close()

    def next_scan(self) -> int:
        """A number above that of every scan before."""
        last = self.connection.execute("SELECT max(scan) FROM files").fetchone()[0]
        return int(last or 0) + 1

    def is_known(self, path: str, size: int, modified: int, changed: int) -> bool:
        """Whether the file was read before and has not changed since."""
        row = self.connection.execute(
            "SELECT size, modified, changed FROM files WHERE path = ?", (path,)
        ).fetchone()
        return bool(row == (size, modified, changed))

    def put(self, found: Iterable[FileFacts], seen: Iterable[str], scan: int) -> None:
        """Write new facts and mark known files as seen, in one transaction."""
        sql = self.connection
        marks = ", ".join("?" * (len(_COLUMNS) + 1))
        sql.execute("BEGIN")
        try:
            sql.executemany(
                f"INSERT OR REPLACE INTO files ({', '.join(_COLUMNS)}, scan) VALUES ({marks})",
                ((*_row(one), scan) for one in found),
            )
            sql.executemany("UPDATE files SET scan = ? WHERE path = ?", ((scan, p) for p in seen))
            sql.execute("COMMIT")
        except sqlite3.Error:
            sql.execute("ROLLBACK")
            raise OutputError(
                "the index must be writable", fix="Free some space and index again"
            ) from None

    def drop_before(self, scan: int) -> int:
        """Remove the files that a finished scan did not meet; returns how many."""
        return self.connection.execute("DELETE FROM files WHERE scan < ?", (scan,)).rowcount

    def facts(self) -> Iterator[FileFacts]:
        """All files, one after another."""
        for row in self.connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM files"):
            yield _facts(row)

    def reason(self, path: str) -> str:
        """Why a file cannot serve; "" when it can, or is not known."""
        row = self.connection.execute("SELECT reason FROM files WHERE path = ?", (path,)).fetchone()
        return str(row[0]) if row else ""

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
    values["synthetic"] = bool(values["synthetic"])
    for name in ("low", "high"):
        values[name] = float("nan") if values[name] is None else values[name]
    return FileFacts(**values)
