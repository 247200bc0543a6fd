"""Strategies that weigh sites by what earlier rounds told: whole, broken off, and with privacy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan import Plan, plan_hash
from fedward.plan.explain import explain
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.checkpoints import Checkpoints
from fedward_server.events import Event, RoundEnded
from fedward_server.job import Job
from fedward_server.pasts import pasts
from fedward_server.report.page import render
from fedward_server.report.stats import contributed
from fedward_server.report.tables import contribution_table
from fedward_server.results import Arm, Round, SiteRound, StudyResults
from fedward_server.round_loop import StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.site_service import open_policy
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]
SEEDED = Runtime(randomness="seeded")
CASES: dict[str, dict[str, float]] = {"q-fedavg": {"q": 2.0, "lipschitz": 0.5}, "afl": {"eta": 2.0}}
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}


@pytest.fixture(autouse=True)
def _server() -> None:
    identity.become_server()


def plan_of(make_plan: Make, name: str, rounds: int = 3, **more: Any) -> Plan:
    made: Plan = make_plan(
        training={"rounds": rounds, "learning_rate": 0.2, "optimizer": "sgd"},
        strategy={"name": name, "settings": CASES.get(name, {}), "max_share": 1.0},
        metrics={"report": ["auc", "loss"], "primary": "loss"},
        participation={"sites": 3},
        **more,
    )
    return made


def unlike(make_site: Make) -> list[PreparedSite]:
    """Three sites; the labels of the last one are the other way round for every third image."""
    sites = [make_site(f"site-{i}", patients=60, seed=i) for i in (1, 2, 3)]
    sites[2].targets[::3] = 1 - sites[2].targets[::3]
    return sites


def job_of(plan: Plan, **more: Any) -> Job:
    return Job(plan, to_arrays(build_model(plan, 0)), Arm(name="t", kind="federated"), **more)


def run(job: Job, sites: list[PreparedSite], exact: bool = True) -> Job:
    made = SimulatedSites(sites, SEEDED, None if exact else open_policy())
    pool = Pool(State(made), 0)
    try:
        StudyRun(job, LocalGrid(pool, len(sites), job.site_states)).run()
    finally:
        pool.close()
    return job


def next_model(
    plan: Plan,
    name: str,
    start: dict[str, Any],
    told: list[Round],
    sites: list[PreparedSite],
    order: Any,
) -> dict[str, Any]:
    """A round's model from the sites' own training and the figures of the rounds before."""
    updates = [Trainer(plan, site, SEEDED).train(start, order)[0] for site in sites]
    losses = np.array([[one.sites[s.name].validation["loss"] for s in sites] for one in told])
    p = np.array([float(len(site.split["train"])) for site in sites])
    settings = CASES[name]
    if name == "afl":
        mixture = p * np.exp(settings["eta"] * losses.sum(axis=0)) if len(told) else p
        mixture /= mixture.sum()
        return {n: sum(m * u[n] for m, u in zip(mixture, updates, strict=True)) for n in start}
    lipschitz, q = settings["lipschitz"], settings["q"]
    loss = losses[-1] if len(told) else np.ones(len(sites))
    q = q if len(told) else 0.0
    deltas = [{n: lipschitz * (start[n] - u[n]) for n in start} for u in updates]
    squares = np.array([sum(float((d**2).sum()) for d in one.values()) for one in deltas])
    h = p * (q * loss ** (q - 1) * squares + lipschitz * loss**q)
    scale = p * loss**q / h.sum()
    return {n: start[n] - sum(s * d[n] for s, d in zip(scale, deltas, strict=True)) for n in start}


@pytest.mark.parametrize("name", CASES)
def test_a_study_weighs_by_the_figures_of_the_rounds_before(
    make_plan: Make, make_site: Make, make_order: Make, name: str
) -> None:
    sites, plan = unlike(make_site), plan_of(make_plan, name)
    made = run(job_of(plan, seed=5), sites)
    model = to_arrays(build_model(plan, 0))
    for round_ in (1, 2, 3):
        order = make_order(plan, round=round_, seed=5)
        model = next_model(plan, name, model, made.arm.rounds[: round_ - 1], sites, order)
        model = {n: np.asarray(v, np.float32) for n, v in model.items()}
    for n, value in made.arrays.items():
        np.testing.assert_allclose(value, model[n], atol=2e-5)
    shares = [one.sites["site-3"].share or 0.0 for one in made.arm.rounds]
    assert shares[0] == pytest.approx(1 / 3) and min(shares[1:]) > 0.335  # it is served worst


@pytest.mark.parametrize("name", [*CASES, "consistency"])
def test_a_study_broken_off_after_each_round_weighs_as_one_that_was_not(
    make_plan: Make, make_site: Make, tmp_path: Path, name: str
) -> None:
    sites, plan = unlike(make_site), plan_of(make_plan, name)
    whole = run(job_of(plan, seed=5), sites)
    for _ in range(6):
        kept = Checkpoints(tmp_path / "study", plan_hash(plan))
        job = job_of(plan, seed=5, save=kept.save)
        kept.restore(job)
        if job.complete:
            break

        def stop_after_a_round(event: Event, job: Job = job) -> None:
            if isinstance(event, RoundEnded):
                job.stop.set()

        job.listen = stop_after_a_round
        run(job, sites)
    assert job.complete and contributed(job.arm) == contributed(whole.arm)
    for n, value in whole.arrays.items():
        np.testing.assert_array_equal(job.arrays[n], value)


def test_what_is_known_of_a_site_is_what_evaluations_released(make_plan: Make) -> None:
    plan = make_plan(training={"rounds": 5}, metrics={"evaluate_every": 2})

    def told(round_: int, **figures: float | None) -> Round:
        sites = {
            site: SiteRound(patients=1, images=1, steps=1, seconds=0.0, validation={"auc": value})
            for site, value in figures.items()
        }
        return Round(round=round_, stage="all", seconds=0.0, sites=sites)

    rounds = [
        told(1, a=0.5),
        told(2, a=0.7, b=None),
        told(3, b=0.5),
        told(4, b=1.0),
        told(5, a=0.4),
    ]
    found = pasts(plan, rounds)
    assert found["a"].shortfalls == pytest.approx((0.3, None, 0.6))
    assert found["b"].shortfalls == pytest.approx((None, 0.01, None))  # no weight becomes 0
    huge = plan_of(make_plan, "afl")
    rounds = [told(1, a=0.5)]
    rounds[0].sites["a"].validation = {"loss": 1e30}
    assert pasts(huge, rounds)["a"].shortfalls == (100.0,)


@pytest.mark.parametrize("name", CASES)
def test_a_claim_to_be_served_badly_gains_no_more_than_the_largest_share(
    make_plan: Make, make_site: Make, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(make_plan, name)
    strategy = plan.strategy.model_copy(update={"max_share": 0.5})
    plan = plan.model_copy(update={"strategy": strategy})
    evaluate = Trainer.evaluate

    def lying(self: Trainer, arrays: Any, order: Any, noise: Any = None) -> Any:
        counts, outcome = evaluate(self, arrays, order, noise)
        if self.site.name == "site-2":
            counts = counts | {"loss": np.array([1e6, counts["loss"][1]])}
        return counts, outcome

    monkeypatch.setattr(Trainer, "evaluate", lying)
    made = run(job_of(plan), unlike(make_site))
    shares = [one.sites["site-2"].share or 0.0 for one in made.arm.rounds]
    assert shares[0] < 0.4 and shares[1:] == pytest.approx([0.5, 0.5])


def flipping(monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    """Have a site send the opposite of its update."""
    train = Trainer.train

    def hostile(self: Trainer, arrays: Any, order: Any) -> Any:
        update, outcome = train(self, arrays, order)
        if self.site.name == site:
            update = {n: 2 * arrays[n] - value for n, value in update.items()}
        return update, outcome

    monkeypatch.setattr(Trainer, "train", hostile)


def test_the_report_tells_what_each_site_contributed(
    make_plan: Make, make_site: Make, make_order: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the sites' own training; also of a strategy that adds updates up as they come."""
    flipping(monkeypatch, "site-2")
    sites, plan = unlike(make_site), make_plan(training={"rounds": 2, "optimizer": "sgd"})
    sites[1].split["train"] = sites[1].split["train"][:18]
    made = run(job_of(plan, seed=5), sites)
    model, pulls = to_arrays(build_model(plan, 0)), dict.fromkeys((s.name for s in sites), 0.0)
    for round_ in (1, 2):
        order = make_order(plan, round=round_, seed=5)
        updates = [Trainer(plan, site, SEEDED).train(model, order)[0] for site in sites]
        images = np.array([len(site.split["train"]) for site in sites])
        moved = [np.concatenate([(u[n] - model[n]).ravel() for n in model]) for u in updates]
        steps = (images / images.sum())[:, None] * np.stack(moved)
        for site, step in zip(sites, steps, strict=True):
            pulls[site.name] += float(step @ (steps.sum(axis=0) - step))
        model = {
            n: np.average([u[n] for u in updates], axis=0, weights=images).astype(np.float32)
            for n in model
        }
    total = sum(pulls.values())
    found = contributed(made.arm)
    told = {site: one.share for site, one in found.items()}
    assert told == pytest.approx({s: pull / total for s, pull in pulls.items()}, rel=1e-3)
    assert found["site-2"].agreement < 0 < found["site-1"].agreement
    results = StudyResults(
        study="s",
        plan=plan.model_dump(),
        plan_sha256="0" * 64,
        seed=0,
        engine="local",
        device="cpu",
        primary="auc",
        parameters=1,
        arms=[made.arm],
    )
    table = contribution_table(results)
    assert table is not None
    rows = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows}
    share, agreement, rounds = rows["site-2"]
    assert share == f"{told['site-2']:.1%}" and agreement.startswith("-") and rounds == "2 of 2"
    assert "What each site&#39;s updates added to the others&#39;" in render([results])


