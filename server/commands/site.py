"""``fedward-server site``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedward.console import Console, print_json, say
from fedward.errors import ConfigError
from server.commands.options import SERVER, Ca, Config, Json, Token, Url, api
from server.place import at

site_app = typer.Typer(help="Enrol hospitals, list them, cut them off.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="the site's name")]
Key = Annotated[Path, typer.Argument(help="its public key, PEM")]


@site_app.command("add")
def add(
    name: Name, key: Key, config: Config = SERVER, url: Url = "", token: Token = "",
    ca: Ca = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Enrol a hospital by its public key."""
    body = {"name": name, "public_key": _read(key)}
    made = api(config, url, token, ca).call("POST", "/v1/sites", body)
    _told(made, f"{name} is enrolled. Compare by telephone: {made['fingerprint']}", as_json=as_json)


@site_app.command("list")
def list_sites(
    config: Config = SERVER, url: Url = "", token: Token = "", ca: Ca = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Every enrolled hospital: online, last seen, version, datasets, studies."""
    found = api(config, url, token, ca).call("GET", "/v1/sites")
    if as_json:
        print_json({"sites": found})
        return
    table = Table("site", "status", "last seen", "version", "datasets", "studies", "state")
    for one in found:
        table.add_row(
            one["name"], one["status"], one["last_seen"][:19], one["version"],
            "\n".join(map(_dataset, one["datasets"])), ", ".join(one["studies"]),
            one["state"],
        )  # fmt: skip
    Console().print(table)


@site_app.command("remove")
def remove(
    name: Name, config: Config = SERVER, url: Url = "", token: Token = "", ca: Ca = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Cut a hospital off at once, also in the middle of a round."""
    made = api(config, url, token, ca).call("DELETE", at("sites", name))
    _told(made, f"{name} is cut off.", as_json=as_json)


@site_app.command("rotate")
def rotate(
    name: Name, key: Key, config: Config = SERVER, url: Url = "", token: Token = "",
    ca: Ca = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Take another key for a hospital; the old one ends at once."""
    body = {"public_key": _read(key)}
    made = api(config, url, token, ca).call("POST", at("sites", name, "rotate"), body)
    _told(made, f"{name} has a new key: {made['fingerprint']}", as_json=as_json)


@site_app.command("release")
def release(
    name: Name, config: Config = SERVER, url: Url = "", token: Token = "", ca: Ca = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """End a hospital's quarantine."""
    made = api(config, url, token, ca).call("POST", at("sites", name, "release"))
    _told(made, f"{name} takes part again.", as_json=as_json)


def _dataset(facts: dict[str, Any]) -> str:
    name = f"{facts['dataset']}: " if facts["dataset"] else ""
    return f"{name}{facts['patients']} patients, {facts['images']} images"


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            "a public key must be a readable PEM file", value=path.name,
            fix="Use the site.pub that `fedward-client enrol` made", where="KEY",
        ) from None  # fmt: skip


def _told(made: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(made)
    else:
        say(text)
