"""What a strategy keeps at a site from round to round, with the rounds that may be asked again."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward.errors import OutputError, ProtocolError
from fedward.rule_codes import RuleCode
from fedward.tensors import Arrays, pack_bytes, unpack_bytes

MOST_BYTES: Final = 1 << 30
# An aggregator keeps two checkpoints, so that it may ask again for its last two rounds.
HISTORY: Final = 3
_FIRST: Final = "first"
_SCHEMA: Final = (
    "BEGIN IMMEDIATE",
    # A study stays when its states have gone: its next round must not start as if it were new.
    """CREATE TABLE studies (id INTEGER PRIMARY KEY, study TEXT NOT NULL, plan_hash TEXT NOT NULL,
       cohort TEXT NOT NULL, first INTEGER NOT NULL, used INTEGER NOT NULL,
       UNIQUE (study, plan_hash, cohort)) STRICT""",
    """CREATE TABLE states (study INTEGER NOT NULL REFERENCES studies (id), round INTEGER NOT NULL,
       content BLOB NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (study, round)) STRICT""",
    "PRAGMA user_version = 1",
    "COMMIT",
)


class SiteStates:
    """The states of a site's studies in SQLite; those of studies used longest ago make room.

    Parameters
    ----------
    folder : Path, optional
        Where the database lies, made with the first state; none: in memory.
    most_bytes : int
        Bytes of all states together.
    """

    def __init__(self, folder: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        self._path = folder / "site_state.sqlite" if folder else None
        self._most, self._turn = most_bytes, threading.RLock()
        self._connection: sqlite3.Connection | None = None

    def of(self, study: str, plan_hash: str, cohort: str) -> StudyState:
        """What is kept for a study with a plan and a frozen cohort, and for no other."""
        return StudyState(self, (study, plan_hash, cohort))

    def forget(self, study: str) -> None:
        """Remove the states of a study that has ended.

        Raises
        ------
        OutputError
            The database cannot be written.
        """
        if self._connection is None and (self._path is None or not self._path.exists()):
            return
        with self.using() as sql:
            sql.execute(
                "DELETE FROM states WHERE study IN (SELECT id FROM studies WHERE study = ?)",
                (study,),
            )

    def close(self) -> None:
        """Let go of the file."""
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def using(self) -> Iterator[sqlite3.Connection]:
        """A transaction; on the disk when it ends."""
        with self._turn:
            try:
                sql = self._open()
                sql.execute("BEGIN IMMEDIATE")
                try:
                    yield sql
                except BaseException:
                    sql.execute("ROLLBACK")
                    raise
                sql.execute("COMMIT")
            except (sqlite3.Error, OSError):
                raise OutputError(
                    RuleCode.STATE_ROOM,
                    fix="Make room on the disk of the state folder; nothing was sent",
                ) from None

    def make_room(self, sql: sqlite3.Connection, study: int) -> None:
        """Remove the states of other studies until all fit.

        Raises
        ------
        OutputError
            This study's alone do not.
        """
        size = "SELECT coalesce(sum(length(content)), 0) FROM states"
        others = sql.execute(
            "SELECT id FROM studies WHERE id <> ? ORDER BY used", (study,)
        ).fetchall()
        while sql.execute(size).fetchone()[0] > self._most:
            if not others:
                raise OutputError(
                    RuleCode.STATE_ROOM, fix="Plan a smaller model, or another strategy"
                )
            sql.execute("DELETE FROM states WHERE study = ?", others.pop(0))

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._path is not None:
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            found = sqlite3.connect(
                self._path or ":memory:", isolation_level=None, check_same_thread=False
            )
            # What is removed was made of patients' images, and gives its room back.
            for setting in (
                "auto_vacuum = FULL",
                "journal_mode = WAL",
                "synchronous = FULL",
                "secure_delete = ON",
            ):
                found.execute(f"PRAGMA {setting}")
            if not found.execute("PRAGMA user_version").fetchone()[0]:
                for statement in _SCHEMA:
                    found.execute(statement)
            self._connection = found
        return self._connection


class StudyState:
    """What one study keeps at a site.

    Parameters
    ----------
    states : SiteStates
        Of the site.
    key : tuple of str
        Study, plan hash and cohort.
    """

    def __init__(self, states: SiteStates, key: tuple[str, str, str]) -> None:
        self._states, self._key = states, key

    def before(self, round_: int) -> Arrays:
        """The arrays that a round starts from; none before the site's first round.

        A round that is asked again starts from where it started before.

        Raises
        ------
        ProtocolError
            They are kept no longer: the study has ended here, or went on for several rounds.
        """
        with self._states.using() as sql:
            study = self._find(sql)
            if study is None:
                return {}
            (newest,) = sql.execute(
                "SELECT max(round) FROM states WHERE study = ?", study[:1]
            ).fetchone()
            # An order of long ago, sent again, must not take the study back.
            recent = newest is not None and round_ > newest - HISTORY
            if recent and round_ <= study[1]:
                return {}
            row = (
                recent
                and sql.execute(
                    "SELECT content, sha256 FROM states WHERE study = ? AND round < ? "
                    "ORDER BY round DESC LIMIT 1",
                    (study[0], round_),
                ).fetchone()
            )
        if not row or hashlib.sha256(row[0]).hexdigest() != row[1]:
            raise ProtocolError(
                RuleCode.STATE_MISSING, values={"round": round_}, fix="Submit the study again"
            )
        return unpack_bytes(row[0])

    def keep(self, round_: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep what a round left; where that is not what it left before, later rounds are undone.

        Raises
        ------
        OutputError
            There is no room.
        """
        content = pack_bytes(arrays)
        sha256 = hashlib.sha256(content).hexdigest()
        with self._states.using() as sql:
            sql.execute(
                "INSERT INTO studies (study, plan_hash, cohort, first, used) "
                "VALUES (?, ?, ?, ?, 0) ON CONFLICT DO UPDATE SET first = min(first, ?)",
                (*self._key, round_, round_),
            )
            study, _ = self._find(sql) or (0, 0)
            sql.execute(
                "UPDATE studies SET used = 1 + (SELECT max(used) FROM studies) WHERE id = ?",
                (study,),
            )
            if sql.execute(
                "SELECT 1 FROM states WHERE study = ? AND round = ? AND sha256 = ?",
                (study, round_, sha256),
            ).fetchone():
                return
            sql.execute("DELETE FROM states WHERE study = ? AND round >= ?", (study, round_))
            sql.execute("INSERT INTO states VALUES (?, ?, ?, ?)", (study, round_, content, sha256))
            sql.execute(
                "DELETE FROM states WHERE study = ? AND round NOT IN (SELECT round FROM states "
                "WHERE study = ? ORDER BY round DESC LIMIT ?)",
                (study, study, HISTORY),
            )
            self._states.make_room(sql, study)

    def to_arrays(self) -> Arrays:
        """All that is kept, as ``ROUND/NAME``, for a simulation's checkpoint."""
        with self._states.using() as sql:
            study = self._find(sql)
            rows = sql.execute(
                "SELECT round, content FROM states WHERE study = ? ORDER BY round",
                (study[0] if study else None,),
            ).fetchall()
        found = {
            f"{round_}/{name}": value
            for round_, content in rows
            for name, value in unpack_bytes(content).items()
        }
        return found if study is None else {_FIRST: np.array([study[1]]), **found}

    def from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what :meth:`to_arrays` gave, in place of all that is kept."""
        rounds: dict[int, Arrays] = {}
        for name, value in arrays.items():
            if name != _FIRST:
                number, _, inner = name.partition("/")
                rounds.setdefault(int(number), {})[inner] = value
        with self._states.using() as sql:
            if study := self._find(sql):
                sql.execute("DELETE FROM states WHERE study = ?", study[:1])
                sql.execute("DELETE FROM studies WHERE id = ?", study[:1])
        for round_, content in sorted(rounds.items()):
            self.keep(round_, content)
        if _FIRST in arrays:
            with self._states.using() as sql:
                study = self._find(sql)
                first = int(arrays[_FIRST][0])
                if study:
                    sql.execute("UPDATE studies SET first = ? WHERE id = ?", (first, study[0]))

    def _find(self, sql: sqlite3.Connection) -> tuple[int, int] | None:
        """Its number and the first round that the site trained."""
        row = sql.execute(
            "SELECT id, first FROM studies WHERE study = ? AND plan_hash = ? AND cohort = ?",
            self._key,
        ).fetchone()
        return None if row is None else (int(row[0]), int(row[1]))
