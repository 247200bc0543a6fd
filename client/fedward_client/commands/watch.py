"""``fedward-client watch``: images are predicted as they come, and the answers stored."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedward.console import interruptible, say
from fedward.errors import DataError, PacsError
from fedward_client.commands.options import SITE, Config
from fedward_client.commands.predict import (
    AUTO,
    Device,
    Force,
    Format,
    Model,
    Out,
    Pacs,
    Store,
    Table,
    Which,
    find_images,
    open_model,
    with_tables,
)
from fedward_client.commands.store import store_apart
from fedward_client.commands.walls import run_apart

if TYPE_CHECKING:
    from fedward_client.predict.inputs import Found
    from fedward_client.predict.run import Wish
    from fedward_client.predict.watch import Step


def watch(
    model: Model,
    images: Annotated[
        str, typer.Argument(metavar="PATH", help="a folder that images come into, or a dataset")
    ],
    out: Out,
    fetch: Annotated[
        bool,
        typer.Option("--fetch/--no-fetch", help="fetch what is new, for a dataset with a query"),
    ] = True,
    store: Store = False,
    pacs: Pacs = None,
    every: Annotated[
        float,
        typer.Option(
            "--every", min=0.01, help="seconds between two fetches, and before a second try"
        ),
    ] = 60.0,
    settle: Annotated[
        float,
        typer.Option("--settle", min=0.0, help="seconds in which an image must not change first"),
    ] = 30.0,
    once: Annotated[
        bool, typer.Option("--once", help="end when nothing is left to do, for a timer")
    ] = False,
    which: Which = None,
    format: Format = AUTO,
    force: Force = False,
    table: Table = None,
    device: Device = "auto",
    config: Config = SITE,
) -> None:
    """Predict images as they come into a folder or a dataset, until SIGTERM or Ctrl-C.

    With --once it ends with code 11 when an image cannot be predicted, and with code 29 when the
    PACS failed.
    """
    from fedward_client.predict.run import Wish
    from fedward_client.predict.watch import Watch
    from fedward_client.training.device import choose_device
    from fedward_client.training.runtime import Runtime

    chosen = str(choose_device(device))
    opened = open_model(model, which, config)
    folder, fetching, storing = _steps(images, out, pacs, config, fetch=fetch, store=store)
    wish = Wish(opened, folder, out, force=force)

    def look() -> tuple[Found, Wish]:
        path, found, dataset = find_images(images, opened, format, config)
        return found, with_tables(replace(wish, path=path), found, dataset, table)

    runtime = Runtime(device=chosen, threads=os.cpu_count() or 1)
    watching = Watch(
        wish, look, runtime, every, settle, fetching, storing, lambda text: say(text, err=True)
    )
    try:
        with interruptible():
            count = watching.run(once=once)
    except KeyboardInterrupt:
        say("stopped; what was done is kept, and the same command goes on", err=True)
        return
    say(f"{count.predicted} predicted, {count.dead} in dead-letter: {out}. Not for diagnosis.")
    if count.failing:
        raise typer.Exit(PacsError.exit_code)
    if count.dead:
        raise typer.Exit(DataError.exit_code)


def _steps(
    images: str, out: Path, pacs: str | None, config: Path, *, fetch: bool, store: bool
) -> tuple[Path, Step | None, Step | None]:
    """The folder that is watched, and how it is filled and emptied."""
    from fedward_client.config import load_config

    folder, dataset = Path(images), None
    site = load_config(config, datasets_here=False) if config.is_file() else None
    if not folder.is_dir():
        if site is None:
            raise DataError(
                "what is watched must be a folder, or a dataset of site.toml",
                fix="Make the folder, or give the configuration with --config",
                where="PATH",
            )
        dataset = site.dataset(images)
        folder = dataset.root
    archive = load_config(config, datasets_here=False).pacs_for(pacs, dataset) if store else ""

    def fetching() -> tuple[bool, dict[str, str]]:
        return bool(run_apart(["data", "fetch", images], config)[1]), {}

    def storing() -> tuple[bool, dict[str, str]]:
        if not (out / "predictions.json").is_file():
            return True, {}
        told = store_apart(out, archive, config)[1]
        return bool(told), told.get("refused", {})

    fetches = fetch and dataset is not None and dataset.fetch is not None
    return folder, fetching if fetches else None, storing if store else None
