"""``fedward-client explain``: why a finished study's model answers as it does, at the hospital."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedward.console import interruptible, print_json, say
from fedward.errors import DataError, PlanError
from fedward_client.commands.options import SITE, Config, Json
from fedward_client.commands.predict import (
    AUTO,
    Device,
    Force,
    Format,
    Images,
    Model,
    Out,
    Table,
    Which,
    find_images,
    kept_on_ctrl_c,
    open_model,
    with_tables,
)
from fedward_client.commands.work import busy

if TYPE_CHECKING:
    from fedward.models.finished import FinishedModel
    from fedward_client.explain.run import Told


def explain(
    model: Model,
    images: Images,
    out: Out,
    method: Annotated[
        Literal["grad-cam", "grad-cam++", "integrated-gradients", "occlusion"],
        typer.Option(
            "--method",
            help="of a classifier's maps; of a segmentation the uncertainty is shown",
        ),
    ] = "grad-cam",
    shown: Annotated[
        str | None,
        typer.Option(
            "--class", help="a classifier's class to explain; none: each image's likeliest"
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust/--no-trust", help="also measure what the maps are worth"),
    ] = True,
    which: Which = None,
    format: Format = AUTO,
    force: Force = False,
    dicom: Annotated[
        bool,
        typer.Option("--dicom/--no-dicom", help="write the map and its report for DICOM images"),
    ] = True,
    table: Table = None,
    device: Device = "auto",
    config: Config = SITE,
    as_json: Json = False,
) -> None:
    """Show what a finished model looked at, case by case; the page stays at the hospital.

    Ends with code 11 when it could not explain every image; the others are done.
    """
    from fedward_client.cohort.freeze import spec_of
    from fedward_client.data.dataset import DatasetSpec
    from fedward_client.explain.run import How
    from fedward_client.explain.run import explain as run
    from fedward_client.explain.truth import truths
    from fedward_client.predict.run import Wish
    from fedward_client.training.device import choose_device
    from fedward_client.training.runtime import Runtime

    chosen = str(choose_device(device))
    with (
        kept_on_ctrl_c(out, "Give it again to do all"),
        interruptible(),
        busy("reading the model") as tell,
    ):
        opened = open_model(model, which, config)
        number = _number(opened, shown)
        tell("reading headers")
        path, found, dataset = find_images(images, opened, format, config)
        wish = Wish(opened, path, out, force=force, dicom=dicom)
        wish = with_tables(wish, found, dataset, table)
        tell("reading labels")
        spec = (
            spec_of(dataset) if dataset else DatasetSpec(path, None if format == AUTO else format)
        )
        known = truths(spec, opened.plan.task)
        told = run(
            wish,
            found,
            Runtime(device=chosen, threads=os.cpu_count() or 1),
            How(method, number, trust, known),
            lambda done, of, name: tell(f"{done} of {of} explained, next {name}"),
        )
    if _tell(told, opened, out, as_json=as_json):
        raise typer.Exit(DataError.exit_code)


def _number(model: FinishedModel, shown: str | None) -> int | None:
    task = model.plan.task
    if shown is None:
        return None
    if task.spec.dense or shown not in task.classes:
        raise PlanError(
            "a class to explain must be one of the model's, which must be a classifier",
            value=shown,
            fix="Leave --class out"
            if task.spec.dense
            else f"Choose one of {', '.join(task.classes)}",
            where="--class",
        )
    return task.classes.index(shown)


def _tell(told: Told, model: FinishedModel, out: Path, *, as_json: bool) -> int:
    """Print what became of the inputs; how many were refused."""
    counts = {state: told.count(state) for state in ("predicted", "marked", "refused")}
    done = counts["predicted"] + counts["marked"]
    if as_json:
        refusals = {one["name"]: one["reason"] for one in told.records if one["state"] == "refused"}
        whole = {"explained": done, "marked": counts["marked"], "refused": counts["refused"]}
        print_json({"out": str(out), **whole, "trust": told.trust, "refusals": refusals})
        return counts["refused"]
    for one in told.records:
        if one["state"] == "refused":
            say(f"refused: {one['name']}: {one['reason']}", err=True, fg="red")
    say(
        f"{done} explained, {counts['marked']} marked, {counts['refused']} refused: "
        f"{out / 'explain.html'}. Not for diagnosis; the page stays here."
    )
    if model.synthetic:
        say("The model was trained on synthetic images: of no use for patients.")
    return counts["refused"]
