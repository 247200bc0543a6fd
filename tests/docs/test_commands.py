"""Every command on a page is one that the programs have, with options and values that they take."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from click import ClickException, Command, Context, Group

from fedward.plan import load_plan
from fedward_client.cli import app as client
from fedward_server.cli import app as server
from fedward_simulation.cli import app as simulate

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    "fedward-simulate": typer.main.get_command(simulate),
    "fedward-client": typer.main.get_command(client),
    "fedward-server": typer.main.get_command(server),
}
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# The form of a command, as at the head of its section.
FORM = re.compile(r"\[options\]|\[--|\.\.\.|\bPLAN\b|\bRUN\b|\bFOLDER\b|\[NAME\]|\bPATH\b|\bDIR\b")


def lines() -> Iterator[tuple[str, str]]:
    """Page and command, what stands before the program's name left out."""
    for page in PAGES:
        for kind, block in BLOCK.findall(page.read_text("utf-8")):
            if kind not in ("", "sh"):
                continue
            for line in re.sub(r"\$\(.*?\)", "X", block.replace("\\\n", " ")).splitlines():
                # The last one: users have the names of programs too.
                found = re.search(r"^(?:.*[\s/])?(fedward-(?:simulate|client|server) .*)$", line)
                if "sudo install " in line:
                    continue
                if found and not FORM.search(line) and "…" not in line:
                    yield page.name, re.split(r" [|<>&;]", found[1])[0].rstrip(" &")


LINES = sorted(set(lines()))
# Who runs the commands of a page as they stand there, with their own values.
RUN_BY = {
    "README.md": "tests/docs/test_readme.py",
    "first-study.md": "tests/journeys/test_laptop.py",
    "joining.md": "tests/journeys/test_hospital.py",
    "aggregator.md": "tests/journeys/test_hospital.py",
    "predict.md": "tests/journeys/test_hospital.py",
    "explain.md": "tests/journeys/test_hospital.py",
    "simulate.md": "tests/journeys/test_command_line.py",
    "hospital-data.md": "tests/client/test_hospital_data_page.py",
}
# Why the others are only parsed here, and who runs their like.
NOT_RUN = {
    r"install\.md": "root, systemd or containers; docker/check runs them",
    r"pacs\.md|predict\.md .* (predict .* --store|store) ": "a PACS; tests/client/importer has one",
    r"predict\.md .* watch ": "a PACS, and no end; tests/client/predict/test_watch.py",
    r"production\.md": "folders of root, PostgreSQL; tests/server/test_backup.py, test_setup.py",
    r"ledger\.md": "a lost ledger; tests/client/ledger/test_trust.py",
}


def parse(command: Command, words: list[str], parent: Context | None = None) -> dict[str, Any]:
    """What a command makes of its words; raises for one that it does not take."""
    context = Context(command, parent=parent, info_name=command.name)
    if isinstance(command, Group):
        name, *rest = words
        inner = command.get_command(context, name)
        if inner is None:
            raise ClickException(f"no command {name}")
        return parse(inner, rest, context)
    values, others, _ = command.make_parser(context).parse_args(list(words))
    if others:
        raise ClickException(f"not taken: {others}")
    for parameter in command.params:
        value, _ = parameter.consume_value(context, values)
        parameter.type_cast_value(context, value)
    return dict(values)


def test_the_pages_have_commands() -> None:
    assert len(LINES) > 35


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_takes_what_a_page_gives_it(page: str, line: str) -> None:
    program, *words = shlex.split(line)
    try:
        parse(PROGRAMS[program], words)
    except ClickException as error:
        pytest.fail(f"{page}: {line}: {error.format_message()}")


def test_every_command_runs_somewhere_or_says_why_not() -> None:
    apart = [one for one in LINES if any(re.match(rule, f"{one[0]} {one[1]} ") for rule in NOT_RUN)]
    assert {page for page, _ in LINES} == {*RUN_BY} | {page for page, _ in apart}
    for page, test in RUN_BY.items():
        assert page in (ROOT / test).read_text("utf-8"), f"{test} must follow {page}"
    for named in re.findall(r"tests/[\w/]+(?:\.py)?", " ".join(NOT_RUN.values())):
        assert (ROOT / named).exists(), named


def leaves(command: Command, path: tuple[str, ...]) -> Iterator[tuple[str, Command]]:
    """Each command that does something, with its words."""
    if isinstance(command, Group):
        for name, inner in command.commands.items():
            yield from leaves(inner, (*path, name))
    else:
        yield " ".join(path), command


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_an_example_for_each_command_that_wants_words(program: str) -> None:
    for words, command in leaves(PROGRAMS[program], (program,)):
        example = (command.epilog or "").removeprefix("Example: ")
        if example or any(one.required for one in command.params):
            assert example.startswith(words), words
            parse(PROGRAMS[program], shlex.split(example)[1:])


@pytest.mark.parametrize(("page", "line"), [one for one in LINES if " study submit " in one[1]])
def test_a_study_that_a_page_submits_can_start_and_suits_the_default_policy(
    page: str, line: str
) -> None:
    words = shlex.split(line)
    plan, sites = words[words.index("submit") + 1], words[words.index("--sites") + 1].split(",")
    if plan == "/dev/stdin":
        text = next(p for p in PAGES if p.name == page).read_text("utf-8")
        plan = re.search(r"--sites " + ",".join(sites) + r" < (\S+)", text)[1]  # type: ignore[index]
    if not plan.startswith("studies/"):
        return  # the page itself shows the plan
    loaded = load_plan(ROOT / plan)
    assert loaded.participation.sites <= len(sites)
    assert loaded.privacy.on and (loaded.privacy.epsilon or 0) <= 8
