"""A backup of a registry in PostgreSQL, put back over damage, and moved to SQLite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import text

from fedward_server.backup import backup
from fedward_server.config import ServerConfig, load_config
from fedward_server.registry import open_registry
from fedward_server.registry.database import connect
from fedward_server.restore import restore
from fedward_server.setup import SetupOptions, initialise


def new_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def empty(url: str) -> None:
    engine = connect(url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


def sites(config: ServerConfig) -> list[str]:
    registry = open_registry(config)
    found = [site.name for site in registry.sites.list()]
    registry.close()
    return found


def test_a_registry_in_postgresql_is_backed_up_and_put_back(
    postgres: str, tmp_path: Path, make_plan: Callable[..., Any]
) -> None:
    empty(postgres)
    config = load_config(initialise(tmp_path / "agg", SetupOptions(database=postgres)).config)
    registry = open_registry(config)
    for name in ("north", "south"):
        registry.sites.add(name, new_key())
    study = registry.studies.submit(make_plan(), ["north", "south"])
    registry.audit.add(actor="x", role="admin", address="", action="POST /", status=201)
    assert backup(config, tmp_path / "b.tar.gz", keys=True) > 0
    registry.sites.remove("north")
    registry.sites.add("late", new_key())
    registry.close()

    assert "registry.db" in restore(config, tmp_path / "b.tar.gz").parts
    assert sites(config) == ["north", "south"]
    registry = open_registry(config)
    assert registry.studies.get(study.id) == study
    assert [event.kind for event in registry.studies.events_after(study.id)] == ["submitted"]
    registry.sites.add("east", new_key())  # an id of its own, after those that came back
    registry.audit.add(actor="y", role="admin", address="", action="POST /", status=201)
    assert [one.actor for one in registry.audit.list()] == ["y", "x"]
    registry.close()

    there = config.model_copy(
        update={
            "database": config.database.model_copy(
                update={
                    "url": f"sqlite:///{config.server.state / 'before-restore' / 'registry.db'}"
                }
            )
        }
    )
    assert sites(there) == ["late", "south"]
    moved = config.model_copy(update={"database": config.database.model_copy(update={"url": ""})})
    restore(moved, tmp_path / "b.tar.gz")
    assert sites(moved) == ["north", "south"]
