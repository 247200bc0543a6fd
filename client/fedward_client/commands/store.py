"""``fedward-client store``: results to the PACS, within the importer's walls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedward.console import interruptible, print_json, say
from fedward.errors import PacsError
from fedward_client.commands.options import SITE, Config, Json
from fedward_client.commands.walls import build_walls, check_walls, kept_on_ctrl_c, run_apart
from fedward_client.commands.work import busy, load_site


def store(
    out: Annotated[
        Path, typer.Argument(help="folder of fedward-client predict or explain", show_default=False)
    ],
    pacs: Annotated[
        str | None, typer.Option("--pacs", help="name of the PACS; none: the only one of site.toml")
    ] = None,
    retry_refused: Annotated[
        bool, typer.Option("--retry-refused", help="send again what the PACS did not take before")
    ] = False,
    config: Config = SITE,
    as_json: Json = False,
) -> None:
    """Send the DICOM objects of predictions or explanations to the PACS, each once.

    Ends with code 29 when the PACS does not take one; the others are there.
    """
    site = load_site(config)
    name = site.pacs_for(pacs)
    build_walls(config)
    from fedward_client.importer.store import store_results

    check_walls(site)
    with (
        kept_on_ctrl_c("the storing was interrupted; what was stored is noted"),
        interruptible(),
        busy("reading the objects") as tell,
    ):
        outcome = store_results(site, name, out, retry_refused=retry_refused, listen=tell)
    made: dict[str, Any] = {"pacs": name, **vars(outcome)}
    if as_json:
        print_json(made)
    else:
        tell_stored(made)
    if not outcome.whole:
        raise typer.Exit(PacsError.exit_code)


def tell_stored(made: dict[str, Any]) -> None:
    """Print what became of the objects."""
    for name, reason in made["refused"].items():
        say(f"not stored: {name}: {reason}", err=True, fg="red")
    had = made["before"] + made["there"]
    say(f"{made['stored']} of {made['objects']} objects stored in {made['pacs']}, {had} were there")
    if made["refused_before"]:
        count = made["refused_before"]
        say(f"{count} refused before; --retry-refused sends them again", err=True, fg="yellow")


def store_apart(out: Path, pacs: str, config: Path) -> tuple[int, dict[str, Any]]:
    """Store in a process of its own; see :func:`fedward_client.commands.walls.run_apart`.

    Parameters
    ----------
    out : Path
        Folder of predictions.
    pacs : str
        Name of the PACS.
    config : Path
        The site's configuration.
    """
    return run_apart(["store", str(out.absolute()), "--pacs", pacs], config)
