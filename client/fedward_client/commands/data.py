"""``fedward-client data``: what a dataset holds, and what it can be used for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedward.console import Console, print_json, say
from fedward.errors import ConfigError, DataError, FedwardError
from fedward_client.commands.fetch import fetch
from fedward_client.commands.options import SITE, Config
from fedward_client.commands.tables import check_table, cohort_table, report_tables, scan_table
from fedward_client.commands.work import busy, load_site, reading, scan_dataset, work_on

if TYPE_CHECKING:
    from fedward_client.config import SiteConfig
    from fedward_client.index.scan import Summary

data_app = typer.Typer(
    help="Find out what a dataset holds and what it can be used for.", no_args_is_help=True
)
data_app.command("fetch", epilog="Example: fedward-client data fetch chest --dry-run")(fetch)
Name = Annotated[str, typer.Argument(help="The dataset.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Cohort = Annotated[
    str | None,
    typer.Option("--cohort", help="A frozen cohort: `latest`, or the start of its hash."),
]


@data_app.command("index")
def index(
    name: Annotated[
        str | None, typer.Argument(help="The dataset; none: all of them.", show_default=False)
    ] = None,
    config: Config = SITE,
    as_json: AsJson = False,
) -> None:
    """Read every new or changed file once and keep what is known of it."""
    site = load_site(config)
    found, failed = _scan_all(site, [name] if name else sorted(site.datasets))
    if name and failed:
        raise failed[name]
    if as_json:
        print_json(
            {
                "datasets": {one: _plain(summary) for one, summary in found.items()},
                "failed": {one: str(error) for one, error in failed.items()},
            }
        )
    else:
        for one, summary in found.items():
            Console().print(scan_table(one, summary))
    for wrong in failed.values():
        say(f"error: {wrong}", err=True, fg="red")
    if failed:
        raise typer.Exit(next(iter(failed.values())).exit_code)


@data_app.command("report", epilog="Example: fedward-client data report chest --config site.toml")
def report(
    name: Name,
    config: Config = SITE,
    files: Annotated[
        bool, typer.Option("--files", help="Name each file that was left out, and why.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a dataset holds, what was left out and why, and what is risky."""
    from fedward_client.cohort.freeze import left_out_files
    from fedward_client.cohort.report import make_report

    with work_on(load_site(config), name) as work, reading(name) as listen:
        made = make_report(name, work.dataset, work.index, work.extract, listen)
        named = left_out_files(work.dataset, work.index, work.extract) if files else []
    if as_json:
        print_json(made.model_dump(mode="json") | ({"files": named} if files else {}))
        return
    for table in report_tables(made):
        Console().print(table)
    for one in named:  # for the hospital's own eyes: these names go nowhere else
        say(f"{one['reason']}: {one['name']}")


@data_app.command("freeze", epilog="Example: fedward-client data freeze chest")
def freeze(name: Name, config: Config = SITE, as_json: AsJson = False) -> None:
    """Keep the dataset as it is now as a cohort with a content hash."""
    from fedward_client.cohort.changes import since_last
    from fedward_client.cohort.freeze import counts, make_cohort, save, usable

    with work_on(load_site(config), name) as work:
        with reading(name) as listen:
            found = usable(work.dataset, work.index, work.extract, listen)
            cohort = make_cohort(name, work.dataset, found, work.index, work.extract)
        made = counts(cohort, work.dataset)
        made["notes"] = list(found.notes)
        made["changes"] = since_last(cohort, work.site, work.extract.secret)
        save(cohort, work.site.site.state)
    if as_json:
        print_json(made)
    else:
        Console().print(cohort_table(made))


@data_app.command("preview", epilog="Example: fedward-client data preview chest --out chest.html")
def preview(
    name: Name,
    out: Annotated[Path, typer.Option("--out", help="The page (HTML).", show_default=False)],
    config: Config = SITE,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Show images as this study plan prepares them.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=500, help="Samples to show.")] = 24,
    cohort: Cohort = None,
    as_json: AsJson = False,
) -> None:
    """Write a contact sheet after preprocessing, masks overlaid, for the hospital's own eyes."""
    from fedward.plan import load_plan
    from fedward_client.cohort.preview import check_place, whose, write_preview

    site, loaded = load_site(config), load_plan(plan) if plan else None
    check_place(out, site.dataset(name).root)  # before the work
    task = site.dataset(name).as_task()
    if loaded and loaded.task.dimensions != task.dimensions:
        raise DataError(
            "the plan must be for images of the dataset's dimensions",
            value=loaded.task.dimensions,
            fix="Choose another plan",
            where=name,
        )
    with work_on(site, name) as work:
        samples = work.samples(cohort)[1].samples
        with busy(f"{name}: preparing images"):
            prep = loaded.preprocessing if loaded else None
            shown, left_out = write_preview(
                out, work.dataset.root, name, samples, task, prep, count
            )
    if as_json:
        print_json({"dataset": name, "shown": shown, "left_out": dict(left_out)})
        return
    say(f"{shown} of {whose(samples)} are on the page. It stays at the site.")


@data_app.command("check", epilog="Example: fedward-client data check chest --plan plan.toml")
def check(
    name: Name,
    plan: Annotated[Path, typer.Option("--plan", help="The study plan.", show_default=False)],
    config: Config = SITE,
    cohort: Cohort = None,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda or cuda:INDEX.")
    ] = "auto",
    every: Annotated[
        bool, typer.Option("--all", help="Prepare every image, not only some of each class.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--time/--no-time", help="Train a few steps to tell how long it takes.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Tell whether a dataset can serve a study plan, and at what cost."""
    from fedward.plan import load_plan

    site, loaded = load_site(config), load_plan(plan)
    from fedward_client.cohort.check import Room, check_plan
    from fedward_client.cohort.freeze import modalities, stated
    from fedward_client.training.device import choose_device

    choose_device(device)  # before the work
    with work_on(site, name) as work:
        frozen, found = work.samples(cohort, strict=True)
        words = modalities(found.samples, work.index, work.extract)
        with busy(f"{name}: checking"):
            made = check_plan(
                name,
                frozen,
                work.dataset,
                found.samples,
                words,
                loaded,
                Room(site.site.state, device),
                measure=measure,
                every=every,
                left_out=found.left_out,
                stated=stated(found.samples, work.index, work.extract),
            )
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        Console().print(check_table(made))
    if not made.can_serve:
        raise typer.Exit(DataError.exit_code)


def _scan_all(
    site: SiteConfig, names: Sequence[str]
) -> tuple[dict[str, Summary], dict[str, FedwardError]]:
    """Scan one dataset after another; what is wrong with one is no reason to leave the rest."""
    found: dict[str, Summary] = {}
    failed: dict[str, FedwardError] = {}
    for name in names:
        try:
            found[name] = scan_dataset(site, name)
        except (ConfigError, DataError) as error:
            failed[name] = error
    return found, failed


def _plain(summary: Summary) -> dict[str, Any]:
    return {
        "new": summary.new,
        "unchanged": summary.unchanged,
        "gone": summary.gone,
        "reasons": dict(summary.reasons),
        "seconds": round(summary.seconds, 3),
    }
