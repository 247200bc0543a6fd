"""``fedward-client``: what a hospital does with its own data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedward.errors import FedwardError, Interrupted

if TYPE_CHECKING:
    from client.cohort.report import DatasetReport
    from client.config import SiteConfig
    from client.index.scan import Summary

app = typer.Typer(
    help="Work with a hospital's images, at the hospital.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
data_app = typer.Typer(help="Find out what a dataset holds.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Config = Annotated[Path, typer.Option("--config", help="The site's configuration (TOML).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
_SITE = Path("site.toml")


@app.callback()
def _top() -> None:
    """Work with a hospital's images, at the hospital."""


@data_app.command("index")
def index(
    name: Annotated[
        str | None, typer.Argument(help="The dataset; none: all of them.", show_default=False)
    ] = None,
    config: Config = _SITE,
    as_json: AsJson = False,
) -> None:
    """Read every new or changed file once and keep what is known of it."""
    from client.config import load_config

    site = load_config(config)
    names = [name] if name else sorted(site.datasets)
    found = {one: _scan(site, one) for one in names}
    if as_json:
        _print_json({"datasets": {one: _plain(summary) for one, summary in found.items()}})
        return
    for one, summary in found.items():
        Console().print(_scan_table(one, summary))


@data_app.command("report")
def report(
    name: Annotated[str, typer.Argument(help="The dataset.", show_default=False)],
    config: Config = _SITE,
    as_json: AsJson = False,
) -> None:
    """Tell what a dataset holds, what was left out and why, and what is risky."""
    from client.cohort.report import make_report
    from client.config import load_config
    from client.index.store import open_index

    site = load_config(config)
    _scan(site, name)
    with open_index(site.site.state, name) as found:
        made = make_report(name, site.dataset(name), found, _extractor(site, name))
    if as_json:
        _print_json(made.model_dump(mode="json"))
        return
    for table in _report_tables(made):
        Console().print(table)


def _scan(site: SiteConfig, name: str) -> Summary:
    from client.index.scan import scan
    from client.index.store import open_index

    extract, console = _extractor(site, name), Console(stderr=True)
    with (
        open_index(site.site.state, name) as found,
        Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            console=console, transient=True,
        ) as progress,
    ):  # fmt: skip
        shown = progress.add_task(f"{name}: indexing")
        return scan(
            extract, found,
            listen=lambda s: progress.update(
                shown, description=f"{name}: {s.new} files read, {s.unchanged} known"
            ),
        )  # fmt: skip


def _extractor(site: SiteConfig, name: str) -> Any:
    from client.data.read import detect
    from client.index.extract import Extractor
    from client.secret import site_secret

    dataset = site.dataset(name)
    shared = frozenset(one.lower() for one in dataset.patients.shared_ids)
    format = dataset.format or detect(dataset.root)
    return Extractor(dataset.root, format, site_secret(site.site.state), shared)


def _plain(summary: Summary) -> dict[str, Any]:
    return {
        "new": summary.new, "unchanged": summary.unchanged, "gone": summary.gone,
        "reasons": dict(summary.reasons), "seconds": round(summary.seconds, 3),
    }  # fmt: skip


def _scan_table(name: str, summary: Summary) -> Table:
    rows = {"read": summary.new, "known from before": summary.unchanged, "gone": summary.gone}
    rows |= {f"cannot serve: {reason}": n for reason, n in sorted(summary.reasons.items())}
    return _table(f"{name}: {summary.seconds:.1f} s", rows, ("files", ""))


def _report_tables(made: DatasetReport) -> list[Table]:
    totals = {
        "files": made.files, "images": made.instances, "patients": made.patients,
        "studies": made.studies, "series": made.series, "usable samples": made.samples,
        "their patients": made.sample_patients,
    }  # fmt: skip
    parts: list[tuple[str, dict[str, Any]]] = [
        ("modality", made.modality), ("body part", made.body_part),
        ("manufacturer", made.manufacturer), ("object", made.object_type),
        ("transfer syntax", made.transfer_syntax), ("rows x columns", made.size),
        ("spacing, mm", made.spacing), ("samples by class", made.images_by_class),
        ("patients by class", made.patients_by_class), ("patients by part", made.split),
        ("left out", made.left_out),
        ("intensity", {m: f"{r.lowest:g} to {r.highest:g}" for m, r in made.intensity.items()}),
    ]  # fmt: skip
    table = Table("", "", "", title=made.dataset, show_header=False)
    for title, rows in [("", totals), *parts]:
        for place, (name, value) in enumerate(rows.items()):
            table.add_row(title if place == 0 else "", name, str(value))
        if rows:
            table.add_section()
    risks = Table("risk", "count", "what to do")
    for risk in made.risks:
        risks.add_row(f"not so: {risk.rule}", str(risk.count), risk.fix)
    return [table, risks] if made.risks else [table]


def _table(title: str, rows: dict[str, Any], heads: tuple[str, str]) -> Table:
    table = Table(heads[0], heads[1], title=title or None)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False))


def main() -> None:
    """Entry point: every failure ends with its own exit code and a message, not a traceback."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        _fail(Interrupted("the command was interrupted", fix="Run it again"))
    except FedwardError as error:
        _fail(error)


def _fail(error: FedwardError) -> None:
    if "--json" in sys.argv:
        _print_json(
            {"error": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}
        )
    typer.secho(f"error: {error}", err=True, fg="red")
    raise SystemExit(error.exit_code)


if __name__ == "__main__":
    main()
