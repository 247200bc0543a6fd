"""What a run left, as a MONAI bundle with an ONNX file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from fedward.errors import OutputError
from fedward.models import load_model
from fedward.plan.load import from_canonical, plan_hash
from fedward.plan.schema import Plan
from server.artifacts.card import model_card
from server.artifacts.export import Delivered, Exported, export_bundle
from server.report.metrics import read_metrics
from server.results import StudyResults


def export_run(folder: Path, target: Path) -> Exported:
    """Export the model of a run's folder; see :func:`server.artifacts.export.export_bundle`.

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
