"""Where a round's seconds go: milestones that all sites have passed, one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

TRACE = Path(__file__).resolve().parent / "trace"
Call = tuple[str, float, float, bool]
HOPS = (
    "orders are made and handed to the SuperLink",
    "and reach both trainers",
    "training (and its policy, ledger and audit)",
    "updates come back",
    "aggregation",
    "the new model reaches both trainers",
    "evaluation",
    "counts come back, figures",
    "checkpoint and registry",
)


def hops(trace: Path, since: int) -> tuple[dict[str, float], int]:
    """Median seconds of each hop over the rounds after the first, and where the trace ends.

    Parameters
    ----------
    trace : Path
        What ``trace/sitecustomize.py`` noted.
    since : int
        Lines that belong to earlier studies.
    """
    lines = trace.read_text().splitlines()
    calls: list[Call] = [tuple(json.loads(line)) for line in lines[since:]]
    rounds = [call for call in calls if call[0] == "StudyRun._round"][1:]
    table = [_of_round(calls, began, end) for _, began, end, _ in rounds]
    return dict(zip(HOPS, np.median(table, axis=0).tolist(), strict=True)), len(lines)


def _of_round(calls: list[Call], began: float, end: float) -> list[float]:
    own = [call for call in calls if call[1] >= began and call[2] <= end]

    def ends(name: str, after: float, before: float) -> float:
        return max(call[2] for call in own if call[0] == name and after <= call[1] < before)

    def starts(name: str, after: float, before: float) -> float:
        return max(call[1] for call in own if call[0] == name and after <= call[1] < before)

    aggregated = ends("StudyRun._aggregate", began, end)
    replies = starts("StudyRun._aggregate", began, end)
    validated = ends("StudyRun._validate", began, end)
    marks = [
        began,
        ends("RuntimeClient.deliver", began, replies),
        starts("TrainerService.answer", began, replies),
        ends("TrainerService.answer", began, replies),
        replies,
        aggregated,
        starts("TrainerService.answer", aggregated, validated),
        ends("TrainerService.answer", aggregated, validated),
        validated,
        end,
    ]
    # An answer to a delivery may be later than what the delivery set going.
    return np.diff(np.maximum.accumulate(marks)).tolist()
