"""``fedward-client run`` and what the site's officer asks of it."""

from __future__ import annotations

import getpass
import logging
import sys
import threading
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.text import Text

from fedward.console import (
    Console,
    Table,
    leave,
    log_to_stderr,
    print_json,
    private_files,
    say,
    stop_on_signals,
)
from fedward_client.commands.options import SITE, Config, Json
from fedward_client.commands.study_card import card_lines
from fedward_client.commands.tables import people
from fedward_client.link.state import CERTIFICATE_DAYS

Study = Annotated[str, typer.Argument(help="the study's id")]
PlanHash = Annotated[
    str, typer.Option("--plan", help="start of the plan's hash, where there are several")
]
_LOG = logging.getLogger("fedward.daemon")


class Process(StrEnum):
    """The two processes of a hospital that run all the time."""

    trainer = "trainer"
    connector = "connector"


class Examined(StrEnum):
    """Whose view the doctor takes."""

    trainer = "trainer"
    connector = "connector"
    importer = "importer"


def run(config: Config = SITE) -> None:
    """Run trainer and connector, and keep them running."""
    from fedward.child_process import supervise
    from fedward_client.config import load_config

    log_to_stderr()
    private_files()
    for name, one in load_config(config, datasets_here=False).datasets.items():
        if not one.root.exists():
            _LOG.warning("dataset %s is not there; studies that need it are refused", name)
    stop = threading.Event()
    stop_on_signals(stop)
    launch = [sys.executable, "-m", "fedward_client.daemon.launch"]
    commands = {str(one): [*launch, one, str(config.absolute())] for one in Process}
    raise typer.Exit(supervise(commands, stop, _LOG))


def trainer(config: Config = SITE) -> None:
    """Run the process that has the images and no network."""
    from fedward_client.config import load_config
    from fedward_client.trainer.process import run_trainer

    log_to_stderr()
    private_files()
    # A dataset that is away just now is told to who asks for it; the others are served.
    run_trainer(load_config(config, datasets_here=False), path=config)
    # An order that is still being prepared has charged nothing, and cannot be told to end.
    leave()


def connector(config: Config = SITE) -> None:
    """Run the process that has the network and no images."""
    from fedward_client.config import load_config
    from fedward_client.connector.process import run_connector

    log_to_stderr()
    private_files()
    run_connector(load_config(config, datasets_here=False))


