"""CONTRIBUTING.md and docs/develop.md name only paths, packages and commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEVELOP = ROOT / "docs" / "develop.md"
TEXTS = {path.name: path.read_text("utf-8") for path in (DEVELOP, ROOT / "CONTRIBUTING.md")}
ROOTS = (
    "fedward",
    "client/fedward_client",
    "server/fedward_server",
    "strategies/fedward_strategies",
    "simulation/fedward_simulation",
)
BIN = Path(sys.executable).parent
TEST = re.compile(r"^def (test_\w+)\(", re.MULTILINE)
PATH = re.compile(r"`([\w.-]*(?:/[\w.-]*)+|[\w-]+\.(?:md|toml|txt|py))(?:::(\w+))?`")
# Made by a command of the page.
MADE = {"dist/"}


def named(text: str) -> Iterator[tuple[str, str]]:
    """Each path in a text, and the name of a definition in it or nothing."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from PATH.findall(prose)


def lines(text: str) -> list[str]:
    """The commands of a text: its code blocks, and what stands in prose or in a table."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"`((?:make|python|sudo python|\.venv/bin/\w[\w-]*) [^`]+)`", prose)
    return [line for block in blocks for line in block.splitlines() if line] + inline


COMMANDS = sorted({line for text in TEXTS.values() for line in lines(text)})


@pytest.mark.parametrize("page", TEXTS)
def test_each_path_is_there_and_defines_what_is_named(page: str) -> None:
    found = list(named(TEXTS[page]))
    assert len(found) > 10
    for path, name in found:
        if path in MADE:
            continue
        place = ROOT / path
        assert place.exists(), path
        assert not path.endswith("/") or place.is_dir(), path
        if name:
            defined = rf"^\s*(?:class |def )?{re.escape(name)}\b\s*[(:=\[]"
            assert re.search(defined, place.read_text("utf-8"), re.MULTILINE), f"{path}::{name}"


def packages() -> set[str]:
    """Every package that is shipped, as a folder."""
    files = [path for root in ROOTS for path in (ROOT / root).rglob("*.py")]
    return {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in files}


def test_each_package_has_a_row() -> None:
    table = TEXTS["develop.md"].partition("## The packages")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w/]+/)` \| (.+) \|$", table, re.MULTILINE))
    shipped = {row for row in rows if row.startswith(tuple(f"{root}/" for root in ROOTS))}
    assert shipped == packages()
    assert all(sentence.endswith(".") for sentence in rows.values())


def test_the_picture_shows_every_package_in_its_place() -> None:
    picture = (ROOT / "docs" / "packages.svg").read_text("utf-8")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", picture)
    assert set(ROOTS) <= set(texts)
    top = {f"{package}/" for package in ROOTS}
    direct = {path for path in packages() if path.count("/") > 1 and path not in top}
    inner = {f"{Path(path).name}/" for path in direct if f"{Path(path).parent.as_posix()}/" in top}
    assert {text for text in texts if re.fullmatch(r"\w+/", text)} == inner


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_can_be_run(line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "sudo":
        program, *arguments = arguments
    if program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif "pytest" in arguments:
        # Not collected: that imports torch, and takes longer than all else here.
        (folder,) = (ROOT / word for word in arguments if word.startswith("tests/"))
        files = [folder] if folder.is_file() else sorted(folder.rglob("test_*.py"))
        tests = [name for path in files for name in re.findall(TEST, path.read_text("utf-8"))]
        asked = dict(pairwise(arguments))
        assert [name for name in tests if asked.get("-k", "") in name], line
        assert asked.get("-m") in ("pytest", "not integration"), line
    elif arguments[:1] == ["-m"]:
        assert find_spec(arguments[1]), line
    elif program == "python":
        assert (ROOT / arguments[0] / "__main__.py").is_file(), line
    else:
        assert (BIN / Path(program).name).is_file(), line


def test_the_checks_before_a_commit_are_those_of_make_check() -> None:
    before = TEXTS["CONTRIBUTING.md"].partition("Before a commit:")[2]
    told = re.findall(r"```sh\n(.*?)```", before, re.DOTALL)[0].splitlines()[:4]
    # This test runs under `make test` too, where make would name the folders that it enters.
    command = ["make", "-n", "--no-print-directory", "check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-4:] == told
