"""``fedward-simulate``: try a study without any hospital."""

from __future__ import annotations

import json
import logging
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import click
import typer

from fedward.console import Console, Version, interruptible, print_json, run_command, say
from fedward.ready_studies import plan_file
from fedward.startup import prepare
from fedward.tasks.registry import DRAFTED
from fedward_client.data.readers.registry import READERS

if TYPE_CHECKING:
    from fedward_simulation.first_study import Draft

app = typer.Typer(
    help="Run a federated study on this machine.",
    epilog="First steps: fedward-simulate demo | fedward-simulate init --data FOLDER",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Work on study plans without data.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")


class EngineName(StrEnum):
    """Choices of --engine."""

    local = "local"
    ray = "ray"


_AUTO: Final = "auto"
FormatName = Annotated[
    str,
    typer.Option("--format", click_type=click.Choice([_AUTO, *READERS]), help="How the data lie."),
]
PatientColumn = Annotated[
    str,
    typer.Option(
        "--patient-column",
        metavar="NAME",
        help="Column of the tables that names the patients; none: patient, patient_id, subject, …",
    ),
]
PatientFolder = Annotated[
    int,
    typer.Option(
        "--patient-folder",
        min=0,
        max=16,
        metavar="N",
        help="Which folder on an image's path is its patient, from 1; 0: none.",
    ),
]
ImagesArePatients = Annotated[
    bool,
    typer.Option(
        "--images-are-patients",
        help="Let a private study run on data that name no patients: privacy holds per image.",
    ),
]
TaskKind = Annotated[
    str,
    typer.Option(
        "--task",
        click_type=click.Choice(["", *DRAFTED]),
        help="What is to be learnt; none: what the data seem to be for.",
    ),
]
ClassNames = Annotated[
    str,
    typer.Option("--classes", help="Classes in label order, commas between; none: as found."),
]
LabelColumn = Annotated[
    str,
    typer.Option("--label-column", help="The table's column of labels; none: found by name."),
]
Private = Annotated[bool, typer.Option("--private", help="Make updates differentially private.")]
PlanFile = Annotated[
    Path,
    typer.Argument(
        help="The study plan (TOML), or the name of a ready study.",
        metavar="PLAN",
        parser=plan_file,
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of everything random.")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Forget an unfinished run in the output folder.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:INDEX.")]


@app.callback()
def _top(version: Version = False) -> None:
    """Run a federated study on this machine."""


@app.command(
    epilog="Example: fedward-simulate run plan.toml --data site.toml --partition iid --baselines"
)
def run(
    context: typer.Context,
    plan: PlanFile,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder or file of images.", show_default=False)
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site",
            metavar="SITE.TOML[:DATASET]",
            help="Or, repeated: a hospital's configuration, for its latest frozen cohort.",
            show_default=False,
        ),
    ] = None,
    format: FormatName = _AUTO,
    sites: Annotated[
        int | None,
        typer.Option("--sites", min=1, help="Hospitals to make; none: as many as the plan needs."),
    ] = None,
    partition: Annotated[
        str,
        typer.Option(
            "--partition",
            help="folders | iid | dirichlet:ALPHA | shards:K | quantity:ALPHA | column:NAME.",
        ),
    ] = "folders",
    patient_column: PatientColumn = "",
    patient_folder: PatientFolder = 0,
    images_are_patients: ImagesArePatients = False,
    engine: Annotated[
        EngineName, typer.Option("--engine", help="local, or Flower's ray.")
    ] = EngineName.local,
    device: Device = "auto",
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Also train each hospital alone and all data pooled."),
    ] = False,
    leave_one_out: Annotated[
        bool,
        typer.Option(
            "--leave-one-out",
            help="Also run the study without each hospital in turn, and test it there.",
        ),
    ] = False,
    evaluate_only: Annotated[
        str,
        typer.Option(
            "--evaluate-only",
            metavar="NAMES",
            help="Hospitals, with commas between, that train nothing and test the finished model.",
        ),
    ] = "",
    epsilons: Annotated[
        str,
        typer.Option(
            "--epsilons", help="Also run with these ε, such as 1,3,8 (plans with privacy)."
        ),
    ] = "",
    private_counts: Annotated[
        bool,
        typer.Option(
            "--private-counts",
            help="Evaluate with noise, as hospitals do by default; baselines stay exact.",
        ),
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            metavar="SITE.TOML",
            help="Hold the study to this policy at each hospital; none: everything is allowed.",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Figures as counted, not as hospitals would send them."),
    ] = False,
    cache_gib: Annotated[
        float | None,
        typer.Option("--cache-gib", min=0.001, help="GiB that prepared images may take."),
    ] = None,
    seed: Seed = 0,
    out: Out = Path("runs/latest"),
    fresh: Fresh = False,
    checkpoint_seconds: Annotated[
        float,
        typer.Option(
            "--checkpoint-seconds", min=0, help="Least time between writes; 0: after each round."
        ),
    ] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Run a study: hospitals side by side on this machine, then the report."""
    # What is wrong with the command or the plan shows before the slow imports.
    _one_source(context)
    from fedward.plan import load_plan

    others, loaded = _numbers(epsilons), load_plan(plan)
    from fedward_simulation.options import Hospital, Options, is_config
    from fedward_simulation.output import check_out
    from fedward_simulation.study import Study

    own = None
    if data and is_config(data):
        config, name = Hospital.parse(str(data)).configured()
        own, data = config.datasets[name], config.datasets[name].root
    options = Options(
        data=data,
        dataset=own,
        out=out,
        format=None if format == _AUTO else format,
        partition=partition,
        sites=sites,
        engine=engine.value,
        device=device,
        baselines=baselines,
        leave_one_out=leave_one_out,
        evaluate_only=tuple(one.strip() for one in evaluate_only.split(",") if one.strip()),
        epsilons=others,
        seed=seed,
        plan_folder=plan.parent,
        cache_gib=cache_gib,
        private_counts=private_counts,
        policy=policy,
        exact=exact,
        patient_column=patient_column,
        patient_folder=patient_folder,
        images_are_patients=images_are_patients or bool(own and own.images_are_patients),
        fresh=fresh,
        checkpoint_seconds=checkpoint_seconds,
        hospitals=tuple(map(Hospital.parse, site or ())),
    )
    check_out(out, data)
    _run_studies([Study(loaded, options)], out, as_json)


@app.command(epilog="Example: fedward-simulate audit plan.toml --data data.npz --partition iid")
def audit(
    plan: PlanFile,
    data: Annotated[
        Path, typer.Option("--data", help="Folder or file of images.", show_default=False)
    ],
    format: FormatName = _AUTO,
    sites: Annotated[
        int | None, typer.Option("--sites", min=1, help="Hospitals to make, as in `run`.")
    ] = None,
    partition: Annotated[
        str, typer.Option("--partition", help="Who has which patient, as in `run`.")
    ] = "folders",
    patient_column: PatientColumn = "",
    patient_folder: PatientFolder = 0,
    images_are_patients: ImagesArePatients = False,
    shadows: Annotated[
        int, typer.Option("--shadows", min=0, max=256, help="Federations on random halves.")
    ] = 8,
    canaries: Annotated[
        int, typer.Option("--canaries", min=0, max=2000, help="Planted patients at each site.")
    ] = 40,
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = Path("runs/latest"),
    as_json: AsJson = False,
) -> None:
    """Attack a study's model and updates, and bound ε from below."""
    from fedward.plan import load_plan

    loaded = load_plan(plan)
    from fedward.flower import identity
    from fedward_simulation.audit.audit import Sizes
    from fedward_simulation.audit.progress import AuditProgress
    from fedward_simulation.audit.study import add_to_report, audit_study, check_release
    from fedward_simulation.options import Options
    from fedward_simulation.output import check_out
    from fedward_simulation.study import Study

    options = Options(
        data=data,
        out=out,
        format=None if format == _AUTO else format,
        partition=partition,
        sites=sites,
        device=device,
        seed=seed,
        plan_folder=plan.parent,
        patient_column=patient_column,
        patient_folder=patient_folder,
        images_are_patients=images_are_patients,
    )
    check_out(out, data)
    identity.quiet()
    _log_to(out / "run.log")
    console = _console(as_json)
    with interruptible(), AuditProgress(console) as progress:
        found = audit_study(Study(loaded, options), Sizes(shadows, canaries), progress, fresh=False)
    told = add_to_report(found, out)
    if not as_json:
        _show_audit(console, found)
        where = out / ("report.html" if told else "audit.json")
        console.print(f"Audit: {where}", highlight=False, soft_wrap=True)
    check_release(found)
    if as_json:
        print_json({"out": str(out), "audit": found.model_dump(mode="json")})


