"""What a run leaves in its folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedward.errors import OutputError
from fedward.files import write_text
from fedward.integrity import about_model
from fedward.models import load_model, save_model
from fedward.plan.load import canonical, from_canonical, plan_hash
from fedward.plan.schema import Plan
from fedward_server.artifacts.card import model_card
from fedward_server.artifacts.export import Delivered, Exported, export_bundle
from fedward_server.report import write_metrics, write_report
from fedward_server.report.metrics import read_metrics
from fedward_server.results import StudyResults
from fedward_simulation.left_out import FILE, write_left_out
from fedward_simulation.study import Study

_EARLIER = "earlier-results"
_RESULTS = (
    "report.html",
    "metrics.json",
    "model.safetensors",
    "plan.json",
    "plan.sha256",
    "run.log",
    "audit.json",
    FILE,
)


def check_out(out: Path, data: Path | None = None) -> None:
    """Find out before the work whether its results can be written.

    Parameters
    ----------
    out : Path
        The folder for the results; made when missing.
    data : Path or None
        The images: what is written among them would be read as data by the next run.

    Raises
    ------
    OutputError
        They cannot.
    """
    if data is not None and out.resolve().is_relative_to(data.resolve()):
        raise OutputError(
            "the output folder must lie outside the data",
            value=out.name,
            fix="Choose another folder with --out",
            where="--out",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OutputError(
            "the output folder must be writable",
            value=error.strerror,
            fix="Choose another folder with --out",
            where="--out",
        ) from error


def set_aside(studies: Sequence[Study], out: Path) -> None:
    """Move earlier results into a sub-folder, lest they pass for those of a run that fails.

    Raises
    ------
    OutputError
        They cannot be moved.
    """
    try:
        for folder in _folders(studies, out):
            there = [folder / name for name in _RESULTS if (folder / name).exists()]
            if there:
                (folder / _EARLIER).mkdir(exist_ok=True)
            for path in there:
                path.replace(folder / _EARLIER / path.name)
    except OSError as error:
        raise OutputError(
            f"earlier results must be movable to {_EARLIER}/",
            value=error.strerror,
            fix="Choose another folder with --out",
            where="--out",
        ) from error


def _forget_earlier(studies: Sequence[Study], out: Path) -> None:
    for folder in _folders(studies, out):
        for name in _RESULTS:
            (folder / _EARLIER / name).unlink(missing_ok=True)
        with suppress(OSError):  # not there, or it holds something else
            (folder / _EARLIER).rmdir()


def _folders(studies: Sequence[Study], out: Path) -> list[Path]:
    return [out] if len(studies) == 1 else [out, *(out / s.plan.study.name for s in studies)]


def write_outputs(studies: Sequence[Study], out: Path) -> None:
    """Write report, metrics, models and plans; of several studies each in a folder of its own.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        results: list[StudyResults] = [study.results for study in studies]
        for study in studies:
            _write_study(study, out if len(studies) == 1 else out / study.plan.study.name)
        write_metrics(results, out / "metrics.json")
        write_report(results, out / "report.html")
        if all(study.results.complete for study in studies):
            _forget_earlier(studies, out)
    except OSError as error:
        raise OutputError(
            "results must be written",
            value=error.strerror,
            fix="Free the disk, or change --out",
            where="--out",
        ) from error


def _write_study(study: Study, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "plan.json", canonical(study.plan))
    (folder / "plan.sha256").write_text(f"{plan_hash(study.plan)}  plan.json\n", "utf-8")
    write_left_out(study.left_out, folder / FILE)
    audited = study.results.audit is not None or not study.plan.privacy.audit
    if study.model is not None and audited:
        facts = {
            **about_model(study.plan.study.name, study.plan, "shared"),
            "classes": ",".join(study.plan.task.classes),
            "model": study.plan.model.name,
            "synthetic": str(study.results.synthetic).lower(),
            "complete": str(study.results.complete).lower(),
        }
        study.results.model_sha256 = save_model(folder / "model.safetensors", study.model, facts)


# What a run left, as a MONAI bundle with an ONNX file.


def export_run(folder: Path, target: Path) -> Exported:
    """Export the model of a run's folder (:func:`fedward_server.artifacts.export.export_bundle`).

    Raises
    ------
    OutputError
        The folder holds no complete run.
    """
    plan = _plan(folder)
    results = _results(folder, plan)
    arrays, _ = load_model(folder / "model.safetensors", results.model_sha256)
    card = model_card(plan.study.name, plan, results)
    return export_bundle(Delivered(plan, arrays, card), target)


def _plan(folder: Path) -> Plan:
    try:
        return from_canonical((folder / "plan.json").read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        raise _no_run(folder, "plan.json") from None


def _results(folder: Path, plan: Plan) -> StudyResults:
    """Of a run of several studies, as of the demo, the metrics lie one folder above."""
    for path in (folder / "metrics.json", folder.parent / "metrics.json"):
        with suppress(OutputError):
            for results in read_metrics(path):
                if results.plan_sha256 == plan_hash(plan) and results.arms:
                    return results
    raise _no_run(folder, "metrics.json")


def _no_run(folder: Path, missing: str) -> OutputError:
    return OutputError(
        "the folder must be that of a finished run",
        value=f"{folder.name}: no fitting {missing}",
        fix="Give the folder that `fedward-simulate run --out` wrote",
        where="RUN",
    )
