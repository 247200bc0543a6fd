"""The demonstration: synthetic hospitals on disk as DICOM, two studies over them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fedward.console import Console
from fedward.errors import OutputError
from fedward.plan.load import parse_plan
from fedward.plan.schema import TaskKind
from fedward.ready_studies import shipped_study
from fedward.tasks.registry import DRAFTED
from fedward_simulation.cohort import write_cohort
from fedward_simulation.cohort.write import MARKER
from fedward_simulation.study import Options, Study

_HOSPITALS = 4
KINDS: tuple[TaskKind, ...] = DRAFTED


def demo_studies(
    out: Path, seed: int, device: str, patients: int, console: Console, *, fresh: bool = False
) -> list[Study]:
    """Write the synthetic cohorts under ``out`` and set up a study over each.

    The first is classification with differential privacy per patient, the second segmentation;
    both with their baselines.
    """
    studies = []
    for kind in KINDS:
        data = out / f"cohort-{kind}"
        _cohort(data, seed, kind, patients, console)
        plan = parse_plan(plan_text(kind))
        options = Options(
            data=data,
            out=out / plan.study.name,
            format="dicom",
            partition="folders",
            device=device,
            baselines=True,
            seed=seed,
            fresh=fresh,
        )
        studies.append(Study(plan, options))
    return studies


def plan_text(kind: TaskKind) -> str:
    """The demonstration's plan."""
    return shipped_study(f"demo/{kind}").read_text("utf-8")


def _cohort(data: Path, seed: int, kind: TaskKind, patients: int, console: Console) -> None:
    """Write a cohort, unless the same one is there from an earlier run."""
    if _facts(data) == (seed, patients * _HOSPITALS):
        return
    if data.exists() and any(data.iterdir()) and not (data / MARKER).is_file():
        raise OutputError(
            "the demonstration writes only over its own synthetic cohort",
            value=data.name,
            fix="Choose another folder with --out",
        )
    console.print(f"writing {_HOSPITALS} SYNTHETIC hospitals as DICOM files, {kind}", style="dim")
    # Written aside and renamed: an interrupted run leaves nothing that looks like a cohort.
    part = data.with_name(data.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_cohort(part, seed, kind, patients, _HOSPITALS)
    shutil.rmtree(data, ignore_errors=True)
    part.rename(data)


def _facts(data: Path) -> tuple[int, int] | None:
    try:
        facts = json.loads((data / MARKER).read_text("utf-8"))
        return int(facts["seed"]), int(facts["patients"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
