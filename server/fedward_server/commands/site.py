"""``fedward-server site``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedward.console import Console, Table, moment, print_json, say
from fedward.errors import ConfigError
from fedward_server.cli_profile import at
from fedward_server.commands.options import SERVER, Ca, Config, Json, Token, Url, api

site_app = typer.Typer(help="Enrol hospitals, list them, cut them off.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="the site's name")]
Key = Annotated[Path, typer.Argument(help="its public key, PEM")]
MaxPatients = Annotated[
    int | None, typer.Option(min=0, help="the most patients it may claim; 0: not checked")
]
MaxImages = Annotated[
    int | None, typer.Option(min=0, help="the most images it may claim; 0: not checked")
]


@site_app.command("add", epilog="Example: fedward-server site add north site.pub")
def add(
    name: Name,
    key: Key,
    max_patients: MaxPatients = None,
    max_images: MaxImages = None,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Enrol a hospital by its public key, with the size that it told the coordinator."""
    body = {"name": name, "public_key": _read(key), **_limits(max_patients, max_images)}
    made = api(config, url, token, ca).call("POST", "/v1/sites", body)
    _told(made, f"{name} is enrolled. Compare by telephone: {made['fingerprint']}", as_json=as_json)


@site_app.command("limit", epilog="Example: fedward-server site limit north --max-patients 500")
def limit(
    name: Name,
    max_patients: MaxPatients = None,
    max_images: MaxImages = None,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Set the most patients and images that a hospital may claim; what is not given stays."""
    body = _limits(max_patients, max_images)
    made = api(config, url, token, ca).call("POST", at("sites", name, "limit"), body)
    _told(made, f"{name} may claim {_most(made)}.", as_json=as_json)


@site_app.command("list")
def list_sites(
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Every enrolled hospital: online, last seen, version, datasets, studies."""
    found = api(config, url, token, ca).call("GET", "/v1/sites")
    if as_json:
        print_json({"sites": found})
        return
    heads = "site, status, last seen, version, datasets, may claim, studies, quarantined in"
    table = Table(*heads.split(", "))
    for one in found:
        table.add_row(
            one["name"],
            one["status"],
            moment(one["last_seen"]),
            one["version"],
            "\n".join(map(_dataset, one["datasets"])),
            _most(one),
            ", ".join(one["studies"]),
            ", ".join(one["quarantined"]),
        )
    Console().print(table)


@site_app.command("remove", epilog="Example: fedward-server site remove north")
def remove(
    name: Name,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Cut a hospital off at once, also in the middle of a round."""
    made = api(config, url, token, ca).call("DELETE", at("sites", name))
    _told(made, f"{name} is cut off.", as_json=as_json)


@site_app.command("rotate", epilog="Example: fedward-server site rotate north new.pub")
def rotate(
    name: Name,
    key: Key,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Take another key for a hospital; the old one ends at once."""
    body = {"public_key": _read(key)}
    made = api(config, url, token, ca).call("POST", at("sites", name, "rotate"), body)
    _told(made, f"{name} has a new key: {made['fingerprint']}", as_json=as_json)


@site_app.command(
    "release", epilog="Example: fedward-server site release north --study demo-private-1a2b3c4d"
)
def release(
    name: Name,
    study: Annotated[str, typer.Option(help="a study's id; none: all studies")] = "",
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """End a hospital's quarantine, in one study or in all."""
    body = {"study": study or None}
    made = api(config, url, token, ca).call("POST", at("sites", name, "release"), body)
    _told(made, f"{name} takes part again.", as_json=as_json)


def _limits(max_patients: int | None, max_images: int | None) -> dict[str, int | None]:
    given = {"max_patients": max_patients, "max_images": max_images}
    return {name: number or None for name, number in given.items() if number is not None}


def _most(site: dict[str, Any]) -> str:
    patients, images = site["max_patients"], site["max_images"]
    told = [f"{n:,} {what}" for n, what in ((patients, "patients"), (images, "images")) if n]
    return ", ".join(told) or "not checked"


def _dataset(facts: dict[str, Any]) -> str:
    name = f"{facts['dataset']}: " if facts["dataset"] else ""
    return f"{name}{facts['patients']} patients, {facts['images']} images"


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            "a public key must be a readable PEM file",
            value=path.name,
            fix="Use the site.pub that `fedward-client enrol` made",
            where="KEY",
        ) from None


def _told(made: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(made)
    else:
        say(text)
