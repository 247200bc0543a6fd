"""``fedward-server study``."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from fedward.console import Console, Table, moment, print_json, say
from fedward.errors import OutputError, PlanError, StudyError
from fedward.files import replace_file
from fedward.plan.load import from_canonical
from fedward.ready_studies import plan_file
from fedward_server.cli_profile import ApiClient, at
from fedward_server.commands.follow import follow
from fedward_server.commands.options import SERVER, Ca, Config, Json, Token, Url, api

study_app = typer.Typer(help="Submit studies, watch them, take their models.", no_args_is_help=True)
StudyId = Annotated[str, typer.Argument(help="the study's id")]
Out = Annotated[Path, typer.Option("--out", help="where to write it")]


@study_app.command(
    "submit", epilog="Example: fedward-server study submit study.toml --sites north,south"
)
def submit(
    plan: Annotated[
        Path,
        typer.Argument(
            help="the plan (TOML), or the name of a ready study",
            metavar="PLAN",
            parser=plan_file,
            show_default=False,
        ),
    ],
    sites: Annotated[str, typer.Option("--sites", help="names with commas between")],
    evaluate_only: Annotated[
        str,
        typer.Option(
            "--evaluate-only",
            help="sites that take no part in training and test the finished model",
        ),
    ] = "",
    quorum: Annotated[int | None, typer.Option(help="updates that make a round count")] = None,
    deadline: Annotated[float | None, typer.Option(help="seconds that a round waits")] = None,
    seed: Annotated[int, typer.Option(help="of the first model and the division")] = 0,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Submit a plan to sites; it begins at once."""
    body = {
        "plan": _read(plan),
        "sites": _names(sites),
        "evaluate_only": _names(evaluate_only),
        "quorum": quorum,
        "deadline": deadline,
        "seed": seed,
    }
    made = api(config, url, token, ca).call("POST", "/v1/studies", body)
    if as_json:
        print_json(made)
    else:
        say(f"{made['id']} is submitted. Watch it: fedward-server study watch {made['id']}")


