"""Answers as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from fedward.console import Table

if TYPE_CHECKING:
    from fedward_client.cohort.check import PlanCheck
    from fedward_client.cohort.report import DatasetReport
    from fedward_client.index.scan import Summary

_COLOURS: Final = {
    "pass": "green",
    "warn": "yellow",
    "fail": "red",
    "high": "red",
    "medium": "yellow",
    "low": "white",
}


def scan_table(name: str, summary: Summary) -> Table:
    """What a scan did."""
    rows = {"read": summary.new, "known from before": summary.unchanged, "gone": summary.gone}
    rows |= {f"cannot serve: {reason}": n for reason, n in sorted(summary.reasons.items())}
    return _table(f"{name}: {summary.seconds:.1f} s", rows, ("files", ""))


def report_tables(made: DatasetReport) -> list[Table]:
    """What a dataset holds, and its risks if there are any."""
    table = Table("", "", "", title=made.dataset, show_header=False)
    for title, rows in _parts(made):
        for place, (name, value) in enumerate(rows.items()):
            table.add_row(title if place == 0 else "", name, str(value))
        if rows:
            table.add_section()
    risks = Table("risk", "count", "", "what to do")
    for risk in made.risks:
        risks.add_row(f"not so: {risk.rule}", str(risk.count), _coloured(risk.severity), risk.fix)
    return [table, risks] if made.risks else [table]


def _parts(made: DatasetReport) -> list[tuple[str, dict[str, Any]]]:
    totals = {
        "files": made.files,
        "images": made.instances,
        "patients": made.patients,
        "studies": made.studies,
        "series": made.series,
        "usable samples": made.samples,
        "their patients": people(made.sample_patients, made.images_are_patients),
    }
    pixels = {
        modality: f"{one.lowest:g} to {one.highest:g}, typically "
        f"{one.typical_lowest:g} to {one.typical_highest:g}"
        for modality, one in made.intensity.items()
    }
    return [
        ("", totals),
        ("modality", made.modality),
        ("body part", made.body_part),
        ("manufacturer", made.manufacturer),
        ("intent", made.intent),
        ("burned-in annotation", made.burned_in),
        ("identity removed", made.identity_removed),
        ("recognizable features", made.visual_features),
        ("method of de-identification", made.deidentification),
        ("object", made.object_type),
        ("transfer syntax", made.transfer_syntax),
        ("rows x columns", made.size),
        ("spacing, mm", made.spacing),
        ("between slices, mm", made.slice_distance),
        ("samples by class", made.images_by_class),
        ("patients by class", made.patients_by_class),
        ("marked pixels by class", made.pixels_by_class),
        ("patients by part", made.split),
        ("left out", made.left_out),
        ("intensity", pixels),
        ("labels", {f"hint {k}": text for k, text in enumerate(made.hints, start=1)}),
    ]


def cohort_table(counts: dict[str, Any]) -> Table:
    """What was frozen."""
    rows = {key: counts[key] for key in ("sha256", "patients", "images", "files", "bytes")}
    rows["patients"] = people(rows["patients"], counts["images_are_patients"])
    rows |= {f"images of {name}": n for name, n in counts["images_by_class"].items()}
    if changes := counts.get("changes"):
        told = ("added", "gone", "relabelled")
        rows[f"patients since {changes['since']}"] = ", ".join(
            f"{changes[one]} {one}" for one in told
        )
    if counts["tilted"]:
        rows["volumes of a leaning gantry"] = f"{counts['tilted']}; most plans leave them out"
    if counts["uneven"]:
        rows["volumes of uneven slices"] = f"{counts['uneven']}; resampled to even ones"
    if counts["images_are_patients"]:
        rows["high risk"] = "the data do not name the patient of every image; see the report"
    rows |= {f"note {k}": text for k, text in enumerate(counts.get("notes", ()), start=1)}
    if empty := [name for name, n in counts["images_by_class"].items() if not n]:
        rows["warning"] = (
            f"no image of {', '.join(empty)}: check the words of the labels, or take the class out"
        )
    return _table(f"{counts['cohort']}: frozen", rows, ("", ""))


def fetch_table(made: dict[str, Any]) -> Table:
    """What a PACS has for a dataset, and what came of it."""
    rows = {one: made[one] for one in ("patients", "studies", "series", "objects")}
    rows |= {"here before": made["here"], "refused before": made["refused_before"]}
    if made["misfits"]:
        rows["answers that do not fit the query"] = made["misfits"]
    if made["dry_run"]:
        rows["to fetch"] = made["to_fetch"]
    else:
        rows["fetched"] = f"{made['fetched']} ({made['bytes'] / 2**20:.1f} MiB)"
        rows |= {f"refused: {reason}": n for reason, n in sorted(made["refused"].items())}
        if made["missing"]:
            rows["did not come"] = made["missing"]
    return _table(f"{made['dataset']}: {made['seconds']:.1f} s", rows, ("", ""))


def check_table(made: PlanCheck) -> Table:
    """Each question with its answer, and what to do."""
    answer = "can serve" if made.can_serve else "cannot serve"
    title = f"{made.cohort or made.dataset} {answer} {made.study}"
    table = Table("", "", "found", "what to do", title=title)
    for one in made.findings:
        table.add_row(_coloured(one.status), one.name, one.found, one.fix)
    return table


def people(count: int, per_image: bool) -> str:
    """A count of patients, and whether it is one of images."""
    return f"{count} (each image counts as one)" if per_image else str(count)


def _coloured(word: str) -> Text:
    return Text(word, style=_COLOURS[word])


def _table(title: str, rows: dict[str, Any], heads: tuple[str, str]) -> Table:
    table = Table(heads[0], heads[1], title=title or None)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table
