"""The pages are complete: each command, option, strategy and setting, and no link leads nowhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import typer
from click import Command, Group, Option

from fedward.strategies import STRATEGIES
from fedward_simulation.cli import app
from fedward_strategies.registry import build_strategy
from fedward_strategies.settings import StrategySettings
from tools.docs.strategies import strategies_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(DOCS.glob("*.md")),
]
# Written by `make bench`, which takes hours: a fresh copy may lack them.
BENCHMARKS = {
    "accuracy.md",
    "dicom.md",
    "dp.md",
    "privacy.md",
    "simulation.md",
    "transfer.md",
}
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
    assert set(ALL) == {
        "run",
        "audit",
        "demo",
        "init",
        "cohort",
        "evaluate",
        "export",
        "plan check",
        "plan suggest",
    }


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


@pytest.mark.parametrize("name", ALL)
def test_documented_defaults_are_those_of_the_program(name: str) -> None:
    page = sections((DOCS / "simulate.md").read_text("utf-8"))[f"fedward-simulate {name}"]
    told = dict(re.findall(r"^\| `(--[a-z-]+)` \| `([^`|]*)` \|", page, re.MULTILINE))
    for parameter in ALL[name].params:
        if isinstance(parameter, Option) and _has_default(parameter):
            assert told.get(parameter.opts[0]) == _plain(parameter.default), parameter.opts[0]


def _has_default(option: Option) -> bool:
    return not option.is_flag and option.default not in (None, "", [], ())


def _plain(value: object) -> str:
    return str(getattr(value, "value", value))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_each_strategy_and_setting_is_documented_with_its_default(name: str) -> None:
    page = sections((DOCS / "strategies.md").read_text("utf-8"))
    assert "arxiv.org/abs/" in page[name]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page[name], re.MULTILINE))
    expected = {
        key: "required" if setting.default is None else f"{setting.default:g}"
        for key, setting in STRATEGIES[name].settings.items()
    }
    assert rows == expected


def test_the_documented_strategies_are_those_that_can_be_built() -> None:
    page = (DOCS / "strategies.md").read_text("utf-8")
    assert page == strategies_page(), (
        "regenerate: python -m tools.docs.strategies > docs/strategies.md"
    )
    for name, spec in STRATEGIES.items():
        needed = {key: 1.0 for key, setting in spec.settings.items() if setting.default is None}
        build_strategy(name, StrategySettings(values=needed))


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


def test_the_pages_of_the_server_are_those_of_the_program() -> None:
    from tools.docs import api
    from tools.docs.server import page

    written = {name: (DOCS / name).read_text("utf-8") for name in ("server.md", "api.md")}
    assert written["server.md"] == page(), "regenerate: make docs"
    assert written["api.md"] == api.page(), "regenerate: make docs"


def test_each_server_command_is_on_its_page_with_a_meaning_for_each_word() -> None:
    from fedward_server.cli import app as server
    from tools.docs.server import commands as of_server

    text = (DOCS / "server.md").read_text("utf-8")
    page = sections(text)
    found = dict(of_server(typer.main.get_command(server)))
    assert {"init", "run", "site add", "study submit", "study export", "backup"} <= set(found)
    for name, command in found.items():
        body = page[f"fedward-server {name}"]
        for parameter in command.params:
            word = (
                parameter.opts[0]
                if isinstance(parameter, Option)
                else parameter.human_readable_name
            )
            assert f"`{word}`" in body, f"{name} {word}"
    assert not re.findall(r"^\| `[^|]+\| [^|]+ \|\s*\|$", text, re.MULTILINE)


def test_each_call_of_the_api_says_which_role_it_needs() -> None:
    from tools.docs.api import description

    told = description()
    assert told["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for path, calls in told["paths"].items():
        for method, call in calls.items():
            open_ = path in ("/healthz", "/readyz", "/metrics")
            assert ("x-role" in call) != open_, path
            if method != "get" and not open_:
                assert call["x-role"] in ("coordinator", "admin"), path


def log_messages(room: str) -> Iterator[str]:
    """What a room writes into its log: the first argument of each call of its logger."""
    supervisor = ROOT / "fedward" / "child_process.py"  # with the logger that it is given
    for path in (supervisor, *(ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            loggers = ("log", "self.log") if path == supervisor else ("_LOG",)
            if ast.unparse(node.func.value) in loggers:
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    yield str(first.value)


@pytest.mark.parametrize(
    ("room", "heading"), [("server", "The aggregator's log"), ("client", "The hospital's log")]
)
def test_each_log_message_is_in_the_operations_guide(room: str, heading: str) -> None:
    body = sections((DOCS / "operations.md").read_text("utf-8"))[heading]
    written, told = (
        set(log_messages(room)),
        set(re.findall(r"^\| `([^`]+)` \|", body, re.MULTILINE)),
    )
    assert len(written) > 5
    assert written <= told
    from fedward_client.trainer.process import NETWORKED, WALLS_DOWN

    links = {"starting", "online", "down", "refused"}
    waits = {"waiting for an old connection to lapse", "waiting for the trainer"}
    known = written | ({NETWORKED, WALLS_DOWN} | links | waits if room == "client" else set())
    assert told <= known, "the page tells of messages that nobody writes"


def test_each_state_event_and_kind_is_in_the_operations_guide() -> None:
    from fedward.protocol import RefusalKind
    from fedward_server.registry.records import State

    page = sections((DOCS / "operations.md").read_text("utf-8"))
    told = {
        name: set(re.findall(r"^\| `(\w+)` \|", body, re.MULTILINE)) for name, body in page.items()
    }
    assert told["Why a site has no update"] == {*get_args(RefusalKind), "silent", "invalid"}
    kinds = set()
    for path in (ROOT / "server").rglob("*.py"):
        text = path.read_text("utf-8")
        kinds |= set(re.findall(r'return "(\w+)", \{', text))
        kinds |= set(re.findall(r'(?:_tell\(|_add_event\(\s*connection, .*?)"(\w+)", ', text))
    assert {"submitted", "round", "refused", "restored"} <= kinds
    assert told["What a study tells"] == kinds | set(get_args(State))


def test_the_threat_model_names_every_attack_and_nothing_that_is_not_there() -> None:
    page = (DOCS / "threat-model.md").read_text("utf-8")
    named = set(re.findall(r"`((?:tests/[\w/]+/)?test_\w+\.py)`", page))
    attacks = {path.name for path in (ROOT / "tests" / "attacks").glob("test_*.py")}
    for name in named:
        path = ROOT / name if "/" in name else ROOT / "tests" / "attacks" / name
        assert path.is_file(), name
    assert attacks <= {Path(name).name for name in named}
