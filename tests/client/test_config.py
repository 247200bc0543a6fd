"""``site.toml``: what is accepted, and what a broken one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.config import load_config
from client.reference import page
from fedward.errors import ConfigError


def test_paths_are_relative_to_the_file(site: Path, export: Path) -> None:
    config = load_config(site)
    assert config.dataset("chest").root == export
    assert config.site.state == site.parent / "state"
    assert config.dataset("chest").as_task().classes == ("well", "sick")


@pytest.mark.parametrize(
    ("old", "new", "where", "rule"),
    [
        ("version = 1", "version = 2", "version", "must be 1"),
        ("[site]", "[site]\ncolour = 1", "site.colour", "not known"),
        ('name = "st-mary"', "name = 3", "site.name", "must be text"),
        ('task = "class', 'task = "guess', "datasets.chest.task", "must be"),
        ('["well", "sick"]', "[]", "datasets.chest.classes", "at least 1"),
        ('["DX"]', '["dx-ray"]', "datasets.chest.modality", "must be"),
        ("minimum_patients = 4", "minimum_patients = 0", "datasets.chest.minimum", "at least 1"),
        ("ward-7-doe", "elsewhere", "datasets.chest.root", "must exist"),
        ("[site]", '[site]\nstate = "ward-7-doe/state"', "site.state", "inside a dataset"),
        ("[site]", "[site", "TOML", "valid"),
    ],
)
def test_what_is_wrong_is_named(site: Path, old: str, new: str, where: str, rule: str) -> None:
    text = site.read_text()
    assert old in text
    site.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(site)
    assert where in str(caught.value)
    assert rule in str(caught.value)
    assert "ward-7-doe" not in str(caught.value)


def test_a_missing_file_is_named_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config") as caught:
        load_config(tmp_path / "none.toml")
    assert str(tmp_path) not in str(caught.value)


def test_the_reference_page_is_that_of_the_schema() -> None:
    docs = Path(__file__).parents[2] / "docs" / "site.md"
    assert docs.read_text("utf-8") == page()
