"""``fedward-client data fetch``: images from the PACS, within the importer's walls."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedward.console import Console, interruptible, print_json, say
from fedward.errors import ConfigError, Interrupted, PacsError
from fedward_client.commands.options import SITE, Config, Json
from fedward_client.commands.tables import fetch_table
from fedward_client.commands.work import busy, load_site
from fedward_client.daemon.isolation import find_readable
from fedward_client.daemon.launch import WALLED

if TYPE_CHECKING:
    from fedward_client.config import SiteConfig


def fetch(
    name: Annotated[str, typer.Argument(help="The dataset.", show_default=False)],
    config: Config = SITE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be fetched, and fetch nothing.")
    ] = False,
    retry_refused: Annotated[
        bool,
        typer.Option("--retry-refused", help="Ask again for objects that were refused before."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch what a dataset's query finds in the PACS and is not here yet.

    Ends with code 29 when an object was refused or did not come; the others are in the dataset.
    """
    site = load_site(config)
    _build_walls(config)
    from fedward_client.importer.fetch import fetch_dataset

    os.umask(0o027)  # the trainer's user reads what the importer's writes, by their group
    _check_walls(site)
    with _kept_on_ctrl_c(), interruptible(), busy(f"{name}: asking the PACS") as tell:
        outcome = fetch_dataset(
            site,
            name,
            dry_run=dry_run,
            retry_refused=retry_refused,
            listen=lambda text: tell(f"{name}: {text}"),
        )
    made: dict[str, Any] = {"dataset": name, "dry_run": dry_run, **outcome.plain()}
    if as_json:
        print_json(made)
    else:
        Console().print(fetch_table(made))
    if not outcome.whole:
        raise typer.Exit(PacsError.exit_code)


def _build_walls(config: Path) -> None:
    """Become a process within walls, where the kernel lets this user build them."""
    if WALLED not in os.environ:
        words = [sys.executable, "-m", "fedward_client.daemon.launch", "importer"]
        os.execv(words[0], [*words, str(config), *sys.argv[1:]])


def _check_walls(site: SiteConfig) -> None:
    from fedward_client.config import importer_hidden_places

    found = find_readable(importer_hidden_places(site))
    if found.holds:
        return
    if not site.importer.allow_unconfined:
        raise ConfigError(
            "the importer must see neither the site's state nor the trainer's socket",
            value=found.text,
            fix="Run it as a user of its own, under systemd or in a container, or set "
            "importer.allow_unconfined = true",
            where="importer",
        )
    say(f"warning: the importer is not confined: {found.text}", err=True, fg="yellow")


@contextmanager
def _kept_on_ctrl_c() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "the fetching was interrupted; what was fetched is kept",
            fix="Give the command again to go on",
        ) from None
