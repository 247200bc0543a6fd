"""The ledger's tables in SQLite: durable before a call returns, readable only by the owner."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fedward.errors import BudgetError, OutputError
from fedward.files import hold, write_private
from fedward.rule_codes import RuleCode
from fedward_client.secret import Pseudonyms


def _kept_for_good(*tables: str) -> tuple[str, ...]:
    return tuple(
        f"""CREATE TRIGGER {table}_stay BEFORE DELETE ON {table}
        BEGIN SELECT RAISE(ABORT, 'nothing is forgotten'); END"""
        for table in tables
    )


_ADD_ONE: Final = "UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = ?"
_SCHEMA: Final = (
    """CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID""",
    """CREATE TABLE cohorts (sha256 TEXT PRIMARY KEY, dataset TEXT NOT NULL,
       number INTEGER NOT NULL, patients TEXT NOT NULL) STRICT, WITHOUT ROWID""",
    """CREATE TABLE members (patient TEXT, cohort TEXT REFERENCES cohorts (sha256),
       PRIMARY KEY (patient, cohort)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE studies (study TEXT PRIMARY KEY, plan_hash TEXT NOT NULL,
       cohort TEXT NOT NULL REFERENCES cohorts (sha256)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE charges (id INTEGER PRIMARY KEY, study TEXT NOT NULL REFERENCES studies (study),
       round INTEGER NOT NULL, noise REAL, rate REAL, steps INTEGER NOT NULL, delta REAL,
       state TEXT NOT NULL CHECK (state IN ('reserved', 'committed', 'lost')),
       digest TEXT NOT NULL DEFAULT '', made REAL NOT NULL, UNIQUE (study, round)) STRICT""",
    *_kept_for_good("meta", "cohorts", "members", "studies", "charges"),
    """CREATE TRIGGER charges_hold BEFORE UPDATE ON charges
       WHEN OLD.noise IS NOT NULL AND OLD.state <> 'reserved' OR NEW.id <> OLD.id
       OR NEW.study <> OLD.study OR NEW.round <> OLD.round OR NEW.noise IS NOT OLD.noise
       OR NEW.rate IS NOT OLD.rate OR NEW.steps <> OLD.steps
       BEGIN SELECT RAISE(ABORT, 'a charge does not change'); END""",
)
# What makes a ledger of one version one of the next; a new ledger goes through all of them. A new
# table gets a trigger against deletion, and a line in _COUNTED if it holds charges.
_FIRST: Final = 2
_MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    ("ALTER TABLE studies ADD COLUMN planned INTEGER NOT NULL DEFAULT 0",),  # 2 to 3
    (  # 3 to 4
        """CREATE TABLE evaluations (id INTEGER PRIMARY KEY,
           study TEXT NOT NULL, plan_hash TEXT NOT NULL,
           cohort TEXT NOT NULL REFERENCES cohorts (sha256), round INTEGER NOT NULL,
           part TEXT NOT NULL, arrays TEXT NOT NULL, epsilon REAL, attempts INTEGER NOT NULL,
           digest TEXT NOT NULL DEFAULT '', made REAL NOT NULL,
           UNIQUE (study, round, part)) STRICT""",
        """CREATE TABLE answers (evaluation INTEGER PRIMARY KEY REFERENCES evaluations (id),
           content BLOB NOT NULL) STRICT""",
        """CREATE TRIGGER evaluations_hold BEFORE UPDATE ON evaluations
           WHEN OLD.digest <> '' OR NEW.id <> OLD.id OR NEW.study <> OLD.study
           OR NEW.cohort <> OLD.cohort OR NEW.round <> OLD.round OR NEW.part <> OLD.part
           OR NEW.arrays <> OLD.arrays
           OR NEW.epsilon IS NOT OLD.epsilon OR NEW.attempts < OLD.attempts
           BEGIN SELECT RAISE(ABORT, 'an evaluation does not change'); END""",
        *_kept_for_good("evaluations", "answers"),
    ),
)
_VERSION: Final = _FIRST + len(_MIGRATIONS)
# Tables that the anchor's hash covers, and what orders their rows. An answer is covered by its
# digest in `evaluations`.
_COUNTED: Final = (
    ("cohorts", "sha256"),
    ("studies", "study"),
    ("charges", "id"),
    ("evaluations", "id"),
)


class Store:
    """The database, its lock and its anchor.

    A number that only grows stands in the database and, beside it, in a file of its own with a
    hash of what counts: a database that was edited, or replaced by an older copy, is found out.
    Whoever puts both files back to the same moment is not.

    Parameters
    ----------
    folder : Path or None
        Made when it is missing; None: in memory, for a simulation.
    read_only : bool
        To look at it while a trainer has it open.
    secret_id : str
        Of the secret that pseudonymises; a reader need not give it.
    accept_older : bool
        Take the database as it is, though its anchor says more.

    Raises
    ------
    BudgetError
        It is damaged, was replaced by an older copy, was begun with another secret, or another
        trainer has it open.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        read_only: bool = False,
        secret_id: str = "",
        accept_older: bool = False,
    ) -> None:
        self._secret_id, self._accept = secret_id, accept_older
        self._lock, self._anchor = -1, folder and folder / "ledger.anchor"
        self._connection: sqlite3.Connection | None = None
        if folder is None:
            self._connection = sqlite3.connect(
                ":memory:", isolation_level=None, check_same_thread=False
            )
            self._make()
            return
        path = folder / "ledger.sqlite"
        try:
            if not read_only:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = hold(folder / "ledger.lock", wait=False)
                if (folder / "ledger.anchor").exists() and not path.exists():
                    raise _damaged("the file is gone")
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                path.chmod(0o600)
            mode = "ro" if read_only else "rw"
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
            )
            self._open(read_only=read_only)
        except BaseException as error:
            self.close()
            if isinstance(error, BlockingIOError):
                raise BudgetError(
                    "one trainer at a time uses the privacy ledger", fix="End the other trainer"
                ) from None
            if isinstance(error, (OSError, sqlite3.OperationalError, OutputError)):
                raise _unwritable(error) from None
            if isinstance(error, sqlite3.Error):
                raise _damaged("a check of the file") from None
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
            self.connection.execute(_ADD_ONE, ("counter",))
            self.connection.execute("COMMIT")
            self._write_anchor()
        except (sqlite3.Error, OSError, OutputError) as error:
            raise _unwritable(error) from None
        finally:
            self._end()

    def _end(self) -> None:
        with suppress(sqlite3.Error):  # closed meanwhile, or the disk is full
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

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
        # Before the database: a trainer may be writing.
        anchored = _read(self._anchor) if self._anchor is not None else None
        version = sql("PRAGMA user_version").fetchone()[0]
        new = version == 0 and anchored is None and not read_only
        if not new and not (_VERSION if read_only else _FIRST) <= version <= _VERSION:
            raise _damaged("another version" if version else "its content is gone")
        if not read_only:
            for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                sql(f"PRAGMA {setting}")
        if new:
            self._make()
        sql("BEGIN")
        try:
            self._check(anchored, read_only=read_only)
        finally:
            self._end()
        if not read_only and not new and version < _VERSION:
            self._migrate(version)
        if self._accept:
            self._go_past(anchored)
        elif anchored is None and not read_only:
            self._write_anchor()

    def _write_anchor(self) -> None:
        if self._anchor is not None:
            write_private(self._anchor, self._state().to_bytes())

    def _migrate(self, version: int) -> None:
        """Bring a ledger that was found whole to this version, in one transaction."""
        with self.writing() as sql:
            for statement in _statements(version):
                sql.execute(statement)

    def _make(self) -> None:
        sql = self.connection
        sql.execute("BEGIN IMMEDIATE")
        for statement in (*_SCHEMA, *_statements(_FIRST)):
            sql.execute(statement)
        sql.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            (
                ("counter", "0"),
                ("id", secrets.token_hex(16)),
                ("secret", self._secret_id),
                ("accepted", "0"),
            ),
        )
        sql.execute("COMMIT")

    def _check(self, anchored: _State | None, *, read_only: bool) -> None:
        sql = self.connection
        if sql.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
            raise _damaged("a check of the file")
        for sha, digest in sql.execute("SELECT sha256, patients FROM cohorts").fetchall():
            rows = sql.execute("SELECT patient FROM members WHERE cohort = ?", (sha,))
            if digest_of_patients(sorted(patient for (patient,) in rows)) != digest:
                raise _damaged("a cohort's patients")
        if not read_only and self.meta("secret") != self._secret_id:
            raise BudgetError(
                "the privacy ledger goes with the secret that it was begun with: with another one "
                "its patients would look new",
                fix="Restore site.secret from a backup",
            )
        if not self._accept:
            self._compare(anchored, self._state())

    def _compare(self, anchored: _State | None, now: _State) -> None:
        if anchored is None:
            if now.counter:
                raise _damaged("its anchor is gone")
            return
        if anchored.id != now.id:
            raise _damaged("its anchor is another ledger's")
        if anchored.counter > now.counter:
            raise BudgetError(
                "the privacy ledger must not be older than what was charged",
                value=f"entry {now.counter} of {anchored.counter}",
                fix="Restore the newest copy of ledger.sqlite; an older one has forgotten charges",
            )
        # Where the database is ahead, the trainer was killed before it wrote the anchor.
        if anchored.counter == now.counter and anchored.sha256 != now.sha256:
            raise _damaged("an entry was changed")

    def _go_past(self, anchored: _State | None) -> None:
        counter = max(int(self.meta("counter")), anchored.counter if anchored else 0)
        with self.writing() as sql:
            sql.execute("UPDATE meta SET value = ? WHERE key = 'counter'", (str(counter),))
            sql.execute(_ADD_ONE, ("accepted",))

    def _state(self) -> _State:
        digest = hashlib.sha256()
        for table, key in _COUNTED:
            if not self._has(table):  # of a ledger that is about to be migrated
                continue
            for row in self.connection.execute(f"SELECT * FROM {table} ORDER BY {key}"):
                digest.update(json.dumps([table, *row]).encode() + b"\n")
        return _State(self.meta("id"), int(self.meta("counter")), digest.hexdigest())

    def _has(self, table: str) -> bool:
        sql = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?"
        return self.connection.execute(sql, (table,)).fetchone() is not None

    def meta(self, key: str) -> str:
        """What the ledger says of itself: id, counter, secret, accepted."""
        row = self.connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise _damaged("a check of the file")
        return str(row[0])