@study_app.command("list")
def list_studies(
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Every study."""
    found = api(config, url, token, ca).call("GET", "/v1/studies")
    if as_json:
        print_json({"studies": found})
        return
    table = Table("study", "state", "rounds", "sites", "reason")
    for one in found:
        table.add_row(
            one["id"], one["state"], str(one["round"]), ", ".join(one["sites"]), one["reason"]
        )
    Console().print(table)


@study_app.command("show", epilog="Example: fedward-server study show demo-private-1a2b3c4d")
def show(
    study: StudyId,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Where a study stands, round by round."""
    found = api(config, url, token, ca).call("GET", at("studies", study))
    if as_json:
        print_json(found)
        return
    one = found["study"]
    console = Console()
    console.print(f"{one['id']}: {one['state']} {one['reason']}", highlight=False)
    if only := one.get("evaluate_only"):
        console.print(f"{', '.join(only)} only evaluate the finished model", highlight=False)
    for site, reason in found["quarantined"].items():
        console.print(f"{site} is quarantined: {reason}", highlight=False)
    table = Table("round", "stage", "seconds", "loss", "validation", "sites", "without an update")
    for round_ in found["rounds"]:
        table.add_row(*_round_cells(round_))
    console.print(table)


@study_app.command("watch", epilog="Example: fedward-server study watch demo-private-1a2b3c4d")
def watch(
    study: StudyId,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Follow a study as it runs; ends with it."""
    client, state = api(config, url, token, ca), ""
    console, primary, last = Console(), "", ""
    for event in follow(client, at("studies", study, "events")):
        if as_json:
            print_json(event)
        else:
            primary = primary or _primary(client, study, event)
            last = _last_figure(event, primary) or last
            if text := _telling(event, primary, last):
                console.print(f"{moment(event['at'])}  {text}", highlight=False)
        state = event["payload"].get("state", state) if event["kind"] == "state" else state
    if state == "failed":
        raise StudyError("the study must go on", value=study, fix="See `study show`")


@study_app.command("pause", epilog="Example: fedward-server study pause demo-private-1a2b3c4d")
def pause(
    study: StudyId,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Let a study stand still after what runs now."""
    _wish(api(config, url, token, ca), study, "pause", as_json=as_json)


@study_app.command("resume", epilog="Example: fedward-server study resume demo-private-1a2b3c4d")
def resume(
    study: StudyId,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Let a study go on."""
    _wish(api(config, url, token, ca), study, "resume", as_json=as_json)


@study_app.command("stop", epilog="Example: fedward-server study stop demo-private-1a2b3c4d")
def stop(
    study: StudyId,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """End a study for good; what it reached is kept."""
    _wish(api(config, url, token, ca), study, "stop", as_json=as_json)


@study_app.command("report", epilog="Example: fedward-server study report demo-private-1a2b3c4d")
def report(
    study: StudyId,
    out: Out = Path("report.html"),
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Write the report, of what stands so far, as one HTML file."""
    _write(out, api(config, url, token, ca).fetch(at("studies", study, "report")))
    _said({"report": out.name}, f"Report: {out}", as_json=as_json)


@study_app.command("model", epilog="Example: fedward-server study model demo-private-1a2b3c4d")
def model(
    study: StudyId,
    out: Out = Path("model.safetensors"),
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Write the finished model (safetensors) and, beside it, its card (Markdown)."""
    client = api(config, url, token, ca)
    _write(out, client.fetch(at("studies", study, "model")))
    card = out.with_suffix(".md")
    _write(card, client.fetch(at("studies", study, "card")))
    _said({"model": out.name, "card": card.name}, f"Model: {out}, card: {card}", as_json=as_json)


@study_app.command("export", epilog="Example: fedward-server study export demo-private-1a2b3c4d")
def export(
    study: StudyId,
    out: Annotated[
        Path | None, typer.Option("--out", help="a new folder; none: STUDY-bundle")
    ] = None,
    config: Config = SERVER,
    url: Url = "",
    token: Token = "",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Write the finished model as a MONAI bundle with an ONNX file in it."""
    from fedward.models import load_model
    from fedward_server.artifacts.export import Delivered, export_bundle

    client = api(config, url, token, ca)
    with TemporaryDirectory() as folder:
        fetched = Path(folder) / "model.safetensors"
        fetched.write_bytes(client.fetch(at("studies", study, "model")))
        arrays, _ = load_model(fetched)
    card = client.fetch(at("studies", study, "card")).decode()
    plan = from_canonical(client.call("GET", at("studies", study))["study"]["plan"])
    target = out or Path(f"{study}-bundle")
    made = export_bundle(Delivered(plan, arrays, card), target)
    _said(
        {"export": target.name, "files": list(made.files), "difference": made.difference},
        f"MONAI bundle: {target}, ONNX file: {target / 'models' / 'model.onnx'}; outputs differ "
        f"from the network's by at most {made.difference:.1e}.",
        as_json=as_json,
    )


def _names(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _wish(client: ApiClient, study: str, wish: str, *, as_json: bool) -> None:
    made = client.call("POST", at("studies", study, wish))
    _said(made, f"{study} is {made['state']}.", as_json=as_json)


def _said(made: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(made)
    else:
        say(text)


def _read(path: Path) -> dict[str, Any]:
    try:
        plan = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(
            "a plan must be a readable TOML file",
            value=f"{path.name}: {type(error).__name__}",
            fix="See `fedward-simulate plan check`",
        ) from None
    try:
        json.dumps(plan, allow_nan=False)
    except (TypeError, ValueError):
        raise PlanError(
            "a plan must hold no date, time, inf or nan",
            value=path.name,
            fix="Put it in quotes, or take it out",
        ) from None
    return plan


def _write(path: Path, content: bytes) -> None:
    try:
        replace_file(path, content)
    except OSError as error:
        raise OutputError(
            "the file must be writable",
            value=error.strerror,
            fix="Choose another with --out",
            where="--out",
        ) from None


def _telling(event: dict[str, Any], primary: str, last: str = "") -> str:
    told: dict[str, Any] = event["payload"]
    match event["kind"]:
        case "round":
            number, stage, seconds, loss, figures, sites, missing = _round_cells(told, primary)
            without = f", without {missing}" if missing else ""
            if figures and primary and told["validation"].get(primary) is None:
                figures = f"{primary} not known, {figures}"
            # In a round without an evaluation the last figure says more than the loss.
            shown = figures or ", ".join(filter(None, (loss, last)))
            return f"round {number} ({stage}) in {seconds}: {shown}; {sites}{without}"
        case "state":
            return f"{told['state']} {told['reason']}".strip()
        case "started":
            return f"started with {', '.join(told['sites'])}"
        case "joined":
            return f"{told['site']} takes part"
        case "refused":
            return f"{told['site']} refused ({told['kind']}): {told['reason']}"
        case "quarantined":
            return f"{told['site']} is quarantined in this study: {told['reason']}"
        case "released":
            return f"{told['site']} is not quarantined any more"
        case "warned":
            return f"warning: {told['reason']}"
        case "restored":
            return f"goes on after round {told['round']}"
    return ""


def _last_figure(event: dict[str, Any], primary: str) -> str:
    """The leading figure of a round that has one, with the round; "" of others."""
    value = (
        event["payload"].get("validation", {}).get(primary) if event["kind"] == "round" else None
    )
    return "" if value is None else f"{primary} {value:.3f} in round {event['payload']['round']}"


def _primary(client: ApiClient, study: str, event: dict[str, Any]) -> str:
    """The leading figure of a study, once there is a round to tell of."""
    if event["kind"] != "round":
        return ""
    plan = client.call("GET", at("studies", study))["study"].get("plan", "{}")
    return str(json.loads(plan).get("metrics", {}).get("primary", ""))


def _failure(one: dict[str, str]) -> str:
    """A site whose update is missing, and why."""
    why = ": ".join(part for part in (one.get("kind", ""), one.get("reason", "")) if part)
    return f"{one['site']} ({why})" if why else one["site"]


def _round_cells(one: dict[str, Any], primary: str = "") -> tuple[str, ...]:
    """A round in words, the leading figure first."""
    validation = sorted(one["validation"].items(), key=lambda item: item[0] != primary)
    figures = ", ".join(f"{name} {value:.3f}" for name, value in validation if value is not None)
    loss = "" if one["train_loss"] is None else f"loss {one['train_loss']:.3f}"
    return (
        str(one["round"]),
        one["stage"],
        f"{one['seconds']:.1f} s",
        loss,
        figures,
        ", ".join(sorted(one["sites"])),
        "; ".join(_failure(f) for f in one["failures"]),
    )
