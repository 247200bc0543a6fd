"""A hospital that lies about its size, its update and its figures; a study that diverges by itself.

Sites are real trainers over the in-process grid, and a liar changes what its trainer answers. Three
honest sites stand beside one liar, so that the honest ones are the majority.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray
from unguarded import UnguardedSites

from fedward.dp.accounting import steps_in_round
from fedward.errors import DivergenceError, PlanError
from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan import Plan
from fedward.protocol import EvaluateOutcome, RoundOrder, SiteFacts, TrainOutcome
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.events import Event, SiteQuarantined, SiteWarned
from fedward_server.job import Job, SizeLimit
from fedward_server.reply_validation import InvalidReply, read_facts
from fedward_server.report import headline
from fedward_server.report.page import render
from fedward_server.report.summary import dominance
from fedward_server.results import Arm, StudyResults
from fedward_server.round_loop import StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool

Arrays = dict[str, NDArray[Any]]
Make = Callable[..., Any]
Run = Callable[..., Job]
MALLORY = "mallory"
CLAIM = 20_000_000
SIZES = [
    name
    for name, field in SiteFacts.model_fields.items()
    if field.annotation is int and name.endswith(("patients", "images"))
]


class Liar(Trainer):
    """A site that trains as it should; subclasses change what it says."""

    def lie(self, start: Mapping[str, NDArray[Any]], update: Arrays) -> Arrays:
        """What it sends in place of its update."""
        return update

    def train(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder
    ) -> tuple[Arrays, TrainOutcome]:
        update, outcome = super().train(arrays, order)
        return self.lie(arrays, update), outcome


class SignFlip(Liar):
    """Sends the model moved the opposite way, ``factor`` times as far."""

    factor = 1.0

    def lie(self, start: Mapping[str, NDArray[Any]], update: Arrays) -> Arrays:
        return {
            n: (start[n] - self.factor * (v - start[n])).astype(v.dtype) for n, v in update.items()
        }


class ScaledSignFlip(SignFlip):
    """The same, 100 times as far."""

    factor = 100.0


class Noise(Liar):
    """Adds noise of norm 50 to the model that was sent."""

    def lie(self, start: Mapping[str, NDArray[Any]], update: Arrays) -> Arrays:
        rng = np.random.default_rng(0)
        noise = {name: rng.normal(size=value.shape) for name, value in update.items()}
        norm = np.sqrt(sum(float(np.vdot(value, value)) for value in noise.values()))
        return {n: (start[n] + 50.0 / norm * noise[n]).astype(v.dtype) for n, v in update.items()}


class NotFinite(Liar):
    """Sends what is not a number."""

    def lie(self, start: Mapping[str, NDArray[Any]], update: Arrays) -> Arrays:
        return {name: np.full_like(value, np.nan) for name, value in update.items()}


class Claimant(SignFlip):
    """Claims 20,000,000 patients, sends a flipped update and perfect figures of as many images."""

    def describe(self) -> SiteFacts:
        whole = ("patients", "images")
        sizes = {name: 3 * CLAIM if name in whole else CLAIM for name in SIZES}
        return super().describe().model_copy(update=sizes)

    def train(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder
    ) -> tuple[Arrays, TrainOutcome]:
        update, outcome = super().train(arrays, order)
        # As many steps as the plan has for these: an update that states others is refused.
        steps = steps_in_round(self.plan, CLAIM, CLAIM, order.round)
        claimed = {"patients": CLAIM, "images": CLAIM, "steps": steps}
        return update, outcome.model_copy(update=claimed)

    def evaluate(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder, noise: Any = None
    ) -> tuple[Arrays, EvaluateOutcome]:
        counts, outcome = super().evaluate(arrays, order)
        bins, half = counts["scores"].shape[-1], CLAIM // 2
        scores = np.zeros((2, 2, bins), np.int64)
        scores[0, :, 0] = scores[1, :, -1] = half
        calibration = np.zeros((3, 15))
        calibration[:, -1] = CLAIM
        perfect = {
            "scores": scores,
            "confusion": np.diag([half, half]),
            "calibration": calibration,
            "loss": np.array([0.0, CLAIM]),
        }
        return perfect, outcome


class FalseNoise(Trainer):
    """Sends perfect tables of 20,000,000 images, and states a noise under which they may be."""

    stated: ClassVar[dict[str, Any]] = {}

    def evaluate(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder, noise: Any = None
    ) -> tuple[Arrays, EvaluateOutcome]:
        _, outcome = super().evaluate(arrays, order)
        table = np.zeros((1, 2, 24), np.int64)
        table[0, 0, 0] = table[0, 1, -1] = CLAIM // 2
        return {"scores": table}, outcome.model_copy(update={"unit": 1, **self.stated})


class Sites(UnguardedSites):
    """Honest sites and one liar."""

    def __init__(self, sites: Sequence[PreparedSite], liar: type[Liar] | None) -> None:
        super().__init__(sites, Runtime(randomness="seeded"))
        self.liar = liar

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        trainer = super().trainer_of(site, plan)
        if self.liar is not None and site.name.startswith(MALLORY):
            trainer.__class__ = self.liar
        return trainer


@pytest.fixture
def sites(make_site: Make) -> list[PreparedSite]:
    honest = [make_site(f"site-{i}", patients=20 + 10 * i, seed=i) for i in range(1, 4)]
    return [*honest, make_site(MALLORY, patients=40, seed=9)]


@pytest.fixture
def heard() -> list[Event]:
    return []


@pytest.fixture
def run(sites: list[PreparedSite], heard: list[Event]) -> Run:
    """Runs a study whose sites of the liar's name lie."""

    def start(
        plan: Plan, liar: type[Liar] | None, among: list[PreparedSite] | None = None, **more: Any
    ) -> Job:
        identity.become_server()
        arrays = to_arrays(build_model(plan, 0))
        job = Job(plan, arrays, Arm(name="t", kind="federated"), listen=heard.append, **more)
        there = among or sites
        pool = Pool(State(Sites(there, liar)), 0)
        try:
            StudyRun(job, LocalGrid(pool, len(there))).run()
        finally:
            pool.close()
        return job

    return start