def _statements(version: int) -> tuple[str, ...]:
    """What brings a ledger from a version to this one."""
    steps = [one for step in _MIGRATIONS[version - _FIRST :] for one in step]
    return (*steps, f"PRAGMA user_version = {_VERSION}")


def accept_older(folder: Path, secret_id: str) -> None:
    """Go on with a ledger from an older copy, knowing that later charges are forgotten.

    The officer's decision. The ledger counts for ever how often it was taken.

    Raises
    ------
    BudgetError
        There is no whole ledger.
    """
    if not (folder / "ledger.sqlite").is_file():
        raise _damaged("the file is gone")
    Store(folder, secret_id=secret_id, accept_older=True).close()


def name_secret(secret: bytes) -> str:
    """What the ledger remembers the site's secret by."""
    return Pseudonyms(secret)("ledger", "secret")


def digest_of_patients(patients: Iterable[str]) -> str:
    """SHA-256 over pseudonyms in ascending order."""
    return hashlib.sha256("\n".join(patients).encode()).hexdigest()


@dataclass(frozen=True)
class _State:
    """How far a ledger has come."""

    id: str
    counter: int
    sha256: str

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def _read(anchor: Path) -> _State | None:
    try:
        value = json.loads(anchor.read_text())
        return _State(str(value["id"]), int(value["counter"]), str(value["sha256"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError):
        raise _damaged("its anchor") from None


def _unwritable(error: Exception) -> BudgetError:
    return BudgetError(
        RuleCode.LEDGER_WRITABLE,
        value=type(error).__name__,
        fix="Make room on the disk of the state folder, or give it to the user that runs this; "
        "nothing was released",
    )


def _damaged(what: str) -> BudgetError:
    return BudgetError(
        RuleCode.LEDGER_WHOLE,
        value=what,
        fix="Restore the newest copy of ledger.sqlite and ledger.anchor; a new one would forget "
        "what was spent",
    )