@app.command()
def demo(
    out: Out = Path("demo"),
    seed: Seed = 0,
    device: Device = "auto",
    patients: Annotated[
        int, typer.Option("--patients", min=20, help="Patients per hospital.")
    ] = 80,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Four synthetic hospitals as DICOM files, two studies, one report."""
    from fedward_simulation.demo import demo_studies
    from fedward_simulation.output import check_out

    check_out(out)
    studies = demo_studies(out, seed, device, patients, _console(as_json), fresh=fresh)
    _run_studies(studies, out, as_json)


@app.command(epilog="Example: fedward-simulate cohort hospitals --hospitals 2 --patients 40")
def cohort(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    kind: Annotated[
        str,
        typer.Option(
            "--kind", click_type=click.Choice([*DRAFTED]), help="What the images are for."
        ),
    ] = DRAFTED[0],
    hospitals: Annotated[int, typer.Option("--hospitals", min=1, help="How many to make.")] = 2,
    patients: Annotated[int, typer.Option("--patients", min=2, help="Patients per hospital.")] = 40,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write synthetic hospitals as DICOM files, and train nothing."""
    from fedward_simulation.cohort import write_cohort

    facts = write_cohort(folder, seed, kind, patients, hospitals)
    if as_json:
        print_json(json.loads(facts.to_json()))
        return
    for one in facts.hospitals:
        say(f"{one.name}: {one.patients} SYNTHETIC patients, {one.images} images")


@app.command(epilog="Example: fedward-simulate init --data chest --out study")
def init(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder or file of images; none: asked.", show_default=False),
    ] = None,
    task: TaskKind = "",
    classes: ClassNames = "",
    label_column: LabelColumn = "",
    patient_column: PatientColumn = "",
    patient_folder: PatientFolder = 0,
    format: FormatName = _AUTO,
    private: Private = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Write a first plan and site file for a folder of images, ready to run.

    Asks for what it is not told, where there is a terminal.
    """
    from fedward_simulation.first_study import draft, slug, write
    from fedward_simulation.wishes import settle

    wanted = settle(
        data,
        task=task,
        classes=classes,
        label_column=label_column,
        patient_column=patient_column,
        patient_folder=patient_folder,
        format=None if format == _AUTO else format,
    )
    made = draft(wanted, slug(wanted.root.resolve().stem), out, private=private)
    write(made, out)
    _tell_draft(made, out, as_json)


def _tell_draft(made: Draft, out: Path, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "files": [str(out / name) for name in made.files],
                "found": made.found,
                "notes": list(made.notes),
                "commands": list(made.commands),
            }
        )
        return
    say(f"Found: {made.found}.")
    for note in made.notes:
        say(f"Note: {note}")
    say(f"Written: {', '.join(str(out / name) for name in made.files)}. Next:")
    for command in made.commands:
        say(f"  {command}")


@plan_app.command(
    "suggest",
    epilog="Example: fedward-simulate plan suggest --data hospitals --memory 8 --out study",
)
def suggest(
    data: Annotated[
        Path, typer.Option("--data", help="Folder or file of images.", show_default=False)
    ],
    memory: Annotated[
        float,
        typer.Option("--memory", min=0.01, help="GiB of the smallest device that trains."),
    ] = 8.0,
    minimum_count: Annotated[
        int,
        typer.Option("--minimum-count", min=1, help="Patients below which a site counts nothing."),
    ] = 5,
    task: TaskKind = "",
    classes: ClassNames = "",
    label_column: LabelColumn = "",
    patient_column: PatientColumn = "",
    patient_folder: PatientFolder = 0,
    format: FormatName = _AUTO,
    private: Private = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Write a plan by nnU-Net's rules from what the images are like, and site files.

    Each hospital's images are counted by themselves, as its policy would let them be; the plan
    follows from the sums.
    """
    from functools import partial

    from fedward_simulation.first_study import draft, slug, write
    from fedward_simulation.suggest import choose
    from fedward_simulation.wishes import settle

    wanted = settle(
        data,
        task=task,
        classes=classes,
        label_column=label_column,
        patient_column=patient_column,
        patient_folder=patient_folder,
        format=None if format == _AUTO else format,
    )
    rules = partial(choose, memory=memory, least=minimum_count, private=private)
    name = slug(wanted.root.resolve().stem)
    made = draft(wanted, name, out, private=private, choose=rules)
    write(made, out)
    _tell_draft(made, out, as_json)


@plan_app.command("check", epilog="Example: fedward-simulate plan check plan.toml")
def check(plan: PlanFile, as_json: AsJson = False) -> None:
    """Validate and explain a plan without data."""
    from fedward.plan import load_plan, plan_hash
    from fedward.plan.explain import explain

    loaded = load_plan(plan)
    from fedward.models import describe, most_traffic
    from fedward_simulation.feasible import check_privacy, start_model

    start_model(loaded, 0, plan.parent)
    check_privacy(loaded)
    parameters, moved = describe(loaded).parameters, most_traffic(loaded)
    if as_json:
        print_json(
            {
                "valid": True,
                "study": loaded.study.name,
                "plan_sha256": plan_hash(loaded),
                "parameters": parameters,
                "bytes_up": moved[0],
                "bytes_down": moved[1],
                "rounds": loaded.rounds,
                "plan": loaded.model_dump(mode="json"),
            }
        )
    else:
        say(explain(loaded, parameters, moved))


@app.command(epilog="Example: fedward-simulate export runs/latest")
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="A new folder; none: RUN-bundle.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model as a MONAI bundle with an ONNX file in it."""
    from fedward_simulation.output import export_run

    target = out or run.with_name(f"{run.resolve().name}-bundle")
    made = export_run(run, target)
    if as_json:
        print_json(
            {"export": target.name, "files": list(made.files), "difference": made.difference}
        )
        return
    say(f"MONAI bundle: {target}, ONNX file: {target / 'models' / 'model.onnx'}")
    say(f"Outputs differ from the network's by at most {made.difference:.1e}.")


@app.command(epilog="Example: fedward-simulate evaluate runs/latest/model.safetensors --data chest")
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A finished model's file.", show_default=False),
    ],
    data: Annotated[
        Path, typer.Option("--data", help="Folder or file of images.", show_default=False)
    ],
    format: FormatName = _AUTO,
    folders: Annotated[
        bool, typer.Option("--folders", help="Each sub-folder of the data is a hospital.")
    ] = False,
    patient_column: PatientColumn = "",
    patient_folder: PatientFolder = 0,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="COLUMN",
            help="Repeated: also figures for each value of this column of the labels.",
            show_default=False,
        ),
    ] = None,
    minimum: Annotated[
        int, typer.Option("--minimum", min=1, help="Patients of a group whose figures are told.")
    ] = 10,
    device: Device = "auto",
    out: Out = Path("runs/evaluation"),
    as_json: AsJson = False,
) -> None:
    """Evaluate a finished model on data that took no part in its study."""
    from fedward.models.finished import open_finished
    from fedward_client.training.device import choose_device
    from fedward_simulation import evaluate as evaluation
    from fedward_simulation.options import Options
    from fedward_simulation.output import check_out

    options = Options(
        data=data,
        out=out,
        format=None if format == _AUTO else format,
        partition="folders" if folders else "iid",
        device=str(choose_device(device)),
        patient_column=patient_column,
        patient_folder=patient_folder,
    )
    check_out(out, data)
    opened, console = open_finished(model), _console(as_json)
    with interruptible(), console.status("reading the model") as status:
        found = evaluation.evaluate_model(opened, options, by or (), minimum, status.update)
    told = evaluation.as_json(opened, found, minimum)
    path = evaluation.write_evaluation(told, out)
    if as_json:
        print_json({"out": str(out), "evaluation": told})
        return
    console.print(evaluation.table(opened.plan, found))
    for reason, count in sorted(found.left_out.items()):
        console.print(f"left out: {count}: {reason}")
    console.print(f"Evaluation: {path}", highlight=False, soft_wrap=True)


