"""``fedward-client store``: results to the PACS, within the importer's walls."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedward.child_process import end_with_parent
from fedward.console import interruptible, print_json, say
from fedward.errors import PacsError
from fedward_client.commands.options import SITE, Config, Json
from fedward_client.commands.walls import build_walls, check_walls, kept_on_ctrl_c
from fedward_client.commands.work import busy, load_site


def store(
    out: Annotated[
        Path, typer.Argument(help="folder of fedward-client predict", show_default=False)
    ],
    pacs: Annotated[
        str | None, typer.Option("--pacs", help="name of the PACS; none: the only one of site.toml")
    ] = None,
    config: Config = SITE,
    as_json: Json = False,
) -> None:
    """Send the DICOM objects of predictions to the PACS, each once.

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
        outcome = store_results(site, name, out, listen=tell)
    if as_json:
        print_json({"pacs": name, **outcome.plain()})
    else:
        tell_stored({"pacs": name, **outcome.plain()})
    if not outcome.whole:
        raise typer.Exit(PacsError.exit_code)


def tell_stored(made: dict[str, Any]) -> None:
    """Print what became of the objects."""
    for reason, count in made["refused"].items():
        say(f"not stored: {count}: {reason}", err=True, fg="red")
    had = made["before"] + made["there"]
    say(f"{made['stored']} of {made['objects']} objects stored in {made['pacs']}, {had} were there")


def store_apart(out: Path, pacs: str, config: Path) -> tuple[int, dict[str, Any]]:
    """Store in a process of its own, within the importer's walls.

    Parameters
    ----------
    out : Path
        Folder of predictions.
    pacs : str
        Name of the PACS.
    config : Path
        The site's configuration.

    Returns
    -------
    int
        Its exit code; it has said on standard error why it is not 0.
    dict
        What it says of the objects; empty where it could not begin.
    """
    words = ["-m", "fedward_client.cli", "store", str(out.absolute()), "--pacs", pacs]
    process = subprocess.Popen(
        [sys.executable, *words, "--config", str(config.absolute()), "--json"],
        stdout=subprocess.PIPE,
        preexec_fn=end_with_parent(signal.SIGTERM),
    )
    try:
        said, _ = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    try:
        told: dict[str, Any] = json.loads(said)
    except ValueError:
        told = {}
    return process.returncode, told if "error" not in told else {}
