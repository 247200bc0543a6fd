"""``fedward-client audit``: what the daemon wrote down, and whether it still stands so."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedward.console import moment, print_json, say
from fedward.errors import FedwardError
from fedward_client.commands.options import SITE, Config, Json

if TYPE_CHECKING:
    from fedward_client.config import SiteConfig

audit_app = typer.Typer(help="Read and verify the audit log.", no_args_is_help=True)


@audit_app.command("verify")
def verify(config: Config = SITE, as_json: Json = False) -> None:
    """Find what was changed, removed, added or moved; also against what a running daemon wrote."""
    from fedward_client.audit.log import audit_folder, audit_key
    from fedward_client.audit.verify import check_there, check_written
    from fedward_client.audit.verify import verify as verify_log

    site = _site(config)
    folder, last = audit_folder(site.site.state), _last_written(site)
    check_there(folder)
    found = verify_log(folder, audit_key(site.site.state))
    found.enforce()
    if last is not None:
        check_written(folder, *last)
    daemon = "not running" if last is None else "agrees"
    if as_json:
        print_json(
            {"whole": found.whole, "entries": found.entries, "hash": found.hash, "daemon": daemon}
        )
        return
    say(f"Whole: {found.entries} entries; the daemon: {daemon}.")
    say(f"Last hash, to note down: {found.hash}")


@audit_app.command("show")
def show(
    last: Annotated[int, typer.Option("--last", min=1, help="so many entries")] = 50,
    config: Config = SITE,
    as_json: Json = False,
) -> None:
    """The last entries."""
    from fedward_client.audit.log import audit_folder
    from fedward_client.audit.verify import entries

    found = list(entries(audit_folder(_site(config).site.state)))[-last:]
    if as_json:
        print_json({"entries": [one.model_dump(mode="json") for one in found]})
        return
    for one in found:
        said = ", ".join(f"{name} {value}" for name, value in one.fields.items())
        say(f"{one.seq}  {moment(one.time)}  {one.event}  {said}")


def _last_written(site: SiteConfig) -> tuple[int, str] | None:
    """Number and hash of the running daemon's last entry, None where none runs."""
    from fedward_client.trainer.admin_client import admin_socket, ask

    with suppress(FedwardError):
        last = ask(admin_socket(site), "audit")["last"]
        return (int(last[0]), str(last[1])) if last else None
    return None


def _site(config: Path) -> SiteConfig:
    from fedward_client.config import load_config

    return load_config(config, datasets_here=False)