@pytest.mark.parametrize("private", [False, True])
def test_a_site_that_keeps_disagreeing_loses_its_weight(
    make_plan: Make, make_site: Make, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    flipping(monkeypatch, "site-3")
    sites = [make_site(f"site-{i}", patients=60, seed=i) for i in (1, 2, 3, 4)]
    plan = make_plan(
        training={"rounds": 4, "learning_rate": 0.1, "optimizer": "sgd", "local_epochs": 2},
        strategy={"name": "consistency"},
        participation={"sites": 4},
        # So few patients at a small epsilon give updates that are noise, and all cosines are 0.
        **({"privacy": PRIVATE | {"epsilon": 100.0}} if private else {}),
    )
    arm = run(job_of(plan, seed=1), sites).arm
    shares = [one.sites["site-3"].share or 0.0 for one in arm.rounds]
    assert shares[0] == pytest.approx(0.25) and shares[-1] < (0.1 if private else 0.02)
    others = [one.share or 0.0 for s, one in arm.rounds[-1].sites.items() if s != "site-3"]
    assert min(others) > 0.2
    assert not any(one.failures for one in arm.rounds)


@pytest.mark.parametrize("name", CASES)
def test_with_privacy_noisy_figures_weigh_and_cost_no_more(
    make_plan: Make, make_site: Make, name: str
) -> None:
    sites, jobs = unlike(make_site), []
    for strategy in ("fedavg", name):
        plan = make_plan(
            training={"rounds": 2, "optimizer": "sgd"},
            strategy={"name": strategy, "settings": CASES.get(strategy, {})},
            privacy=PRIVATE,
        )
        jobs.append(run(job_of(plan, seed=4), sites, exact=False))
    plain, told = jobs
    assert told.arm.privacy == plain.arm.privacy
    (_, second), (_, other) = (
        [[s.share for s in one.sites.values()] for one in job.arm.rounds] for job in jobs
    )
    assert second == pytest.approx([1 / 3] * 3) and other != pytest.approx([1 / 3] * 3)


def test_plan_check_says_what_weighs_and_that_nothing_more_leaves(make_plan: Make) -> None:
    text = " ".join(explain(plan_of(make_plan, "afl"), 1_000_000).split())
    assert "weighted by images and by loss on each site's validation patients" in text
    assert "nothing more leaves a site" in text and "about 4 MB" in text
    assert "holds all updates" not in text
