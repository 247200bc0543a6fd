"""``fedward-client predict``: a finished study's model on images of the hospital."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer

from fedward.console import interruptible, print_json, say
from fedward.errors import DataError, Interrupted
from fedward_client.commands.options import SITE, Config, Json
from fedward_client.commands.store import store_apart, tell_stored
from fedward_client.commands.work import busy
from fedward_client.data.readers.registry import READERS

if TYPE_CHECKING:
    from fedward.models.finished import FinishedModel
    from fedward_client.config import DatasetSection
    from fedward_client.data.options import LabelOptions
    from fedward_client.data.table_rows import Row
    from fedward_client.predict.inputs import Found
    from fedward_client.predict.run import Outcome, Wish

AUTO = "auto"
FORMATS = [AUTO, *(name for name, reader in READERS.items() if not reader.archive)]

# What predict, explain and watch have in common.
Model = Annotated[
    str, typer.Argument(help="a model's file, or the id of a study whose model is kept here")
]
Images = Annotated[
    str, typer.Argument(metavar="PATH", help="a file or folder of images, or a dataset's name")
]
Out = Annotated[Path, typer.Option("--out", help="folder for the results", show_default=False)]
Which = Annotated[
    Literal["shared", "own"] | None,
    typer.Option(
        "--which", help="of a kept study; none: the hospital's own model where there is one"
    ),
]
Format = Annotated[
    str, typer.Option("--format", click_type=click.Choice(FORMATS), help="what the files are")
]
Force = Annotated[
    bool, typer.Option("--force", help="also do what the model was not trained for, and mark it")
]
Table = Annotated[
    Path | None,
    typer.Option(
        "--table",
        help="CSV or XLSX of what is known beside each image, for a model that reads it; none: "
        "the dataset's table of labels, or labels.csv beside the images",
        show_default=False,
    ),
]
Store = Annotated[
    bool, typer.Option("--store", help="send the DICOM objects to the PACS afterwards")
]
Pacs = Annotated[
    str | None,
    typer.Option("--pacs", help="which; none: the dataset's, or the only one of site.toml"),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:INDEX")]


def predict(
    model: Model,
    images: Images,
    out: Out,
    which: Which = None,
    format: Format = AUTO,
    force: Force = False,
    dicom: Annotated[
        bool, typer.Option("--dicom/--no-dicom", help="write SEG and SR for DICOM images")
    ] = True,
    table: Table = None,
    store: Store = False,
    pacs: Pacs = None,
    device: Device = "auto",
    config: Config = SITE,
    as_json: Json = False,
) -> None:
    """Apply a finished model to images; the results stay at the hospital.

    Ends with code 11 when it could not predict every image; the others are done. Ends with code 29
    when the PACS did not take an object.
    """
    from fedward_client.predict.run import Wish
    from fedward_client.predict.run import predict as run
    from fedward_client.training.device import choose_device
    from fedward_client.training.runtime import Runtime

    chosen = str(choose_device(device))
    with kept_on_ctrl_c(out), interruptible(), busy("reading the model") as tell:
        opened = open_model(model, which, config)
        tell("reading headers")
        path, found, dataset = find_images(images, opened, format, config)
        archive = _archive(pacs, dataset, config) if store else None
        wish = Wish(opened, path, out, force=force, dicom=dicom)
        wish = with_tables(wish, found, dataset, table)
        runtime = Runtime(device=chosen, threads=os.cpu_count() or 1)
        outcome = run(
            wish,
            found,
            runtime,
            lambda done, of, name: tell(f"{done} of {of} predicted, next {name}"),
        )
    code, stored = 0, None
    if archive is not None:
        with kept_on_ctrl_c(out), interruptible():
            code, stored = store_apart(out, archive, config)
    refused = _told(outcome, opened, out, stored, as_json=as_json)
    if code:
        raise typer.Exit(code)
    if refused:
        raise typer.Exit(DataError.exit_code)


@contextmanager
def kept_on_ctrl_c(out: Path, fix: str = "Give it again to go on") -> Iterator[None]:
    """Say that what was done is kept, when the command is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "the command was interrupted; what was done is kept",
            value=str(out),
            fix=fix,
        ) from None