def _run_studies(studies: list[Any], out: Path, as_json: bool) -> None:
    from fedward.flower import identity
    from fedward_server.report import headline, summary_table
    from fedward_simulation.audit.study import gate
    from fedward_simulation.output import set_aside, write_outputs
    from fedward_simulation.progress import StudyProgress

    def write() -> None:
        if begun := [study for study in studies if study.results.arms]:
            write_outputs(begun, out)

    identity.quiet()
    # Of an unfinished run the results so far stay where they are until there are newer ones.
    unfinished = [study.unfinished() for study in studies]
    if not any(unfinished):
        set_aside(studies, out)
    _log_to(out / "run.log")
    console = _console(as_json)
    with interruptible():
        try:
            for study in studies:
                study.wrote = write
                with StudyProgress(console, study.plan.metrics.primary) as progress:
                    study.listen, study.note = progress.listen, progress.note
                    study.run()
                if study.plan.privacy.audit:
                    gate(study, console)
        finally:
            write()
    for study in studies:
        study.checkpoints.clear()
    if as_json:
        print_json(
            {"out": str(out), "studies": [s.results.model_dump(mode="json") for s in studies]}
        )
        return
    for study in studies:
        console.print(summary_table(study.results))
        console.print(headline(study.results))
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)


def _show_audit(console: Console, found: Any) -> None:
    from fedward_server.report.memorisation import audit_tables, audit_words
    from fedward_server.report.table import printed

    for table in audit_tables(found):
        console.print(printed(table))
    for sentence in audit_words(found):
        console.print(sentence)


