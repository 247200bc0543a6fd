"""What a container's health check is told, and what the link's own file says."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedward.errors import ConfigError, OutputError, ProtocolError
from fedward_client.cli import app
from fedward_client.config import SiteConfig, config_from
from fedward_client.enrol import enrol_configured
from fedward_client.health import examine
from fedward_client.link.state import LinkState, link_file, parse_state, read_state, write_state

CONTENT = {
    "version": 1,
    "site": {"name": "north"},
    "server": {"address": "127.0.0.1:9443", "ca": "ca.pem"},
    "datasets": {"chest": {"root": "images", "task": "classification", "classes": ["a", "b"]}},
}


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    return config_from(CONTENT, tmp_path, datasets_here=False)


def tell(config: SiteConfig, **fields: object) -> Path:
    assert config.server is not None
    path = link_file(config.server.state)
    write_state(path, LinkState(**fields))  # type: ignore[arg-type]
    return path


def test_a_connector_is_well_with_link_and_trainer(config: SiteConfig) -> None:
    assert not examine(config, "connector").healthy
    tell(config, state="online", trainer="attached")
    assert examine(config, "connector").healthy
    for state, trainer in (("down", "attached"), ("refused", "attached"), ("online", "gone")):
        tell(config, state=state, trainer=trainer)
        found = examine(config, "connector")
        assert not found.healthy
        assert state in found.found and trainer in found.found


def test_a_link_without_a_sign_of_life_is_not_well(config: SiteConfig) -> None:
    path = tell(config, state="online", trainer="attached")
    old = time.time() - 100
    os.utime(path, (old, old))
    found = examine(config, "connector")
    assert not found.healthy and "no sign of life for 10" in found.found


def test_a_site_without_an_aggregator_or_a_trainer_is_not_well(tmp_path: Path) -> None:
    alone = config_from({**CONTENT, "server": None}, tmp_path, datasets_here=False)
    assert not examine(alone, "connector").healthy
    assert not examine(alone, "trainer").healthy
    with pytest.raises(ConfigError, match="aggregator"):
        enrol_configured(alone, tmp_path / "site.toml")


def test_the_command_ends_with_one_and_names_no_place(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'version = 1\n[site]\nname = "north"\n[datasets.chest]\nroot = "images"\n'
        'task = "classification"\nclasses = ["a", "b"]\n'
    )
    words = ["health", "trainer", "--config", str(tmp_path / "site.toml"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {
        "process": "trainer",
        "healthy": False,
        "found": "the daemon must run",
    }


def test_a_key_is_made_once_and_only_where_it_can_be(tmp_path: Path, config: SiteConfig) -> None:
    made = enrol_configured(config, tmp_path / "site.toml")
    assert "BEGIN PUBLIC KEY" in made.public_key
    with pytest.raises(ConfigError, match="one key"):
        enrol_configured(config, tmp_path / "site.toml")
    other = config_from(
        {**CONTENT, "server": {"address": "a:1", "ca": "ca.pem", "state": "/dev/null/x"}},
        tmp_path,
        datasets_here=False,
    )
    with pytest.raises(OutputError, match="writable"):
        enrol_configured(other, tmp_path / "site.toml")


def test_enrol_takes_either_a_configuration_or_what_it_would_say(tmp_path: Path) -> None:
    for words in ([], ["--name", "north"], ["--name", "north", "--config", "site.toml"]):
        assert CliRunner().invoke(app, ["enrol", *words]).exit_code == 2


@pytest.mark.parametrize("text", ["", "[]", '{"state": 1}', '{"other": ""}', "x" * 9000])
def test_only_a_link_is_a_link(text: str, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError):
        parse_state(text)
    (tmp_path / "link.json").write_text(text)
    with pytest.raises(ProtocolError):
        read_state(tmp_path / "link.json")


def test_a_full_disk_costs_the_file_alone() -> None:
    write_state(Path("/dev/full/link.json"), LinkState())