def open_model(model: str, which: Literal["shared", "own"] | None, config: Path) -> FinishedModel:
    from fedward.models.finished import open_finished

    path = Path(model)
    if path.is_file() and which is None:
        return open_finished(path)
    from fedward_client.config import load_config
    from fedward_client.kept_models import KeptModels

    kept = KeptModels(load_config(config, datasets_here=False).site.state)
    return open_finished(kept.path(model, which))


def find_images(
    images: str, model: FinishedModel, format: str, config: Path
) -> tuple[Path, Found, DatasetSection | None]:
    """The images of a path, or of a dataset in ``site.toml``, which comes third."""
    from fedward_client.predict.inputs import find_inputs

    path, task = Path(images), model.plan.task
    kind = None if format == AUTO else format
    if path.exists() or not config.is_file():
        return path, find_inputs(path, task, kind), None
    from fedward_client.config import load_config

    dataset = load_config(config, datasets_here=False).present(images)
    options = dataset.image_options()
    found = find_inputs(
        dataset.root,
        task,
        kind or dataset.format,
        options,
        channels=dataset.channel_options(),
        suffix=dataset.masks.suffix,
    )
    return dataset.root, found, dataset


def _archive(pacs: str | None, dataset: DatasetSection | None, config: Path) -> str:
    """Name of the PACS that the objects go to."""
    from fedward_client.config import load_config

    return load_config(config, datasets_here=False).pacs_for(pacs, dataset)


def with_tables(
    wish: Wish, found: Found, dataset: DatasetSection | None, table: Path | None
) -> Wish:
    """The wish with what tables say of the images: what the model reads, and their channels."""
    from fedward_client.data.options import LabelOptions
    from fedward_client.predict.beside import channels_beside

    options = dataset.label_options() if dataset else LabelOptions()
    rows = _rows(wish.model, found, wish.path, table, options)
    channels = dataset.channel_options() if dataset else {}
    beside = channels_beside(channels, found, wish.path, options) if channels else {}
    return replace(wish, rows=rows, channels=beside)


def _rows(
    model: FinishedModel, found: Found, path: Path, table: Path | None, options: LabelOptions
) -> Mapping[str, Row | str]:
    """What the table says that the model reads; nothing where it reads none."""
    if model.plan.table is None:
        if table is not None:
            raise DataError(
                "the model must read a table for one to be given",
                fix="Leave --table out",
                where="--table",
            )
        return {}
    from fedward_client.data.options import LabelOptions
    from fedward_client.predict.beside import rows_beside

    if table is not None:
        options = LabelOptions(file=table)
    return rows_beside(model.plan.table, found, path, options)


def _told(
    outcome: Outcome,
    model: FinishedModel,
    out: Path,
    stored: dict[str, Any] | None,
    *,
    as_json: bool,
) -> int:
    """Print what became of the inputs; how many were refused."""
    counts = {state: outcome.count(state) for state in ("predicted", "marked", "refused")}
    if as_json:
        print_json(
            {
                "out": str(out),
                **counts,
                "model_sha256": model.sha256,
                "plan_sha256": model.plan_sha256,
                "refusals": {
                    one["name"]: one["reason"]
                    for one in outcome.records
                    if one["state"] == "refused"
                },
                **({} if stored is None else {"store": stored}),
            }
        )
        return counts["refused"]
    for one in outcome.records:
        if one["state"] == "refused":
            say(f"refused: {one['name']}: {one['reason']}", err=True, fg="red")
        for mark in one.get("marks", ()):
            say(f"marked: {one['name']}: {mark}", err=True, fg="yellow")
    say(
        f"{counts['predicted']} predicted, {counts['marked']} marked, {counts['refused']} refused: "
        f"{out / 'predictions.csv'}. Not for diagnosis."
    )
    if stored:
        tell_stored(stored)
    if model.synthetic:
        say("The model was trained on synthetic images: of no use for patients.")
    return counts["refused"]
