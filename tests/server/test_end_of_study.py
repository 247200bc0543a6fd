"""The end of a study: hospitals that only evaluate, and hospitals that come back late."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan import Plan
from fedward.protocol import RoundOrder
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_server.artifacts.card import model_card
from fedward_server.events import Event, RoundEnded, SiteAnswered, StudyPaused, StudyStarted
from fedward_server.report.formatting import size
from fedward_server.report.page import render
from fedward_server.report.summary import headline
from fedward_server.report.tables import cost_table
from fedward_server.results import Arm, StudyResults
from fedward_server.round_loop import Job, StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]
SEEDED = Runtime(randomness="seeded")


class PatchyGrid(LocalGrid):
    """A grid on which some nodes are not connected."""

    away: frozenset[int] = frozenset()

    def get_node_ids(self) -> list[int]:
        """Those that are."""
        return [node for node in super().get_node_ids() if node not in self.away]


@pytest.fixture
def sites(make_site: Make) -> list[PreparedSite]:
    return [make_site(f"site-{i}", patients=20 + 10 * i, seed=i) for i in range(1, 4)]


@contextmanager
def grid_of(sites: list[PreparedSite], job: Job | None = None) -> Iterator[PatchyGrid]:
    identity.become_server()
    pool = Pool(State(SimulatedSites(sites, SEEDED)), 0)
    try:
        yield PatchyGrid(pool, len(sites), job.site_states if job else None)
    finally:
        pool.close()


def job_of(plan: Plan, **more: Any) -> Job:
    arm = Arm(name="federated", kind="federated")
    return Job(plan, to_arrays(build_model(plan, 0)), arm, **more)


def between_hospitals(plan: Plan, heard: list[Event], **more: Any) -> Job:
    members = {1000 + i: f"site-{i}" for i in (1, 2, 3)}
    return job_of(plan, listen=heard.append, members=members, patient=True, **more)


def results_of(job: Job) -> StudyResults:
    return StudyResults(
        study="tiny",
        plan=job.plan.model_dump(mode="json"),
        plan_sha256="0" * 64,
        seed=0,
        engine="superlink",
        device="hospitals'",
        primary=job.plan.metrics.primary,
        parameters=1,
        complete=True,
        named=["site-1", "site-2"],
        evaluate_only=sorted(job.evaluate_only),
        sites=list(job.facts.values()),
        arms=[job.arm],
    )


def auc_of(job: Job, site: PreparedSite) -> float:
    model = build_model(job.plan, 0)
    model.load_state_dict({name: torch.from_numpy(v.copy()) for name, v in job.average.items()})
    model.eval()
    own = site.split["test"]
    with torch.no_grad():
        scores = model(torch.from_numpy(site.images[own])).softmax(1)[:, 1].numpy()
    return float(roc_auc_score(site.targets[own], scores))


def test_a_site_that_only_evaluates_changes_no_model_and_has_figures_of_its_own(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    signed: list[RoundOrder] = []

    def sign(order: RoundOrder) -> RoundOrder:
        signed.append(order)
        return order

    heard: list[Event] = []
    plan = make_plan(participation={"sites": 2})
    job = between_hospitals(plan, heard, evaluate_only=frozenset({"site-3"}), sign=sign)
    with grid_of(sites) as grid:
        StudyRun(job, grid).run()
    alone = job_of(plan)
    with grid_of(sites[:2]) as grid:
        StudyRun(alone, grid).run()
    for name, value in alone.average.items():
        np.testing.assert_array_equal(job.average[name], value)
    arm, other = job.arm, alone.arm
    assert arm.test is not None and other.test is not None and arm.unseen is not None
    assert arm.test.per_site == other.test.per_site and arm.test.pooled == other.test.pooled
    assert [r.validation for r in arm.rounds] == [r.validation for r in other.rounds]
    assert all(set(r.sites) == {"site-1", "site-2"} and not r.failures for r in arm.rounds)
    assert set(arm.unseen.per_site) == {"site-3"}
    assert arm.unseen.per_site["site-3"]["auc"] == pytest.approx(auc_of(job, sites[2]), abs=2e-3)
    assert [e.sites for e in heard if isinstance(e, StudyStarted)] == [("site-1", "site-2")]
    # What is signed tells the site that it trains nothing, and tells the others of two sites.
    told = {(one.task, one.round, one.sites, bool(one.evaluate_only)) for one in signed}
    assert ("describe", 0, 2, True) in told and ("evaluate", 0, 1, True) in told
    assert {(task, only) for task, _, _, only in told if task == "train"} == {("train", False)}
    assert {number for task, _, number, _ in told if task == "train"} == {2}


def test_the_report_shows_it_as_a_hospital_that_took_no_part(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    job = between_hospitals(
        make_plan(participation={"sites": 2}), [], evaluate_only=frozenset({"site-3"})
    )
    with grid_of(sites) as grid:
        StudyRun(job, grid).run()
    results = results_of(job)
    (unseen,) = job.arm.left_out
    assert unseen.test is not None
    low, high = unseen.test.site_intervals["site-3"]["auc"]
    value = unseen.test.per_site["site-3"]["auc"]
    assert value is not None and low < value < high
    text = headline(results)
    assert f"(AUC): {value:.3f} (95 % interval {low:.3f}–{high:.3f}) at site-3." in text
    assert "of 2 hospitals" in text and "Not in it" not in text
    page = render([results])
    assert "without site-3" in page and "site-3 (evaluates only)" in page
    assert "Every site&#39;s update counted in every round." in page
    card = model_card("tiny-1", job.plan, results)
    assert "site-3, not in the training" in card and "it only evaluates" in card


def test_a_site_that_only_evaluates_holds_up_no_start_and_is_waited_for_at_the_end(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    heard: list[Event] = []
    plan = make_plan(training={"rounds": 1}, participation={"sites": 2})
    job = between_hospitals(plan, heard, evaluate_only=frozenset({"site-3"}), deadline=30.0)

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, StudyPaused):
            grid.away = frozenset()

    job.listen = listen
    with grid_of(sites) as grid:
        grid.away = frozenset({1003})
        StudyRun(job, grid).run()
    (paused,) = [event for event in heard if isinstance(event, StudyPaused)]
    assert "site-3 (silent): not connected" in paused.reason
    assert len(job.arm.rounds) == 1 and job.complete
    assert job.arm.unseen is not None and set(job.arm.unseen.per_site) == {"site-3"}


def test_one_that_stays_away_ends_no_study_and_is_named(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    plan = make_plan(training={"rounds": 1}, participation={"sites": 2})
    job = between_hospitals(plan, [], evaluate_only=frozenset({"site-3"}), deadline=3.0)
    with grid_of(sites) as grid:
        grid.away = frozenset({1003})
        StudyRun(job, grid).run()
    assert job.complete and job.arm.test is not None
    assert "Not known there: site-3 (not connected)." in headline(results_of(job))


PERSONAL = {
    "fine-tuning": {"method": "fine-tuning", "rounds": 2, "alone": True},
    "ditto": {"method": "ditto", "weight": 0.5},
}


@pytest.mark.parametrize("method", PERSONAL)
def test_a_hospital_that_is_back_before_the_end_gets_its_own_model(
    make_plan: Make, sites: list[PreparedSite], method: str
) -> None:
    """It has the figures that it would have had without the break, and so have the others."""
    plan = make_plan(
        training={"rounds": 1, "optimizer": "sgd"},
        participation={"sites": 3},
        personal=PERSONAL[method],
    )
    heard: list[Event] = []
    job = between_hospitals(plan, heard, deadline=60.0)

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, RoundEnded):
            grid.away = frozenset({1002})
        elif isinstance(event, StudyPaused):
            grid.away = frozenset()

    job.listen = listen
    with grid_of(sites, job) as grid:
        StudyRun(job, grid).run()
    whole = between_hospitals(plan, [])
    with grid_of(sites, whole) as grid:
        StudyRun(whole, grid).run()
    (paused,) = [event for event in heard if isinstance(event, StudyPaused)]
    assert "site-2 (silent): not connected" in paused.reason and "site-1" not in paused.reason
    for kind in ("test", "own", "alone"):
        here, there = getattr(job.arm, kind), getattr(whole.arm, kind)
        assert here == there, kind
    assert job.arm.own is not None and set(job.arm.own.per_site) == {"site-1", "site-2", "site-3"}


def test_one_that_leaves_while_own_models_are_made_catches_up_alone(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    plan = make_plan(
        training={"rounds": 1}, participation={"sites": 3}, personal=PERSONAL["fine-tuning"]
    )
    told: list[str] = []
    job = between_hospitals(plan, [], deadline=60.0)

    def listen(event: Event) -> None:
        if isinstance(event, SiteAnswered) and event.what == "own":
            told.append(event.site)
        if isinstance(event, SiteAnswered) and (event.what, event.site) == ("test", "site-3"):
            grid.away = frozenset({1002})
        elif isinstance(event, StudyPaused):
            grid.away = frozenset()

    job.listen = listen
    with grid_of(sites, job) as grid:
        StudyRun(job, grid).run()
    # The others trained theirs once, before it was back.
    assert told == ["site-1", "site-3", "site-2"]
    assert job.arm.own is not None and not job.arm.own.not_measured
    # Three models of this size went out for it, beside those of the round.
    assert job.arm.own_bytes_down == job.arm.rounds[0].bytes_down > 0
    shown = {row.head: row.cells for row in cost_table(results_of(job)).rows}["federated"]  # type: ignore[union-attr]
    round_ = job.arm.rounds[0]
    assert shown[5].text == size(2 * round_.bytes_down + round_.bytes_up)


def test_one_that_stays_away_is_waited_for_once_and_named(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    plan = make_plan(
        training={"rounds": 1}, participation={"sites": 3}, personal=PERSONAL["fine-tuning"]
    )
    job = between_hospitals(plan, [], deadline=4.0)
    ended: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, RoundEnded):
            grid.away = frozenset({1002})
            ended.append(time.monotonic())

    job.listen = listen
    with grid_of(sites, job) as grid:
        StudyRun(job, grid).run()
    # Three tests, and one wait of a round's length for all of them.
    assert 4.0 <= time.monotonic() - ended[0] < 11.0
    assert job.complete and job.arm.own is not None and job.arm.alone is not None
    for found in (job.arm.own, job.arm.alone):
        assert [(one.site, one.reason) for one in found.not_measured] == [
            ("site-2", "not connected")
        ]
