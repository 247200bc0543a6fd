"""Who is put out of a study, and what does not save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedward.plan.load import plan_hash
from fedward.protocol import SiteFacts
from server.checkpoint import Checkpoints
from server.events import Event, SiteQuarantined
from server.job import Job
from server.members import Members
from server.replies import Bad
from server.results import Arm

Make = Callable[..., Any]
INVALID = Bad("an update must be finite.")
OTHERS = [Bad("no answer in time", "silent"), Bad("it works", "busy"), Bad("paused", "paused")]


def facts(site: str, **more: int) -> SiteFacts:
    return SiteFacts.model_validate({
        "site": site, "patients": 20, "images": 40, "train_patients": 14, "validation_patients": 2,
        "test_patients": 4, "train_images": 28, "validation_images": 4, "test_images": 8, **more,
    })  # fmt: skip


@pytest.fixture
def heard() -> list[Event]:
    return []


@pytest.fixture
def job(make_plan: Make, heard: list[Event]) -> Job:
    start = {"w": np.zeros(2, np.float32)}
    return Job(
        make_plan(), start, Arm(name="t", kind="federated"), listen=heard.append,
        members={1: "north", 2: "south"}, facts={s: facts(s) for s in ("north", "south")},
    )  # fmt: skip


def members(job: Job) -> Members:
    return Members(job, cast(Any, None), lambda: ConfigRecord({}))


def quarantined(heard: list[Event]) -> list[str]:
    return [event.site for event in heard if isinstance(event, SiteQuarantined)]


@pytest.mark.parametrize("between", OTHERS, ids=lambda bad: bad.kind)
def test_neither_silence_nor_a_refusal_saves_from_quarantine(
    job: Job, heard: list[Event], between: Bad
) -> None:
    ours = members(job)
    for bad in (INVALID, between, INVALID, between, INVALID):
        ours.note("north", bad)
    assert quarantined(heard) == ["north"]
    assert ours.nodes == {2: "south"}


def test_a_valid_answer_does(job: Job, heard: list[Event]) -> None:
    ours = members(job)
    for bad in (INVALID, INVALID, None, INVALID, INVALID):
        ours.note("north", bad)
    assert quarantined(heard) == []


def test_good_updates_do_not_make_up_for_bad_counts(job: Job, heard: list[Event]) -> None:
    ours = members(job)
    for _ in range(3):
        ours.note("north", None)
        ours.note("north", INVALID, "counts")
    assert quarantined(heard) == ["north"]


def test_a_new_session_and_a_new_runner_go_on_counting(
    job: Job, heard: list[Event], tmp_path: Path, make_plan: Make
) -> None:
    members(job).note("north", INVALID)
    members(job).note("north", INVALID)
    kept = Checkpoints(tmp_path, plan_hash(job.plan))
    kept.save(job)
    job.bad_answers = {}
    assert kept.restore(job)
    members(job).note("north", INVALID)
    assert quarantined(heard) == ["north"]
