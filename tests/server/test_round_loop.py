"""A study over the in-process grid, with sites that misbehave in every way they can."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.exception import InconsistentMessageReplies
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, roc_auc_score
from unguarded import UnguardedSites

from fedward.errors import BudgetError, ModelError, PolicyError, StudyError
from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan import Plan
from fedward.protocol import EvaluateOutcome, Refusal, RefusalKind, RoundOrder, TrainOutcome
from fedward.rule_codes import RuleCode
from fedward.tasks.registry import counts_from_arrays
from fedward_client.data.sample import PreparedSite, SplitName
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server import round_loop
from fedward_server.events import (
    Event,
    RoundEnded,
    SiteAnswered,
    SiteRefused,
    StudyPaused,
    StudyStarted,
)
from fedward_server.reply_validation import InvalidReply
from fedward_server.results import Arm, Figures
from fedward_server.round_loop import Job, StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites
from fedward_strategies.averaging import blend, decay_at

Arrays = dict[str, NDArray[Any]]
Fault = Callable[[Arrays, TrainOutcome], tuple[Arrays, TrainOutcome]]
Make = Callable[..., Any]
SEEDED = Runtime(randomness="seeded")
PLANTED = "/data/ward-7/DOE^JANE_1.2.840.113619.2.55.dcm"


class FaultyTrainer(Trainer):
    """A real trainer whose answer to some rounds is spoilt."""

    fault: Fault
    rounds: tuple[int, ...]

    def train(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder
    ) -> tuple[Arrays, TrainOutcome]:
        """Train rightly, then spoil it."""
        answer = super().train(arrays, order)
        return self.fault(*answer) if order.round in self.rounds else answer


class FaultySites(UnguardedSites):
    """Sites of which one has a fault."""

    def __init__(
        self, sites: Sequence[PreparedSite], site: str, fault: Fault, rounds: tuple[int, ...] = (2,)
    ) -> None:
        super().__init__(sites, SEEDED)
        self.faulty, self.fault, self.rounds = site, fault, rounds

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        """The real trainer, or the faulty one."""
        trainer = super().trainer_of(site, plan)
        if site.name == self.faulty and not isinstance(trainer, FaultyTrainer):
            trainer.__class__ = FaultyTrainer
            trainer.fault, trainer.rounds = self.fault, self.rounds  # type: ignore[attr-defined]
        return trainer


@pytest.fixture
def sites(make_site: Make) -> list[PreparedSite]:
    return [make_site(f"site-{i}", patients=20 + 10 * i, seed=i) for i in range(1, 4)]


@contextmanager
def grid_of(sites: SimulatedSites, workers: int = 0) -> Iterator[LocalGrid]:
    identity.become_server()
    pool = Pool(State(sites), workers)
    try:
        yield LocalGrid(pool, len(sites.sites))
    finally:
        pool.close()


def job_of(plan: Plan, listen: Callable[[Event], None] = lambda event: None) -> Job:
    return Job(
        plan, to_arrays(build_model(plan, 0)), Arm(name="test", kind="federated"), listen=listen
    )


def study(plan: Plan, sites: SimulatedSites, workers: int = 0, **more: Any) -> Job:
    job = job_of(plan, **more)
    with grid_of(sites, workers) as grid:
        StudyRun(job, grid).run()
    return job


def equal(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def three_rounds(make_plan: Make, **more: Any) -> Plan:
    base = {"training": {"rounds": 3}, "participation": {"sites": 3, "quorum": 2, "retries": 0}}
    plan: Plan = make_plan(**{**base, **more})
    return plan


def raises(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    raise RuntimeError(f"cannot read {PLANTED}")


def not_a_number(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    name = next(iter(arrays))
    return {**arrays, name: np.full_like(arrays[name], np.nan)}, outcome


def wrong_shape(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    name = next(iter(arrays))
    return {**arrays, name: arrays[name][:1]}, outcome


def wrong_dtype(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    name = next(iter(arrays))
    return {**arrays, name: arrays[name].astype(np.float64)}, outcome


def extra_array(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return {**arrays, "more": np.zeros(3, np.float32)}, outcome


def too_few_arrays(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return dict(list(arrays.items())[1:]), outcome


def another_round(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return arrays, outcome.model_copy(update={"round": 1})


def another_site(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return arrays, outcome.model_copy(update={"site": "site-1"})


def no_weight(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return arrays, outcome.model_copy(update={"images": 0, "patients": 0})


def endless_loss(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
    return arrays, outcome.model_copy(update={"loss": float("nan")})


FAULTS: dict[Fault, str] = {
    raises: "an unexpected error stopped the site (got RuntimeError).",
    not_a_number: "an update must be finite",
    wrong_shape: "an update's arrays must have the model's shapes and dtypes",
    wrong_dtype: "an update's arrays must have the model's shapes and dtypes",
    extra_array: "an update must hold exactly the arrays that train",
    too_few_arrays: "an update must hold exactly the arrays that train",
    another_round: "a reply must be for the round that was asked",
    another_site: "a reply must come from the site that was asked",
    no_weight: "an update's weight must be a number above 0",
    endless_loss: "a TrainOutcome record must be valid (got loss).",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_bad_update_costs_its_site_the_round_and_is_named(
    make_plan: Make, sites: list[PreparedSite], fault: Fault
) -> None:
    job = study(three_rounds(make_plan), FaultySites(sites, "site-2", fault))
    assert job.complete
    first, second, third = job.arm.rounds
    assert [f.site for f in second.failures] == ["site-2"]
    assert second.failures[0].reason.startswith(FAULTS[fault])
    assert list(second.sites) == ["site-1", "site-3"]
    for good in (first, third):
        assert not good.failures
        assert list(good.sites) == ["site-1", "site-2", "site-3"]
    assert all(np.isfinite(value).all() for value in job.arrays.values())


def test_who_is_left_out_is_named_in_each_round(make_plan: Make, sites: list[PreparedSite]) -> None:
    job = job_of(three_rounds(make_plan))
    job.left_out = {"east": InvalidReply("quarantined: an update must be finite.")}
    with grid_of(SimulatedSites(sites, SEEDED)) as grid:
        StudyRun(job, grid).run()
    told = [[(f.site, f.reason, f.kind) for f in one.failures] for one in job.arm.rounds]
    assert told == [[("east", "quarantined: an update must be finite.", "invalid")]] * 3


class SwellingTrainer(Trainer):
    """A trainer that counts each image a million times."""

    def evaluate(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder, noise: Any = None
    ) -> tuple[Arrays, EvaluateOutcome]:
        """Measure rightly, then multiply."""
        counts, outcome = super().evaluate(arrays, order)
        return {name: value * 10**6 for name, value in counts.items()}, outcome


class SwellingSites(UnguardedSites):
    """Sites of which one counts too much."""

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        """The real trainer, or the one that counts too much."""
        trainer = super().trainer_of(site, plan)
        if site.name == "site-2":
            trainer.__class__ = SwellingTrainer
        return trainer


def test_figures_of_more_images_than_described_are_left_out_and_told(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    events: list[Event] = []
    plan = three_rounds(make_plan)
    job = study(plan, SwellingSites(sites, SEEDED), listen=events.append)
    assert job.arm.test is not None
    assert list(job.arm.test.per_site) == ["site-1", "site-3"]
    told = [event for event in events if isinstance(event, SiteRefused)]
    assert [(one.site, one.kind) for one in told] == [("site-2", "invalid")] * 4
    assert "no more images" in told[0].reason


def test_what_an_exception_quotes_stays_at_the_site(
    make_plan: Make, sites: list[PreparedSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: list[Message] = []
    pull = LocalGrid.pull_messages

    def spy(self: LocalGrid, message_ids: Any) -> list[Message]:
        got = pull(self, message_ids)
        replies.extend(got)
        return got

    monkeypatch.setattr(LocalGrid, "pull_messages", spy)
    job = study(three_rounds(make_plan), FaultySites(sites, "site-2", raises))
    told = job.arm.model_dump_json() + "".join(
        repr(reply.content) if reply.has_content() else repr(reply.error) for reply in replies
    )
    assert "RuntimeError" in told
    for word in ("ward-7", "DOE", "JANE", "1.2.840", ".dcm", "cannot read", "Traceback"):
        assert word not in told


def by_hand(
    plan: Plan, sites: Sequence[PreparedSite], start: Arrays, round_: int, make_order: Make
) -> Arrays:
    """The mean of the sites' own updates, weighted by images, in float64."""
    total, summed = 0, {name: np.zeros(value.shape) for name, value in start.items()}
    for site in sites:
        arrays, outcome = Trainer(plan, site, SEEDED).train(start, make_order(plan, round=round_))
        total += outcome.images
        for name, value in arrays.items():
            summed[name] += outcome.images * value.astype(np.float64)
    return {name: (value / total).astype(np.float32) for name, value in summed.items()}


