"""``fedward-client data fetch``: images from the PACS, within the importer's walls."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from fedward.console import Console, interruptible, print_json
from fedward.errors import PacsError
from fedward_client.commands.options import SITE, Config, Json
from fedward_client.commands.tables import fetch_table
from fedward_client.commands.walls import build_walls, check_walls, kept_on_ctrl_c
from fedward_client.commands.work import busy, load_site


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
    build_walls(config)
    from fedward_client.importer.fetch import fetch_dataset

    os.umask(0o027)  # the trainer's user reads what the importer's writes, by their group
    check_walls(site)
    with (
        kept_on_ctrl_c("the fetching was interrupted; what was fetched is kept"),
        interruptible(),
        busy(f"{name}: asking the PACS") as tell,
    ):
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