def enrol(
    name: Annotated[str, typer.Option(help="the site's name, as studies will know it")] = "",
    server: Annotated[str, typer.Option(help="the aggregator, host:port")] = "",
    ca: Annotated[Path | None, typer.Option(help="the aggregator's authority, PEM")] = None,
    out: Annotated[Path, typer.Option(help="folder of the site")] = Path(),
    config: Annotated[
        Path | None,
        typer.Option("--config", envvar="FEDWARD_SITE", help="a site.toml that is there already"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the site's key pair, here: with a draft of site.toml, or for one that is there."""
    from fedward_client.config import load_config
    from fedward_client.enrol import enrol as make_enrolment
    from fedward_client.enrol import enrol_configured, read_authority

    if name and server and ca:
        made = make_enrolment(out, name, server, read_authority(ca))
    elif config and not (name or server or ca):
        made = enrol_configured(load_config(config, datasets_here=False), config)
    else:
        raise typer.BadParameter("give --name, --server and --ca, or --config alone")
    if as_json:
        print_json({"public_key": made.public_key, "fingerprint": made.fingerprint})
        return
    console = Console()
    console.print("Send this public key to the coordinator:\n", highlight=False)
    say(made.public_key)
    say(f"Its fingerprint, to compare by telephone: {made.fingerprint}")
    say(
        f"Next: in {made.config.name} say where the images are, and write the coordinator's "
        "fingerprint, as it is told to you by telephone, into policy.coordinators. Then freeze a "
        "dataset and run the daemon."
    )


def fingerprint(config: Config = SITE, as_json: Json = False) -> None:
    """The fingerprint of this site's key, to compare with the coordinator by telephone."""
    from fedward_client.config import load_config
    from fedward_client.enrol import read_fingerprint

    found = read_fingerprint(load_config(config, datasets_here=False))
    _plain({"fingerprint": found}, found, as_json=as_json)


def health(
    process: Annotated[Process, typer.Argument(help="which of the two")],
    config: Config = SITE,
    as_json: Json = False,
) -> None:
    """Whether a process that runs here is well; for containers and monitoring."""
    from fedward_client.config import load_config
    from fedward_client.health import examine

    which: Any = process.value
    found = examine(load_config(config, datasets_here=False), which)
    _plain(vars(found), found.found, as_json=as_json)
    raise typer.Exit(0 if found.healthy else 1)


def status(config: Config = SITE, as_json: Json = False) -> None:
    """What the daemon does: link, study, round, progress, budget left, last error."""
    answer = _ask(config, "status")
    if as_json:
        print_json(answer)
        return
    now, link = answer["trainer"], answer["link"]
    table = Table(show_header=False, box=None)
    for name, value in (
        ("site", now["site"]),
        ("link", link.get("state", "no connector")),
        ("doing", _doing(now)),
        ("waiting orders", now["waiting"]),
        ("pending studies", answer["pending"]),
        ("paused", "yes" if now["paused"] else "no"),
        ("trainer's network", now["network"]),
        ("connector and images", now["connector"]),
        ("last refusal", _dated(now, "last_refusal") or "none"),
        ("last error", _last_error(now, link)),
    ):
        table.add_row(name, str(value))
    console = Console()
    console.print(table)
    days = link.get("certificate_days")
    if days is not None and days < CERTIFICATE_DAYS:
        text = f"The aggregator's certificate ends in {days} days: ask the coordinator to renew it."
        console.print(text, style="bold red")
    for warning in now["warnings"]:
        console.print(warning, style="bold red")
    if now["doing"] == "not answering":
        console.print("The budget is the trainer's: it is not known while it is silent.")
        return
    _print_budget(console, answer)


def pending(config: Config = SITE, as_json: Json = False) -> None:
    """Studies that wait for an approval."""
    answer = _ask(config, "pending")
    if as_json:
        print_json(answer)
        return
    for warning in answer["warnings"]:
        say(warning, fg="red")
    if not answer["pending"]:
        say("No study waits.")
    for one in answer["pending"]:
        for line in card_lines(one):
            say(line)
        say(f"To read all of it: fedward-client plan show {one['study']}\n")
    if answer["pending"]:
        say("To decide: fedward-client approve STUDY, or fedward-client deny STUDY")


plan_app = typer.Typer(help="The plans that studies sent here.", no_args_is_help=True)


@plan_app.command("show", epilog="Example: fedward-client plan show demo-private-1a2b3c4d")
def plan_show(
    study: Study, config: Config = SITE, plan: PlanHash = "", as_json: Json = False
) -> None:
    """A study's plan as it was seen here: the facts, the plan in words; with --json the plan."""
    found = _ask(config, "plan", study=study, plan=plan)["study"]
    if as_json:
        print_json(found)
        return
    for line in card_lines(found):
        say(line)
    say(f"\n{found['words']}" if "words" in found else "The plan itself was not kept.")


def approve(
    study: Study, config: Config = SITE, plan: PlanHash = "", as_json: Json = False
) -> None:
    """Let a study go ahead."""
    _settle("approve", study, config, plan, as_json=as_json)


def deny(study: Study, config: Config = SITE, plan: PlanHash = "", as_json: Json = False) -> None:
    """Refuse a study; what it has running ends."""
    _settle("deny", study, config, plan, as_json=as_json)


def pause(config: Config = SITE, as_json: Json = False) -> None:
    """Answer no order until `resume`."""
    _plain(_ask(config, "pause"), "Paused.", as_json=as_json)


def resume(config: Config = SITE, as_json: Json = False) -> None:
    """Answer orders again."""
    _plain(_ask(config, "resume"), "Resumed.", as_json=as_json)


def budget(
    config: Config = SITE,
    as_json: Json = False,
    accept_older: Annotated[
        bool,
        typer.Option(
            "--accept-older-ledger",
            help="with the daemon stopped: go on with an older copy of the ledger, forgetting "
            "later charges; the newest copy is lost for good",
        ),
    ] = False,
) -> None:
    """What the patients' privacy budget was spent on, and what is left."""
    if accept_older:
        _accept_older(config, as_json=as_json)
        return
    answer = _ask(config, "budget")
    if as_json:
        print_json(answer)
        return
    _print_budget(Console(), answer)


def doctor(
    config: Config = SITE,
    process: Annotated[
        Examined | None,
        typer.Option("--process", help="only what this process sees, within walls that are there"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at network, PACS, key, disk, device, walls, datasets, policy; say the next step."""
    from fedward_client.config import load_config
    from fedward_client.doctor import examine, worst

    colour = {"pass": "green", "warn": "yellow", "fail": "red"}
    lines, console = [], Console(stderr=as_json)
    which: Any = process and process.value
    for line in examine(load_config(config, datasets_here=False), which):
        lines.append(line)
        fix = f"  → {line.fix}" if line.fix else ""
        mark = (line.status, colour[line.status])
        console.print(Text.assemble(mark, f"  {line.name}: {line.found}{fix}"))
    if as_json:
        print_json({"worst": worst(lines), "lines": [vars(line) for line in lines]})
    raise typer.Exit(1 if worst(lines) == "fail" else 0)


_EXAMPLES: Final = {
    "enrol": "enrol --name north --server agg.example.org:9443 --ca ca.crt --out north",
    "health": "health trainer",
    "approve": "approve demo-private-1a2b3c4d",
    "deny": "deny demo-private-1a2b3c4d",
}


def add_to(app: typer.Typer) -> None:
    """Add the commands to the client's command line."""
    for command in (
        run,
        trainer,
        connector,
        enrol,
        fingerprint,
        doctor,
        health,
        status,
        pending,
        approve,
        deny,
        pause,
        resume,
        budget,
    ):
        example = _EXAMPLES.get(command.__name__)
        app.command(epilog=f"Example: fedward-client {example}" if example else None)(command)
    app.add_typer(plan_app, name="plan")


def _accept_older(config: Path, *, as_json: bool) -> None:
    from fedward_client.config import load_config
    from fedward_client.ledger import accept_older, name_secret
    from fedward_client.secret import existing_secret

    state = load_config(config, datasets_here=False).site.state
    accept_older(state, name_secret(existing_secret(state)))
    _plain({"accepted": True}, "The ledger is used as it is, and says so.", as_json=as_json)


def _settle(command: str, study: str, config: Path, plan: str, *, as_json: bool) -> None:
    answer = _ask(config, command, study=study, plan=plan)
    made = answer["approval"]
    _plain(answer, f"{made['study']} is {made['state']}.", as_json=as_json)


def _ask(config: Path, command: str, **arguments: Any) -> dict[str, Any]:
    from fedward_client.config import load_config
    from fedward_client.trainer.admin_client import (
        TrainerSilent,
        admin_socket,
        answer_for_silent,
        ask,
    )

    site = load_config(config, datasets_here=False)
    try:
        return ask(admin_socket(site), command, **arguments)
    except TrainerSilent:
        return answer_for_silent(site, command, arguments, getpass.getuser())


def _plain(answer: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        say(text)


def _dated(found: dict[str, Any], name: str) -> str:
    """What went wrong last, and when; "" without anything."""
    if not found.get(name):
        return ""
    return f"{found[name]} ({_moment(found.get(f'{name}_at', 0.0))})"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")


def _last_error(*parts: dict[str, Any]) -> str:
    """The last error of trainer and link, and since when it is over; what is not comes first."""
    told = [one for one in parts if one.get("last_error")]
    if not told:
        return "none"
    last = max(told, key=lambda one: (not one.get("recovered_at"), one.get("last_error_at", 0.0)))
    over = last.get("recovered_at")
    return (f"over since {_moment(over)}; it was: " if over else "") + _dated(last, "last_error")


def _doing(now: dict[str, Any]) -> str:
    if now["doing"] in ("idle", "not answering"):
        return str(now["doing"])
    steps = f", step {now['step']} of {now['steps']}" if now["steps"] else ""
    return f"{now['doing']} for {now['study']}, round {now['round']}{steps}"


def _print_budget(console: Console, answer: dict[str, Any]) -> None:
    if times := answer["older_ledgers_accepted"]:
        console.print(f"An older copy of the ledger was accepted ({times} x): more was spent.")
    if not answer["budget"]:
        console.print("No patient was charged yet.")
        return
    table = Table(
        "dataset",
        "cohort",
        "patients",
        "ε spent",
        "ε allowed",
        "ε left",
        "at δ",
        "without privacy",
        "evaluations: ε spent",
        "ε allowed",
        title="All studies together, per patient",
    )
    for row in answer["budget"]:
        table.add_row(
            row["dataset"],
            row["cohort"],
            people(row["patients"], row["images_are_patients"]),
            f"{row['spent']:.3g}",
            f"{row['cap']:.3g}",
            f"{row['left']:.3g}",
            f"{row['delta']:.2g}",
            _unbounded(row["unbounded"]),
            _evaluations(row["evaluations"]),
            f"{row['evaluations']['cap']:.3g}",
        )
    console.print(table)
    table = Table(
        "study",
        "dataset",
        "rounds charged",
        "released",
        "lost",
        "ε at the site's δ",
        "ε at its own δ",
        title="Each study",
    )
    for row in answer["studies"]:
        here = own = "unbounded"
        if row["epsilon"] is not None and not row["unbounded_rounds"]:
            here = f"{row['site_epsilon']:.3g} at {row['site_delta']:.2g}"
            own = f"{row['epsilon']:.3g} at {row['delta']:.2g}"
        table.add_row(
            row["study"],
            row["dataset"],
            str(row["charged"]),
            str(row["released"]),
            str(row["lost"]),
            here,
            own,
        )
    console.print(table)


def _evaluations(found: dict[str, Any]) -> str:
    """ε of what evaluations told about validation and test patients."""
    spent = f"{found['spent']:.3g}"
    if not found["unbounded_studies"]:
        return spent
    return f"{spent}, and unbounded: exact counts of {found['unbounded_studies']} studies"


def _unbounded(found: dict[str, int]) -> str:
    """Training without privacy, which no ε bounds."""
    if not found["rounds"]:
        return "none"
    return f"unbounded: {found['rounds']} rounds of {found['studies']} studies"