def test_the_model_is_the_mean_of_the_good_updates(
    make_plan: Make, make_order: Make, sites: list[PreparedSite]
) -> None:
    plan = three_rounds(make_plan, training={"rounds": 1})
    job = study(plan, FaultySites(sites, "site-2", raises, (1,)))
    start = to_arrays(build_model(plan, 0))
    expected = by_hand(plan, [sites[0], sites[2]], start, 1, make_order)
    for name, value in job.arrays.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_who_collects_garbage_need_not_look_at_what_was_imported(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    """As Flower's Bulyan does after each array of each update."""
    round_loop._set_imports_apart.cache_clear()
    gc.unfreeze()
    study(three_rounds(make_plan, training={"rounds": 1}), SimulatedSites(sites, SEEDED))
    assert gc.get_freeze_count() > 10 * len(gc.get_objects())


def test_patients_weigh_where_the_plan_says_so(
    make_plan: Make, make_order: Make, make_site: Make
) -> None:
    few = make_site("site-1", patients=10, images_per_patient=6)
    many = make_site("site-2", patients=30, seed=1)
    plan = make_plan(training={"rounds": 1}, strategy={"weighting": "patients"})
    job = study(plan, SimulatedSites([few, many], SEEDED))
    start, order = to_arrays(build_model(plan, 0)), make_order(plan)
    one, _ = Trainer(plan, few, SEEDED).train(start, order)
    other, _ = Trainer(plan, many, SEEDED).train(start, order)
    for name, value in job.arrays.items():
        np.testing.assert_allclose(value, (one[name] + 3 * other[name]) / 4, rtol=1e-5, atol=1e-6)


def test_averaging_delivers_the_moving_average_of_the_rounds_models(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    plan = three_rounds(make_plan, strategy={"averaging": 0.7})
    models: list[Arrays] = []
    job = job_of(plan)

    def keep(event: Event) -> None:
        if isinstance(event, RoundEnded):
            models.append(dict(job.arrays))

    job.listen = keep
    with grid_of(SimulatedSites(sites, SEEDED)) as grid:
        StudyRun(job, grid).run()
    average = models[0]
    for step, model in enumerate(models[1:], start=2):
        decay = min(0.7, step / (step + 9))
        average = {n: decay * average[n] + (1 - decay) * model[n] for n in model}
    for name, value in job.average.items():
        np.testing.assert_allclose(value, average[name], rtol=1e-5, atol=1e-7)
    assert blend(models[0], models[1], decay_at(2, 0.7)).keys() == job.average.keys()
    assert not equal(job.average, job.arrays)


def test_without_quorum_the_round_is_repeated_and_then_the_study_ends(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    asked: list[tuple[int, str]] = []

    def listen(event: Event) -> None:
        if isinstance(event, SiteAnswered) and event.what == "train":
            asked.append((event.round, event.site))

    plan = three_rounds(make_plan, participation={"sites": 3, "quorum": 3, "retries": 2})
    job = job_of(plan, listen)
    with (
        grid_of(FaultySites(sites, "site-2", raises)) as grid,
        pytest.raises(StudyError, match="2 of 3 in round 2; site-2: an unexpected error") as error,
    ):
        StudyRun(job, grid).run()
    assert "ward-7" not in str(error.value)
    assert len(job.arm.rounds) == 1
    assert not job.complete
    # Sites whose update is there are not asked to train again: that would cost privacy.
    assert [site for round_, site in asked if round_ == 2].count("site-1") == 1
    assert [site for round_, site in asked if round_ == 2].count("site-2") == 3


def test_a_repeated_round_that_succeeds_equals_an_undisturbed_one(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    failed: list[int] = []

    def once(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
        if not failed:
            failed.append(outcome.round)
            raise OSError(PLANTED)
        return arrays, outcome

    plan = three_rounds(make_plan, participation={"sites": 3, "quorum": 3, "retries": 1})
    disturbed = study(plan, FaultySites(sites, "site-2", once))
    assert failed == [2]
    assert not disturbed.arm.rounds[1].failures
    assert equal(disturbed.arrays, study(plan, SimulatedSites(sites, SEEDED)).arrays)


def test_too_few_sites_is_an_error_that_says_why(
    make_plan: Make, sites: list[PreparedSite], make_site: Make
) -> None:
    plan = make_plan(participation={"sites": 3, "deadline": 0.2})
    few = SimulatedSites(sites[:2], SEEDED)
    with grid_of(few) as grid, pytest.raises(StudyError, match="2 of 3"):
        StudyRun(job_of(plan), grid).run()
    twice = SimulatedSites([*sites[:2], make_site("site-1", seed=9)], SEEDED)
    with grid_of(twice) as grid, pytest.raises(StudyError, match="cannot have the same name"):
        StudyRun(job_of(plan), grid).run()
    small = make_plan(participation={"sites": 3, "minimum_patients": 35})
    rule = "2 of 3; refused: a site needs 35 patients"
    with (
        grid_of(SimulatedSites(sites, SEEDED)) as grid,
        pytest.raises(StudyError, match=rule),
    ):
        StudyRun(job_of(small), grid).run()


def untested(site: PreparedSite) -> PreparedSite:
    """The same site, all of whose test patients train."""
    split = {**site.split, "test": np.empty(0, np.int64)}
    return dataclasses.replace(site, split=split)


class SecretiveSites(SimulatedSites):
    """Sites that give no figures of their test patients."""

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        """The real trainer, without its counts."""
        trainer = super().trainer_of(site, plan)
        trainer.__class__ = SecretiveTrainer
        return trainer


class SecretiveTrainer(Trainer):
    """A trainer that trains and does not count."""

    def evaluate(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder, noise: Any = None
    ) -> tuple[Arrays, EvaluateOutcome]:
        """Refuse."""
        raise PolicyError(RuleCode.WITHHELD)


def between_hospitals(plan: Plan, listen: Callable[[Event], None] = lambda event: None) -> Job:
    job = job_of(plan, listen)
    job.patient, job.members = True, {1000 + i: f"site-{i}" for i in (1, 2, 3)}
    return job


@pytest.mark.parametrize("given", [True, False])
def test_a_study_without_test_patients_ends_with_its_model(
    make_plan: Make, sites: list[PreparedSite], given: bool
) -> None:
    split = {"given": True} if given else {"given": False, "test": 0.0}
    job = between_hospitals(make_plan(split=split))
    with grid_of(SimulatedSites([untested(one) for one in sites], SEEDED)) as grid:
        StudyRun(job, grid).run()
    assert job.complete
    assert job.arm.test is None
    zero = "" if given else " (split.test is 0)"
    assert job.arm.unmeasured == f"no site has test patients{zero}"
    assert len(job.arm.rounds) == 2


@pytest.mark.parametrize("kind", ["policy", "error"])
def test_a_study_that_no_site_lets_measure_ends_with_its_model(
    make_plan: Make, sites: list[PreparedSite], monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """A refusal that a person or a restart may end is waited for, but for the deadline only."""
    refuse = Refusal.of
    monkeypatch.setattr(
        Refusal, "of", lambda error, **more: refuse(error, **{**more, "kind": kind})
    )
    paused: list[StudyPaused] = []

    def listen(event: Event) -> None:
        if isinstance(event, StudyPaused):
            paused.append(event)

    job = between_hospitals(make_plan(training={"rounds": 1}), listen)
    job.deadline = 1.5
    with grid_of(SecretiveSites(sites, SEEDED)) as grid:
        StudyRun(job, grid).run()
    assert job.complete
    told = f"({kind}): what the site counts must be enough, and allowed, to leave it"
    sentence = "; ".join(f"site-{i} {told}" for i in (1, 2, 3))
    assert job.arm.unmeasured == f"no site could be measured: {sentence}"
    assert job.arm.test is not None and job.arm.test.per_site == {}
    assert bool(paused) == (kind == "error")


def test_figures_that_cannot_be_worked_out_cost_no_model(
    make_plan: Make, sites: list[PreparedSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError(PLANTED)

    monkeypatch.setattr("fedward_server.metrics_summary.test_figures", fail)
    job = study(make_plan(training={"rounds": 1}), SimulatedSites(sites, SEEDED))
    assert job.complete
    assert job.arm.unmeasured == "no figures could be worked out of the counts (ZeroDivisionError)"


def test_updates_that_cannot_be_combined_are_not_waited_for(
    make_plan: Make, sites: list[PreparedSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise InconsistentMessageReplies(reason="other keys")

    monkeypatch.setattr("flwr.serverapp.strategy.FedAvg.aggregate_train", refuse)
    job = between_hospitals(make_plan())
    with (
        grid_of(SimulatedSites(sites, SEEDED)) as grid,
        pytest.raises(ModelError, match="must be combinable"),
    ):
        StudyRun(job, grid).run()


class UnwillingSites(SimulatedSites):
    """Sites of which one does not describe itself until it is willing."""

    willing = threading.Event()

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        """The real trainer, or an error."""
        if site.name == "site-2" and not self.willing.is_set():
            raise BudgetError(RuleCode.STUDY_BUDGET)
        return super().trainer_of(site, plan)


def test_a_study_between_hospitals_waits_until_it_may_start(
    make_plan: Make, sites: list[PreparedSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedward_server.participants._SOON", 0.0)
    heard: list[Event] = []
    unwilling = UnwillingSites(sites[:2], SEEDED)
    unwilling.willing.clear()

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, StudyPaused):
            assert not job.arm.rounds
            unwilling.willing.set()
            job.again.set()  # an operator resumes it

    plan = make_plan(training={"rounds": 1})
    job = job_of(plan, listen)
    job.patient, job.members = True, {1001: "site-1", 1002: "site-2"}
    job.ask_again_seconds = 1000.0
    with grid_of(unwilling) as grid:
        StudyRun(job, grid).run()
    (paused,) = [event for event in heard if isinstance(event, StudyPaused)]
    told = "a study must stay within its privacy budget (got policy.max_epsilon_per_study)"
    assert f"(got 1 of 2; site-2 (budget): {told})" in paused.reason
    (started,) = [event for event in heard if isinstance(event, StudyStarted)]
    assert started.sites == ("site-1", "site-2")
    assert [list(one.sites) for one in job.arm.rounds] == [["site-1", "site-2"]]


def test_each_order_says_how_many_sites_its_round_asks(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    signed: list[RoundOrder] = []

    def sign(order: RoundOrder) -> RoundOrder:
        signed.append(order)
        return order

    failed: list[int] = []

    def once(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
        if not failed:
            failed.append(outcome.round)
            raise OSError(PLANTED)
        return arrays, outcome

    part = {"sites": 3, "quorum": 3, "retries": 1}
    job = job_of(three_rounds(make_plan, participation=part))
    job.members, job.sign = {1000 + i: f"site-{i}" for i in (1, 2, 3)}, sign
    with grid_of(FaultySites(sites, "site-2", once)) as grid:
        StudyRun(job, grid).run()
    told = [(one.task, one.round, one.sites) for one in signed if one.task != "evaluate"]
    # Round 2 is repeated for one site, whose update is one of three all the same.
    assert told == [("describe", 0, 3), *(("train", round_, 3) for round_ in (1, 2, 2, 3))]


def test_a_site_that_joined_no_study_gets_no_message(
    make_plan: Make, make_site: Make, sites: list[PreparedSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, int]] = []
    push = LocalGrid.push_messages

    def spy(self: LocalGrid, messages: Any) -> list[str]:
        kept = list(messages)
        sent.extend((m.metadata.message_type, m.metadata.dst_node_id) for m in kept)
        return push(self, kept)

    monkeypatch.setattr(LocalGrid, "push_messages", spy)
    tiny = make_site("tiny", patients=3)
    plan = make_plan(participation={"sites": 2, "minimum_patients": 10})
    job = study(plan, SimulatedSites([tiny, *sites[:2]], SEEDED))
    assert job.complete
    assert {node for kind, node in sent if kind != "query"} == {1002, 1003}
    assert 1001 in {node for kind, node in sent if kind == "query"}


def test_pooled_figures_are_those_of_all_predictions_at_once(
    make_plan: Make, sites: list[PreparedSite], make_order: Make
) -> None:
    plan = three_rounds(make_plan, training={"rounds": 2})
    job = study(plan, SimulatedSites(sites, SEEDED))
    model = build_model(plan, 0)
    model.load_state_dict({name: torch.from_numpy(v.copy()) for name, v in job.average.items()})
    model.eval()
    assert job.arm.test is not None
    told: dict[SplitName, Figures] = {
        "validation": job.arm.rounds[-1].validation,
        "test": job.arm.test.pooled,
    }
    for part, figures in told.items():
        images = np.concatenate([s.images[s.split[part]] for s in sites])
        truth = np.concatenate([s.targets[s.split[part]] for s in sites])
        with torch.no_grad():
            scores = model(torch.from_numpy(images)).softmax(1)[:, 1].numpy()
        assert figures["auc"] == pytest.approx(roc_auc_score(truth, scores), abs=2e-3)
        assert figures["accuracy"] == pytest.approx(accuracy_score(truth, scores > 0.5))
    assert job.arm.test.images == {s.name: len(s.split["test"]) for s in sites}
    counts = [
        counts_from_arrays(
            plan.task,
            Trainer(plan, s, SEEDED).evaluate(job.average, make_order(plan, 0, part="test"))[0],
        ).figures(["auc"])["auc"]
        for s in sites
    ]
    assert [job.arm.test.per_site[s.name]["auc"] for s in sites] == pytest.approx(counts)


class RefusingGrid(LocalGrid):
    """A grid on which every site refuses to let counts of an evaluation go."""

    kind: RefusalKind = "policy"

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies, with a refusal in place of counts."""
        return [self._refused(reply) for reply in super().pull_messages(message_ids)]

    def _refused(self, reply: Message) -> Message:
        if "counts" in reply.content.array_records:
            told = EvaluateOutcome.from_flat(dict(reply.content.config_records["outcome"]))
            refusal = Refusal(
                site=told.site, round=told.round, kind=self.kind, code=RuleCode.WITHHELD
            )
            reply.content = RecordDict({"refusal": ConfigRecord(refusal.to_flat())})  # type: ignore[arg-type]
        return reply


@pytest.mark.parametrize("kind", ["policy", "pending"])
def test_a_study_whose_sites_let_no_counts_go_ends_and_says_so(
    make_plan: Make, sites: list[PreparedSite], kind: RefusalKind
) -> None:
    """It had waited for counts without end."""
    job = job_of(make_plan(training={"rounds": 1}))
    identity.become_server()
    pool = Pool(State(SimulatedSites(sites, SEEDED)), 0)
    grid = RefusingGrid(pool, len(sites))
    grid.kind = kind
    StudyRun(job, grid).run()
    pool.close()
    assert job.complete
    assert job.arm.test is not None and job.arm.test.per_site == {}
    told = [(one.site, one.kind, one.reason) for one in job.arm.test.not_measured]
    assert told == [(site.name, kind, f"{RuleCode.WITHHELD.text}.") for site in sites]


def test_a_stage_moves_only_what_it_trains(make_plan: Make, sites: list[PreparedSite]) -> None:
    plan = three_rounds(
        make_plan,
        training={"rounds": None, "learning_rate": None},
        stages=[
            {"name": "head", "rounds": 1, "learning_rate": 0.05, "train": ["fc.*"]},
            {"name": "all", "rounds": 1, "learning_rate": 0.01},
        ],
    )
    models = [to_arrays(build_model(plan, 0))]
    job = job_of(plan)
    job.listen = lambda e: models.append(dict(job.arrays)) if isinstance(e, RoundEnded) else None
    with grid_of(SimulatedSites(sites, SEEDED)) as grid:
        StudyRun(job, grid).run()
    moved = [
        {n for n in one if not np.array_equal(one[n], other[n])} for one, other in pairwise(models)
    ]
    assert moved[0] == {"fc.weight", "fc.bias"}
    assert moved[1] == set(models[0])
    assert [r.stage for r in job.arm.rounds] == ["head", "all"]
    assert job.arm.rounds[0].bytes_up < job.arm.rounds[1].bytes_up


def test_stop_ends_promptly_and_keeps_what_is_finished(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    stop, events = threading.Event(), list[Event]()

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, RoundEnded):
            stop.set()

    job = job_of(make_plan(training={"rounds": 500}), listen)
    job.stop = stop
    started = time.monotonic()
    with grid_of(SimulatedSites(sites, SEEDED)) as grid:
        StudyRun(job, grid).run()
    assert time.monotonic() - started < 20
    assert len(job.arm.rounds) == 1
    assert not job.complete
    assert job.arm.test is None
    assert isinstance(events[0], StudyStarted)


def test_figures_of_a_part_of_the_sites_are_none(
    make_plan: Make, sites: list[PreparedSite]
) -> None:
    job = job_of(make_plan(training={"rounds": 3}))

    def listen(event: Event) -> None:
        if isinstance(event, SiteAnswered) and event.what == "validation":
            job.stop.set()

    job.listen = listen
    with grid_of(SimulatedSites(sites, SEEDED)) as grid:
        StudyRun(job, grid).run()
    (round_,) = job.arm.rounds
    assert len(round_.sites) == len(sites)
    assert round_.validation == {}


@pytest.mark.integration
def test_a_killed_worker_costs_its_update_only(
    make_plan: Make, sites: list[PreparedSite], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"

    def die(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
        return arrays, outcome

    job = study(three_rounds(make_plan), FaultySites(sites, "site-1", die), workers=2)
    assert killed.exists()
    assert job.complete
    assert [[f.site for f in r.failures] for r in job.arm.rounds] == [[], ["site-1"], []]
    assert job.arm.rounds[1].failures[0].reason.startswith("the site's application failed")


@pytest.mark.integration
def test_a_slow_site_misses_the_deadline(make_plan: Make, sites: list[PreparedSite]) -> None:
    def sleep(arrays: Arrays, outcome: TrainOutcome) -> tuple[Arrays, TrainOutcome]:
        time.sleep(120)
        return arrays, outcome

    plan = three_rounds(
        make_plan,
        training={"rounds": 2},
        participation={"sites": 2, "quorum": 1, "retries": 0, "deadline": 4.0},
    )
    started = time.monotonic()
    job = study(plan, FaultySites(sites[:2], "site-2", sleep), workers=2)
    assert time.monotonic() - started < 60
    failures = [(f.site, f.reason) for f in job.arm.rounds[1].failures]
    assert failures == [("site-2", "no answer in time")]
    assert list(job.arm.rounds[1].sites) == ["site-1"]
