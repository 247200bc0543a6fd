"""Open the registry's database, whichever it is, and bring it to the newest schema."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import NoSuchModuleError, OperationalError, SQLAlchemyError

from fedward.errors import ConfigError, ServiceError

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_LOCK: Final = 7_301_554_291  # any number, the same in every process
_WAIT_SECONDS: Final = 30


def open_database(url: str) -> Engine:
    """Connect, and migrate if the schema is older than this release.

    Parameters
    ----------
    url : str
        SQLAlchemy's: ``sqlite:///PATH`` or ``postgresql+psycopg://…``.

    Raises
    ------
    ServiceError
        The database cannot be reached, or has no room; later it may.
    ConfigError
        It is damaged, or newer than this release.
    """
    engine = connect(url)
    if engine.dialect.name == "sqlite" and engine.url.database:
        # SQLite gives its further files the mode of this one; an empty file is an empty database.
        with suppress(OSError):
            os.close(os.open(engine.url.database, os.O_RDWR | os.O_CREAT, 0o600))
    try:
        _migrate(engine)
    except OperationalError:
        engine.dispose()
        raise ServiceError(
            "the registry's database must be reachable, with room on its disk",
            fix="Check database.url, the database's server and the disk",
            where="database.url",
        ) from None
    except SQLAlchemyError as error:
        engine.dispose()
        raise ConfigError(
            "the registry's database must be whole",
            value=type(error).__name__,
            fix="Check database.url, or restore a backup",
            where="database.url",
        ) from None
    except ConfigError:
        engine.dispose()
        raise
    return engine


def connect(url: str) -> Engine:
    """An engine for a database as it is (see :func:`open_database`)."""
    try:
        engine = create_engine(url, pool_pre_ping=True)
    except (NoSuchModuleError, ModuleNotFoundError):
        raise ConfigError(
            "the database's driver must be installed",
            fix="pip install 'fedward[postgres]'",
            where="database.url",
        ) from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads; it sees one moment and waits for nobody."""
    options: dict[str, Any] = {"fedward_reads": True}
    if engine.dialect.name == "postgresql":
        options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


def _prepare_sqlite(connection: sqlite3.Connection, record: object) -> None:
    # The driver's own transactions start late and end at schema changes: take them over.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout={_WAIT_SECONDS * 1000}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # Taking the write lock at once: two that read first and write later would refuse each other.
    reads = connection.get_execution_options().get("fedward_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def revisions() -> list[str]:
    """All schema versions, oldest first."""
    script = ScriptDirectory.from_config(_config())
    return [one.revision for one in script.walk_revisions()][::-1]


def _migrate(engine: Engine) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        upgrade(connection)


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring a database to a schema version, in the transaction that is open.

    Raises
    ------
    ConfigError
        It was made by a newer release.
    """
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in revisions():
        raise ConfigError(
            "the registry must not be newer than this release",
            value=f"schema {current}",
            fix="Install the release that wrote it, or restore an older backup",
            where="database.url",
        )
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
