"""``fedward-client model``: the models of finished studies that this hospital may use."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedward.console import print_json, say
from fedward.errors import StudyError
from fedward_client.commands.options import SITE, Config, Json

if TYPE_CHECKING:
    from fedward_client.kept_models import KeptModel, KeptModels

model_app = typer.Typer(help="Models of finished studies.", no_args_is_help=True)


@model_app.command("list")
def list_models(config: Config = SITE, as_json: Json = False) -> None:
    """The models that are kept here: of each study the shared one, and this hospital's own."""
    found = _kept(config).all()
    if as_json:
        print_json({"models": [asdict(one) for one in found]})
        return
    for one in found:
        say(f"{one.study}  {one.which:6}  {one.name}  {one.bytes:,} bytes  SHA-256 {one.sha256}")
    if not found:
        say("No model is kept here. A study leaves its model when it is tested here.")


@model_app.command(
    "fetch",
    epilog="Example: fedward-client model fetch demo-private-1a2b3c4d --from model.safetensors",
)
def fetch(
    model: Annotated[
        str,
        typer.Argument(
            metavar="STUDY|FILE", help="id of the study, or the file that the aggregator delivered"
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="the file that the aggregator delivered", show_default=False),
    ] = None,
    config: Config = SITE,
    as_json: Json = False,
) -> None:
    """Have a study's model here: the one that was tested here, or a delivered file.

    A file is kept if a coordinator that this hospital accepts signed it, and if it is of STUDY.
    """
    from fedward_client.config import load_config
    from fedward_client.kept_models import KeptModels

    site = load_config(config, datasets_here=False)
    models = KeptModels(site.site.state)
    if source is not None:
        kept = models.add(source, site.policy, study=model)
    elif Path(model).is_file():
        kept = models.add(Path(model), site.policy)
    else:
        kept = _came_with_its_study(models, model)
    if as_json:
        print_json(asdict(kept))
        return
    say(f"Kept the model of {kept.name} ({kept.study}), SHA-256 {kept.sha256}.")


def _came_with_its_study(models: KeptModels, study: str) -> KeptModel:
    """The shared model that was tested here, which its aggregator sent then."""
    try:
        return models.find(study, "shared")
    except StudyError as error:
        raise StudyError(
            error.rule,
            value=error.value,
            fix="A study sends its model when it is tested here; else ask the coordinator for the "
            "file of fedward-server study model, and give it with --from",
        ) from None


@model_app.command(
    "export",
    epilog="Example: fedward-client model export demo-private-1a2b3c4d --out model.safetensors",
)
def export(
    study: Annotated[str, typer.Argument(help="id of the study")],
    out: Annotated[Path, typer.Option("--out", help="a new safetensors file")],
    which: Annotated[
        Literal["shared", "own"],
        typer.Option("--which", help="the model of all hospitals, or this hospital's own"),
    ] = "own",
    config: Config = SITE,
    as_json: Json = False,
) -> None:
    """Write a model to a file; its metadata holds the plan that it was trained by."""
    made = _kept(config).export(study, which, out)
    if as_json:
        print_json(asdict(made))
        return
    say(f"Wrote the {which} model of {made.name}, SHA-256 {made.sha256}. Not for diagnosis.")


@model_app.command("remove", epilog="Example: fedward-client model remove demo-private-1a2b3c4d")
def remove(
    study: Annotated[str, typer.Argument(help="id of the study")],
    config: Config = SITE,
    as_json: Json = False,
) -> None:
    """Remove the models of a study from this hospital."""
    removed = _kept(config).remove(study)
    if as_json:
        print_json({"removed": removed})
        return
    say(f"Removed {removed} {'model' if removed == 1 else 'models'}.")


def _kept(config: Path) -> KeptModels:
    from fedward_client.config import load_config
    from fedward_client.kept_models import KeptModels

    return KeptModels(load_config(config, datasets_here=False).site.state)
