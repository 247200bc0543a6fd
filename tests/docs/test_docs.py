"""The pages are complete: each command, option, strategy and setting, and no link leads nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from click import Command, Group, Option

from fedward.plan.settings import SETTINGS
from simulation.cli import app
from strategies.registry import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
# Written by `make bench`, which takes hours: a fresh copy may lack them.
BENCHMARKS = {"accuracy.md", "dicom.md", "dp.md", "simulation.md"}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def commands(command: Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Command]]:
    """Each command that does something, with its words."""
    if isinstance(command, Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    else:
        yield " ".join(path), command


ALL = dict(commands(typer.main.get_command(app)))


def sections(text: str, level: str = "##") -> dict[str, str]:
    """Text under each heading of a level, by heading."""
    parts = re.split(rf"^{level} (.+)$", text, flags=re.MULTILINE)
    return {name.strip("` "): body for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_commands_are_found() -> None:
    assert set(ALL) == {"run", "demo", "export", "plan check"}


@pytest.mark.parametrize("name", ALL)
def test_each_command_and_option_is_documented(name: str) -> None:
    page = sections((DOCS / "simulate.md").read_text("utf-8"))
    assert f"fedward-simulate {name}" in page
    for parameter in ALL[name].params:
        words = parameter.opts if isinstance(parameter, Option) else [str(parameter.name).upper()]
        for word in words:
            assert f"| `{word}` |" in page[f"fedward-simulate {name}"], f"{name} {word}"


@pytest.mark.parametrize("name", ALL)
def test_documented_options_exist(name: str) -> None:
    page = sections((DOCS / "simulate.md").read_text("utf-8"))[f"fedward-simulate {name}"]
    known = {word for parameter in ALL[name].params for word in parameter.opts}
    assert set(re.findall(r"^\| `(--[a-z-]+)` \|", page, re.MULTILINE)) <= known


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_each_strategy_and_setting_is_documented_with_its_default(name: str) -> None:
    page = sections((DOCS / "strategies.md").read_text("utf-8"))
    assert "arxiv.org/abs/" in page[name]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page[name], re.MULTILINE))
    expected = {
        key: "required" if setting.default is None else f"{setting.default:g}"
        for key, setting in SETTINGS[name].items()  # type: ignore[index]
    }
    assert rows == expected


def test_the_documented_strategies_are_those_that_can_be_built() -> None:
    assert set(STRATEGIES) == set(SETTINGS)


def anchors(path: Path) -> set[str]:
    """What a link may point at within a page."""
    text = path.read_text("utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }
    return made | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_no_link_is_broken(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.is_relative_to(ROOT), link
        if target.parent.name == "benchmarks" and target.name in BENCHMARKS:
            continue
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_each_page_is_linked_from_the_index() -> None:
    linked = set(LINK.findall((DOCS / "index.md").read_text("utf-8")))
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= linked


def test_each_picture_is_used() -> None:
    used = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in LINK.findall(page.read_text("utf-8"))
    }
    assert {*DOCS.glob("*.png"), *DOCS.glob("*.svg")} <= used
