"""A backup taken while the service runs, and put back over damage."""

from __future__ import annotations

import sqlite3
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedward.errors import ConfigError, OutputError
from server.backup import backup, restore
from server.config import ServerConfig, load_config
from server.registry import open_registry
from server.setup import Wishes, initialise


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return load_config(initialise(tmp_path / "agg", Wishes()).config)


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
    assert restore(config, tmp_path / "b.tar.gz") == ["keys", "registry.db", "studies", "tls"]

    back = open_registry(config)
    assert back.studies.get(study).sites == ("north", "south")
    assert [site.name for site in back.sites.list()] == ["north", "south"]
    back.close()
    assert config.coordinator_key.read_bytes() == signing
    kept = config.study_folder(study) / "rounds" / "round-000001" / "state.json"
    assert kept.read_text() == "{}"
    aside = config.server.state / "before-restore"
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
