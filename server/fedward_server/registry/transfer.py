"""Copy a registry from one database to another, whichever they are."""

from __future__ import annotations

from sqlalchemy import Engine, delete, func, insert, select
from sqlalchemy.exc import SQLAlchemyError

from fedward.errors import ServiceError
from fedward_server.registry.database import open_database, reading
from fedward_server.registry.schema import metadata


def copy_registry(source: str, target: str) -> None:
    """Make the target hold what the source holds, of one moment, and nothing else.

    Parameters
    ----------
    source, target : str
        SQLAlchemy URLs; both are brought to the newest schema.

    Raises
    ------
    ConfigError, ServiceError
        A database is damaged or newer than this release, or cannot be reached or written.
    """
    old = open_database(source)
    try:
        new = open_database(target)
        try:
            _copy(old, new)
        except SQLAlchemyError as error:
            raise ServiceError(
                "a registry must be copied whole, or not at all",
                value=type(error).__name__,
                fix="Check the database's server and the disks",
                where="database.url",
            ) from None
        finally:
            new.dispose()
    finally:
        old.dispose()


def _copy(old: Engine, new: Engine) -> None:
    with reading(old) as read, new.begin() as write:
        for table in reversed(metadata.sorted_tables):
            write.execute(delete(table))
        for table in metadata.sorted_tables:
            rows = [dict(row._mapping) for row in read.execute(select(table))]
            if rows:
                write.execute(insert(table), rows)
            if rows and new.dialect.name == "postgresql" and "id" in table.c:
                # Rows with ids of their own leave the next id of a sequence where it was.
                sequence = func.pg_get_serial_sequence(table.name, "id")
                if write.execute(select(sequence)).scalar_one() is not None:
                    write.execute(select(func.setval(sequence, func.max(table.c.id))))
