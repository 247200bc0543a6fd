"""The page of `fedward-server`; ``python -m tools.docs.server > docs/server.md`` writes it anew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import typer
from click import Argument, Command, Group, Option, Parameter

from fedward_server.cli import app
from fedward_server.config import (
    ApiSection,
    DatabaseSection,
    LimitsSection,
    ServerConfig,
    ServerSection,
    SitesSection,
    TlsSection,
)
from tools.docs.schema_tables import fields_table

_HEAD: Final = """# `fedward-server`: commands and configuration

Every command and option, and every key of `server.toml`. What they are for stands on the page of
[the aggregator](aggregator.md). This page is generated from the program.

A command that talks to the service finds it by `--config` on the aggregator's own machine, and by
`--url`, `--token` and `--ca` from elsewhere. Each command ends with one of these
[exit codes](errors.md). With `--json` it prints one JSON object (`study watch`: one per line), also
when it fails: `error`, `exit_code`, `message`.
"""
_SECTIONS: Final = (
    ("The file", "", ServerConfig),
    ("Server section", "[server]", ServerSection),
    ("Sites section", "[sites]", SitesSection),
    ("Api section", "[api]", ApiSection),
    ("Tls section", "[tls]", TlsSection),
    ("Database section", "[database]", DatabaseSection),
    ("Limits section", "[limits]", LimitsSection),
)


def page() -> str:
    """The page in Markdown."""
    lines = [_HEAD]
    for name, command in commands(typer.main.get_command(app)):
        lines += _command(name, command)
    lines += ["# `server.toml`", "", "Relative paths are relative to the file's folder.", ""]
    for title, name, model in _SECTIONS:
        lines += [f"## {title}", "", *([f"`{name}`", ""] if name else []), *fields_table(model), ""]
    return "\n".join(lines)


def commands(command: Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Command]]:
    """Each command that does something, with its words."""
    if isinstance(command, Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    else:
        yield " ".join(path), command


def _command(name: str, command: Command) -> list[str]:
    words = [_argument(one) for one in command.params if isinstance(one, Argument)]
    return [
        f"## `fedward-server {name}`",
        "",
        "```",
        " ".join(["fedward-server", name, *words, "[options]"]),
        "```",
        "",
        command.help or "",
        "",
        "| argument or option | default | meaning |",
        "|---|---|---|",
        *(_row(one) for one in command.params),
        "",
    ]


def _row(one: Parameter) -> str:
    if isinstance(one, Argument):
        told: Any = getattr(one, "help", "")
        return f"| `{_argument(one)}` | required | {_sentence(told)} |"
    names = ", ".join(f"`{word}`" for word in one.opts)
    help_ = one.help if isinstance(one, Option) else ""
    variable = f" (or `{one.envvar}`)" if one.envvar else ""
    return f"| {names} | {_default(one)} | {_sentence(help_)}{variable} |"


def _argument(one: Argument) -> str:
    return one.metavar or str(one.name).upper()


def _default(one: Parameter) -> str:
    if one.required:
        return "required"
    value = one.default() if callable(one.default) else one.default
    if isinstance(value, bool) or value is None or str(value) in ("", "()", "[]"):
        return "off" if isinstance(value, bool) else "none"
    return f"`{value}`"


def _sentence(text: str | None) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", (text or "").strip())


if __name__ == "__main__":
    print(page(), end="")
