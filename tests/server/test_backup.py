"""A backup taken while the service runs, and put back over damage."""

from __future__ import annotations

import os
import sqlite3
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedward.errors import ConfigError, FedwardError, OutputError, ServiceError
from fedward.files import alone
from fedward_server.backup import backup
from fedward_server.config import ServerConfig, load_config
from fedward_server.registry import open_registry
from fedward_server.restore import restore
from fedward_server.setup import SetupOptions, initialise


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return load_config(initialise(tmp_path / "agg", SetupOptions()).config)


def fill(config: ServerConfig, plan: Any) -> str:
    """A site, a study and a checkpoint."""
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    registry = open_registry(config)
    registry.sites.add("north", pem.decode())
    registry.sites.add("south", _other_key())
    study = registry.studies.submit(plan, ["north", "south"])
    registry.close()
    rounds = config.study_folder(study.id) / "rounds" / "round-000001"
    rounds.mkdir(parents=True)
    (rounds / "state.json").write_text("{}")
    return study.id


def _other_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def test_what_was_backed_up_comes_back_over_damage(
    config: ServerConfig, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    study = fill(config, make_plan())
    live = open_registry(config)  # a service that runs
    assert backup(config, tmp_path / "b.tar.gz", keys=True) > 0
    assert (tmp_path / "b.tar.gz").stat().st_mode & 0o077 == 0
    live.close()
    signing = config.coordinator_key.read_bytes()

    (config.server.state / "registry.db").write_bytes(b"damaged")
    (config.study_folder(study) / "rounds" / "round-000001" / "state.json").write_text("damaged")
    config.coordinator_key.write_bytes(b"damaged")
    done = restore(config, tmp_path / "b.tar.gz")
    assert done.parts == ["keys", "registry.db", "studies", "tls"]

    back = open_registry(config)
    assert back.studies.get(study).sites == ("north", "south")
    assert [site.name for site in back.sites.list()] == ["north", "south"]
    back.close()
    assert config.coordinator_key.read_bytes() == signing
    kept = config.study_folder(study) / "rounds" / "round-000001" / "state.json"
    assert kept.read_text() == "{}"
    aside = config.server.state / done.aside
    assert (aside / "registry.db").read_bytes() == b"damaged"


def test_without_keys_no_key_is_in_it(
    config: ServerConfig, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    fill(config, make_plan())
    backup(config, tmp_path / "b.tar.gz", keys=False)
    with tarfile.open(tmp_path / "b.tar.gz") as archive:
        names = archive.getnames()
    assert not [name for name in names if name.startswith(("keys", "tls"))]
    with pytest.raises(OutputError, match="overwrites"):
        backup(config, tmp_path / "b.tar.gz", keys=False)


@pytest.mark.parametrize("content", [b"", b"no archive", b"cut"])
def test_what_is_no_backup_changes_nothing(
    config: ServerConfig, make_plan: Callable[..., Any], tmp_path: Path, content: bytes
) -> None:
    study = fill(config, make_plan())
    path = tmp_path / "b.tar.gz"
    backup(config, path, keys=True)
    path.write_bytes(path.read_bytes()[:-200] if content == b"cut" else content)
    with pytest.raises(ConfigError, match="whole archive"):
        restore(config, path)
    with sqlite3.connect(config.server.state / "registry.db") as registry:
        assert registry.execute("SELECT id FROM studies").fetchall() == [(study,)]
    registry.close()


def test_an_archive_that_reaches_outside_is_refused(config: ServerConfig, tmp_path: Path) -> None:
    path = tmp_path / "evil.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in (("FORMAT", "fedward aggregator backup 1\n"), ("../x", "evil")):
            (tmp_path / "t").write_text(text)
            archive.add(tmp_path / "t", name)
    with pytest.raises(ConfigError):
        restore(config, path)
    assert not (config.server.state.parent / "x").exists()


def archive(config: ServerConfig, tmp_path: Path) -> Path:
    path = tmp_path / "b.tar.gz"
    backup(config, path, keys=True)
    return path


def test_the_weights_that_plans_start_from_come_along(config: ServerConfig, tmp_path: Path) -> None:
    config.weights.mkdir()
    (config.weights / "start.pt").write_bytes(b"weights")
    path = archive(config, tmp_path)
    (config.weights / "start.pt").unlink()
    assert "weights" in restore(config, path).parts
    assert (config.weights / "start.pt").read_bytes() == b"weights"


def test_of_certificates_elsewhere_only_the_named_files_come_and_go(
    config: ServerConfig, tmp_path: Path
) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    places = {"certificate": "fullchain.pem", "key": "privkey.pem", "ca": "root.pem"}
    tls = config.tls.model_copy(update={key: etc / name for key, name in places.items()})
    for name in (*places.values(), "ca.key", "shadow"):
        (etc / name).write_text(f"old {name}")
    config = config.model_copy(update={"tls": tls})
    path = archive(config, tmp_path)
    with tarfile.open(path) as made:
        kept = {name for name in made.getnames() if name.startswith("tls")}
    assert kept == {"tls/server.crt", "tls/server.key", "tls/ca.crt", "tls/ca.key"}
    for name in (*places.values(), "shadow"):
        (etc / name).write_text(f"new {name}")
    done = restore(config, path)
    assert (etc / "shadow").read_text() == "new shadow"
    assert {(etc / name).read_text() for name in places.values()} == {
        f"old {name}" for name in places.values()
    }
    assert stat.S_IMODE((etc / "privkey.pem").stat().st_mode) == 0o600
    aside = config.server.state / done.aside / "tls" / "server.crt"
    assert aside.read_text() == "new fullchain.pem"


@pytest.mark.parametrize("holder", ["run", "service"])
def test_under_a_live_service_nothing_is_restored(
    config: ServerConfig, make_plan: Callable[..., Any], tmp_path: Path, holder: Any
) -> None:
    fill(config, make_plan())
    path = archive(config, tmp_path)
    with (
        alone(config.server.state, holder),
        pytest.raises(ServiceError, match="one aggregator at a time"),
    ):
        restore(config, path)
    assert not (config.server.state / "before-restore").exists()


def test_a_database_that_fails_costs_nothing_and_no_original_is_ever_deleted(
    config: ServerConfig,
    make_plan: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(config, make_plan())
    path = archive(config, tmp_path)
    config.coordinator_key.write_bytes(b"original")

    def fail(*anything: object) -> None:
        raise ServiceError("the registry's database must be reachable")

    with monkeypatch.context() as away:
        away.setattr("fedward_server.restore._put_registry", fail)
        with pytest.raises(ServiceError):
            restore(config, path)
    assert config.coordinator_key.read_bytes() == b"original"
    first, second = restore(config, path), restore(config, path)
    assert first.aside != second.aside
    kept = config.server.state / first.aside / "keys" / "coordinator.key"
    assert kept.read_bytes() == b"original"


def test_a_registry_that_is_missing_or_damaged_is_no_backup(
    config: ServerConfig, tmp_path: Path
) -> None:
    registry = config.server.state / "registry.db"
    for content in (b"damaged" * 1000, None):
        registry.unlink()
        if content is not None:
            registry.write_bytes(content)
        with pytest.raises(ConfigError, match="registry must be there, and whole"):
            backup(config, tmp_path / "b.tar.gz", keys=False)
    assert list(tmp_path.glob("*b.tar.gz*")) == [] and not registry.exists()


@pytest.mark.parametrize("name", ["none.tar.gz", "folder"])
def test_an_archive_that_is_not_there_is_told_as_that(
    config: ServerConfig, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="a backup must be a readable file"):
        restore(config, tmp_path / name)


def test_an_archive_that_is_damaged_anywhere_is_told_as_that(
    config: ServerConfig, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    fill(config, make_plan())
    (config.weights).mkdir()
    (config.weights / "w.pt").write_bytes(os.urandom(200_000))
    whole = archive(config, tmp_path).read_bytes()
    path = tmp_path / "cut.tar.gz"
    for place in range(20, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes(40) + whole[place + 40 :])
        try:
            restore(config, path)
        except FedwardError as error:
            assert isinstance(error, ConfigError), place


def test_what_was_written_last_is_kept_with_the_registry_that_is_replaced(
    config: ServerConfig, make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    path = archive(config, tmp_path)
    registry = config.server.state / "registry.db"
    live = sqlite3.connect(registry)
    live.execute("PRAGMA journal_mode=WAL")
    live.execute("CREATE TABLE late (x)")
    live.commit()
    wal = registry.with_name("registry.db-wal").read_bytes()
    done = restore(config, path)
    live.close()
    assert (config.server.state / done.aside / "registry.db-wal").read_bytes() == wal
    assert not registry.with_name("registry.db-wal").exists()
