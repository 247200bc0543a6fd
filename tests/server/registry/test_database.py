from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from fedward.errors import ConfigError, ServiceError
from fedward_server.registry.database import connect, open_database, revisions, upgrade
from fedward_server.registry.schema import metadata


def test_a_database_of_the_first_schema_is_brought_forward_with_its_rows(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    engine = connect(url)
    with engine.begin() as connection:
        upgrade(connection, revisions()[0])
        connection.execute(
            text(
                "INSERT INTO sites (name, public_key, fingerprint, state, added, updated)"
                " VALUES ('north', 'k', 'f', 'active', 't', 't')"
            )
        )
    assert "audit" not in inspect(engine).get_table_names()
    engine.dispose()
    engine = open_database(url)
    assert "audit" in inspect(engine).get_table_names()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT name, node_id FROM sites")).one() == ("north", "")
    engine.dispose()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_migrations_lead_to_the_schema_of_the_code(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "sqlite":
        url = f"sqlite:///{tmp_path / 'new.db'}"
    else:
        url = request.getfixturevalue("postgres")
    engine = open_database(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_the_revisions_are_one_line() -> None:
    assert revisions() == [f"{n:04d}" for n in range(1, len(revisions()) + 1)]


def test_many_that_open_at_once_migrate_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    code = (
        "import sys; from fedward_server.registry import database as d; "
        "d.open_database(sys.argv[1])"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, url]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    engine = open_database(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(ConfigError, match=r"newer than this release \(got schema 9999\)"):
        open_database(url)


def test_a_damaged_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.db").write_bytes(b"not a database at all" * 500)
    with pytest.raises(ConfigError, match=r"must be whole .* restore a backup"):
        open_database(f"sqlite:///{tmp_path / 'bad.db'}")


def test_a_database_that_is_not_there_is_told(tmp_path: Path) -> None:
    # Not the end of the service: it starts again until the database is back.
    with pytest.raises(ServiceError, match="must be reachable"):
        open_database(f"sqlite:///{tmp_path / 'nowhere' / 'x.db'}")


def test_a_quarantine_of_an_older_release_stays_in_the_studies_that_go_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    engine = connect(url)
    with engine.begin() as connection:
        upgrade(connection, "0002")
        connection.execute(
            text(
                "INSERT INTO sites (name, public_key, fingerprint, state, reason, added, updated)"
                " VALUES ('north', 'k', 'f', 'quarantined', 'not finite', 't', 't')"
            )
        )
        for study, sites, state in (
            ("a", '["north"]', "running"),
            ("b", '["south"]', "running"),
            ("c", '["north"]', "finished"),
        ):
            connection.execute(
                text(
                    "INSERT INTO studies (id, name, plan, plan_sha256, coordinator, signature,"
                    " sites, quorum, deadline, seed, state, wanted, created, updated)"
                    " VALUES (:id, 'n', '', '', '', '', :sites, 1, 1, 0, :state, 'run', 't', 't')"
                ),
                {"id": study, "sites": sites, "state": state},
            )
    engine.dispose()
    engine = open_database(url)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT study, site, reason FROM quarantines")).all()
        assert [tuple(row) for row in found] == [("a", "north", "not finite")]
        assert connection.execute(text("SELECT state FROM sites")).scalar_one() == "active"
    engine.dispose()