def distance(one: Arrays, other: Arrays) -> float:
    squares = (float(np.sum((one[n].astype(np.float64) - other[n]) ** 2)) for n in one)
    return float(np.sqrt(sum(squares)))


def plan_of(make_plan: Make, **more: Any) -> Plan:
    base = {"training": {"rounds": 3}, "participation": {"sites": 4, "quorum": 2, "retries": 0}}
    plan: Plan = make_plan(**{**base, **more})
    return plan


@pytest.mark.parametrize("lie", [ScaledSignFlip, Noise], ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("strategy", ["fedavg", "fedtrimmedavg"])
def test_an_update_far_beyond_the_others_is_refused_by_name(
    make_plan: Make, run: Run, lie: type[Liar], strategy: str
) -> None:
    job = run(plan_of(make_plan, strategy={"name": strategy}), lie)
    for round_ in job.arm.rounds:
        assert sorted(round_.sites) == ["site-1", "site-2", "site-3"]
        (failure,) = round_.failures
        assert (failure.site, failure.kind) == (MALLORY, "invalid")
        assert "an update's norm must stay near the median of its round" in failure.reason
    assert job.arm.test is not None and (job.arm.test.pooled["auc"] or 0) > 0.95


def test_two_liars_are_refused_although_the_mean_held_one_already(
    make_plan: Make, make_site: Make, run: Run
) -> None:
    good = [make_site(f"site-{i}", patients=20 + 10 * i, seed=i) for i in range(1, 4)]
    bad = [make_site(name, patients=40, seed=9) for name in (MALLORY, f"{MALLORY}-2")]
    needs = {"quorum": 3, "retries": 0}
    attacked = run(
        plan_of(make_plan, participation={"sites": 5, **needs}), Noise, among=[*bad, *good]
    )
    undisturbed = run(plan_of(make_plan, participation={"sites": 3, **needs}), None, among=good)
    for round_ in attacked.arm.rounds:
        assert [one.site for one in round_.failures] == [MALLORY, f"{MALLORY}-2"]
    # The honest sites' updates were sent again, and are the same.
    assert distance(attacked.arrays, undisturbed.arrays) == 0.0


def test_an_ordinary_sign_flip_passes_the_norm_and_is_left_to_the_strategy(
    make_plan: Make, make_site: Make, run: Run
) -> None:
    """The limit of a bound on norms, as docs/strategies.md says it: it sees no direction."""
    start = to_arrays(build_model(plan_of(make_plan), 0))
    sites = [make_site(f"site-{i}", patients=40, seed=i) for i in range(4)]
    sites.append(make_site(MALLORY, patients=60, seed=9))
    off = {}
    for name in ("fedavg", "fedmedian"):
        plan = plan_of(make_plan, strategy={"name": name}, participation={"sites": 5, "retries": 0})
        honest, attacked = run(plan, None, among=sites), run(plan, SignFlip, among=sites)
        assert all(MALLORY in round_.sites for round_ in attacked.arm.rounds)
        off[name] = distance(attacked.arrays, honest.arrays) / distance(honest.arrays, start)
    assert off["fedmedian"] < off["fedavg"] < 1


def test_a_site_that_claims_twenty_million_patients_is_refused(make_plan: Make, run: Run) -> None:
    plan = plan_of(make_plan, participation={"sites": 3, "quorum": 2, "retries": 0})
    job = run(plan, Claimant, limits={MALLORY: SizeLimit(patients=500, images=5000)})
    assert MALLORY not in job.facts
    for round_ in job.arm.rounds:
        assert sorted(round_.sites) == ["site-1", "site-2", "site-3"]
    assert job.arm.test is not None and sorted(job.arm.test.images) == [
        "site-1",
        "site-2",
        "site-3",
    ]


@pytest.mark.parametrize(
    "stated",
    [
        {"noise": 1e9, "epsilon": 4.0},
        {"noise": 1e9},
        {"noise": 1e-12},
        {"noise": 1e200},
        {"noise": 0.25, "epsilon": 4.0},
        {"noise": 0.25, "epsilon": 4.0, "unit": 1000},
    ],
    ids=str,
)
def test_a_stated_noise_hides_no_invented_images(
    make_plan: Make, run: Run, stated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FalseNoise, "stated", stated)
    job = run(plan_of(make_plan), FalseNoise)
    assert job.arm.test is not None
    assert MALLORY not in job.arm.test.per_site
    assert set(job.arm.test.per_site) == {"site-1", "site-2", "site-3"}


def test_without_an_enrolled_size_it_gets_the_largest_share_and_is_named(
    make_plan: Make, run: Run, heard: list[Event]
) -> None:
    job = run(plan_of(make_plan), Claimant)
    assert [one.sites[MALLORY].share for one in job.arm.rounds] == [pytest.approx(0.8)] * 3
    (warned,) = [one for one in heard if isinstance(one, SiteWarned)]
    assert warned.site == MALLORY and "80.0% of the weight" in warned.reason
    level = run(plan_of(make_plan, strategy={"max_share": 0.25}), Claimant)
    assert [one.share for one in level.arm.rounds[0].sites.values()] == [pytest.approx(0.25)] * 4
    # Its perfect figures of 20,000,000 images do not pass for the study's.
    arm = job.arm
    assert arm.test is not None and arm.test.pooled["auc"] == pytest.approx(1.0)
    told = dominance(arm, "auc")
    assert told.startswith(f"The 1.000 on all together is mostly {MALLORY}, which says")
    results = StudyResults(
        study="t",
        plan={},
        plan_sha256="0" * 64,
        seed=0,
        engine="local",
        device="cpu",
        primary="auc",
        parameters=1,
        arms=[arm],
        complete=True,
    )
    assert told in headline(results)
    page = render([results])
    assert page.index("Every metric at each site") < page.index("Every metric on all test patients")


@pytest.mark.parametrize("part", ["train_patients", "test_images"])
def test_facts_whose_parts_exceed_the_whole_are_refused(part: str) -> None:
    """A site within its enrolled size may not claim more in a part of it."""
    sizes = dict.fromkeys(SIZES, 0)
    facts = SiteFacts.model_validate({"site": "x", **sizes, part: CLAIM})
    identity.become_server()
    record = ConfigRecord(facts.to_flat())  # type: ignore[arg-type]
    bad = read_facts(Message(RecordDict({"facts": record}), 1, "query"))
    assert isinstance(bad, InvalidReply) and "no more" in bad.reason


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_plan_that_diverges_ends_its_study_and_no_site(
    make_plan: Make, run: Run, heard: list[Event], optimizer: str
) -> None:
    training = {"learning_rate": 1e6, "optimizer": optimizer, "rounds": 4}
    with pytest.raises(DivergenceError, match=r"training diverges .*4 of 4 sites") as error:
        run(plan_of(make_plan, training=training), None, patient=True)
    assert "Lower the learning rate" in str(error.value)
    assert not [one for one in heard if isinstance(one, SiteQuarantined)]
    # The next study has all of them.
    job = run(plan_of(make_plan), None)
    assert all(len(round_.sites) == 4 for round_ in job.arm.rounds)


def test_one_site_that_is_not_finite_does_not_end_the_study(make_plan: Make, run: Run) -> None:
    job = run(plan_of(make_plan), NotFinite)
    assert [[f.site for f in r.failures] for r in job.arm.rounds] == [[MALLORY]] * 3


def test_a_learning_rate_that_no_optimiser_survives_is_no_plan(make_plan: Make) -> None:
    with pytest.raises(PlanError, match="learning_rate"):
        make_plan(training={"learning_rate": 1e38})