def _log_to(path: Path) -> None:
    """Details of what went wrong at a site, for the machine's owner; made when there are any."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("fedward")
    logger.handlers, logger.propagate = [handler], False


def _one_source(context: typer.Context) -> None:
    """Either one dataset to divide or hospitals that bring their own."""
    given = {name for name, value in context.params.items() if _is_given(context, name, value)}
    if ("data" in given) == ("site" in given):
        raise typer.BadParameter("give either --data, or --site for each hospital")
    of_data = {
        "format",
        "sites",
        "partition",
        "cache_gib",
        "patient_column",
        "patient_folder",
        "images_are_patients",
    }
    others = sorted(given & of_data)
    if "site" in given and others:
        option = others[0].replace("_", "-")
        raise typer.BadParameter(f"--{option} is about --data; a frozen cohort is taken as it is")


def _is_given(context: typer.Context, name: str, value: object) -> bool:
    source = context.get_parameter_source(name)
    return bool(value) and source is not None and source.name != "DEFAULT"


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = (-1.0,)
    if any(not 0 < value < float("inf") for value in values):
        raise typer.BadParameter("give positive numbers with commas between, such as 1,3,8")
    return values


def _console(as_json: bool) -> Console:
    # With --json, standard output holds the JSON object alone.
    return Console(stderr=as_json)


def main() -> None:
    """Entry point."""
    prepare()
    run_command(app)


if __name__ == "__main__":
    main()
