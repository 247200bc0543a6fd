"""What a coordinator gains from the unit that the privacy budget is counted in.

Three attackers: one that hides ε behind a larger δ, one that chooses its next study after looking
at the results of the last, and a link that delivers an update after its round is over.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import Message
from numpy.typing import NDArray
from scipy.stats import norm

from fedward.dp.accounting import Mechanism, calibrate
from fedward.errors import FedwardError
from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan.schema import Plan
from fedward.protocol import RoundOrder
from fedward.signing import sign_order
from fedward_client.data.sample import PreparedSite
from fedward_client.ledger import Ledger, RoundRequest
from fedward_client.ledger.ledger import Caps
from fedward_client.policy.decide import DatasetFacts, StudyRequest, decide
from fedward_client.policy.settings import PolicySection
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.job import Job
from fedward_server.results import Arm
from fedward_server.round_loop import StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]
Losses = NDArray[np.float64]
COORDINATOR, COHORT = "c" * 64, "a" * 64


def independent(mechanism: Mechanism, delta: float) -> float:
    """ε by Google's accountant."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    step = PoissonSampledDpEvent(
        mechanism.sampling_rate, GaussianDpEvent(mechanism.noise_multiplier)
    )
    accountant.compose(step, mechanism.steps)
    return float(accountant.get_epsilon(delta))


class Officer:
    """A hospital as a coordinator meets it: its policy first, then its ledger."""

    def __init__(self, folder: Path, patients: int, **policy: Any) -> None:
        rule = {"match": "*", "dataset": "chest", **policy.pop("rule", {})}
        self.policy = PolicySection.model_validate(
            {"studies": [rule], "coordinators": [COORDINATOR], **policy}
        )
        self.facts = DatasetFacts(patients, patients, {})
        self.ledger = Ledger(folder)
        self.ledger.register(COHORT, "chest", [f"p{n}" for n in range(patients)])

    def ask(self, plan: Plan) -> Mechanism:
        """Begin a study; gives the mechanism that the hospital agreed to run."""
        request = StudyRequest("s", plan, "f" * 64, COORDINATOR, 1000, self.facts)
        decision = decide(self.policy, request)
        decision.enforce()
        total = calibrate(plan, self.facts.patients)
        policy = self.policy
        caps = Caps(
            decision.limits.max_epsilon_per_study, policy.max_epsilon_per_cohort, policy.max_delta
        )
        asked = RoundRequest("s", "f" * 64, 1, COHORT, total, plan.privacy.delta)
        self.ledger.check_study(asked, total, caps)
        return total


def private(make_plan: Make, epsilon: float, delta: float) -> Plan:
    plan: Plan = make_plan(
        training={"rounds": 4, "local_epochs": None, "local_steps": 10},
        privacy={
            "mechanism": "dp-sgd",
            "epsilon": epsilon,
            "delta": delta,
            "clipping_norm": 1.0,
            "sampling_rate": 0.2,
        },
    )
    return plan


@pytest.mark.parametrize(
    "policy", [{}, {"rule": {"max_delta": 1e-3}}], ids=["defaults", "one study may"]
)
def test_a_larger_delta_hides_no_epsilon_from_the_cap(
    make_plan: Make, tmp_path: Path, policy: dict[str, Any]
) -> None:
    """ε = 8 at δ = 1e-3 keeps a cap of 8 in words; at the δ of 2,000 patients it is ε = 11.5."""
    officer = Officer(tmp_path, 2000, **policy)
    with pytest.raises(FedwardError) as refused:
        spent = independent(officer.ask(private(make_plan, 8.0, 1e-3)), 1e-5)
        pytest.fail(f"the hospital agreed to ε = {spent:.4g} at δ = 1e-5 under a cap of 8")
    assert "δ must not be above" in str(refused.value) or "1e-05" in str(refused.value)
    honest = officer.ask(private(make_plan, 8.0, 1e-5))
    assert independent(honest, 1e-5) <= 8.0


class Gauss:
    """A first or second study without sampling; its privacy loss is normal."""

    def __init__(self, shift: float) -> None:
        self.mechanism = Mechanism(1 / shift, 1.0, 1)
        self.shift = shift

    def excess(self, t: Losses) -> Losses:
        """E[(1 - exp(t - L))+] of its loss L (Balle and Wang, 2018, arXiv:1805.06530)."""
        high = norm.cdf(self.shift / 2 - t / self.shift)
        return np.asarray(high - np.exp(t) * norm.cdf(-self.shift / 2 - t / self.shift))


class Sampled:
    """A study that looks at few patients with little noise: a small loss, or a huge one."""

    rate = 0.003

    def __init__(self, shift: float) -> None:
        noise = 1 / shift
        self.mechanism = Mechanism(noise, self.rate, 1)
        x = np.arange(-12 * noise, 1 + 12 * noise, noise / 200)
        density = (1 - self.rate) * norm.pdf(x, 0, noise) + self.rate * norm.pdf(x, 1, noise)
        weight = density * noise / 200
        self.loss = np.log1p(self.rate * np.expm1((2 * x - 1) / (2 * noise**2)))  # grows with x
        self.high = np.append(np.cumsum(weight[::-1])[::-1], 0)
        self.scaled = np.append(np.cumsum((weight * np.exp(-self.loss))[::-1])[::-1], 0)

    def excess(self, t: Losses) -> Losses:
        """The same, summed over what the study may give."""
        place = np.searchsorted(self.loss, t, side="right")
        return np.asarray(self.high[place] - np.exp(t) * self.scaled[place])


CAP, DELTA = 3.0, 1e-3


def admitted(folder: Path, *studies: Mechanism) -> bool:
    """Whether a hospital's ledger lets these studies run, one after another."""
    ledger = Ledger(folder)
    ledger.register(COHORT, "chest", ["p1", "p2"])
    caps = Caps(CAP, CAP, DELTA)
    try:
        for number, one in enumerate(studies):
            ledger.reserve(RoundRequest(f"s{number}", "f" * 64, 1, COHORT, one, DELTA), caps)
    except FedwardError:
        return False
    finally:
        ledger.close()
    return True


def strongest(kind: type[Gauss | Sampled], first: Gauss, folder: Path) -> Gauss | Sampled | None:
    """The least noise with which the hospital lets a study of a kind follow the first."""
    low, high = 0.05, 20.0
    for turn in range(14):
        middle = float(np.sqrt(low * high))
        fits = admitted(folder / f"{kind.__name__}-{turn}", first.mechanism, kind(middle).mechanism)
        low, high = (middle, high) if fits else (low, middle)
    return kind(low) if low > 0.05 else None


def test_studies_chosen_after_looking_keep_the_promise(tmp_path: Path) -> None:
    """The coordinator sees the loss of its first study, and picks the second accordingly.

    After a small loss it wants the study that seldom tells all; after a large one, the steady
    study that adds to it. Each choice alone keeps (ε, δ). The exact δ of choosing is integrated.
    """
    first = Gauss(0.7)
    assert admitted(tmp_path / "first", first.mechanism)
    loss = np.linspace(-6.0, 6.0, 40_001)
    chance = norm.pdf(loss, first.shift**2 / 2, first.shift) * (loss[1] - loss[0])
    # Without a second study what was seen is all there is.
    outcomes = [np.maximum(0.0, 1 - np.exp(CAP - loss))]
    for kind in (Gauss, Sampled):
        second = strongest(kind, first, tmp_path)
        if second is not None:
            alone = second.excess(CAP - loss)
            assert float(chance @ alone) <= DELTA * 1.001
            outcomes.append(alone)
    assert len(outcomes) > 1, "the hospital lets a small second study run"
    broken = float(chance @ np.max(outcomes, axis=0))
    assert broken <= DELTA, f"the promise fails with chance {broken:.3g}, not {DELTA:g}"


class Meter(Trainer):
    """A site's trainer that keeps, as its ledger would, what it was charged."""

    charged: ClassVar[dict[str, int]] = {}

    def train(self, arrays: Any, order: RoundOrder) -> Any:
        update, outcome = super().train(arrays, order)
        self.charged[outcome.site] = self.charged.get(outcome.site, 0) + outcome.steps
        return update, outcome


class Metered(SimulatedSites):
    """Sites that keep it."""

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        trainer = super().trainer_of(site, plan)
        trainer.__class__ = Meter
        return trainer


class Slow(LocalGrid):
    """A link that holds back what the second site sends in some rounds."""

    late: ClassVar[set[int]] = {2, 4}

    def pull_messages(self, message_ids: Any) -> list[Message]:
        asked = [one for one in message_ids if not self._is_late(one)]
        return super().pull_messages(asked)

    def _is_late(self, identifier: str) -> bool:
        message, _ = self._waiting[identifier]
        config = message.content.config_records["config"]
        second = sorted(self._places)[1]
        return message.metadata.message_type == "train" and (
            message.metadata.dst_node_id == second and config["round"] in self.late
        )


def test_an_update_that_came_too_late_is_on_the_card(make_plan: Make, make_site: Make) -> None:
    plan = make_plan(
        training={"rounds": 4, "batch_size": 6},
        participation={"quorum": 1, "retries": 0},
        privacy={"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0},
    )
    sites = [make_site(f"site-{number}", seed=number) for number in (1, 2)]
    Meter.charged.clear()
    job = Job(plan, to_arrays(build_model(plan, 0)), Arm(name="t", kind="federated"), deadline=1.0)
    identity.become_server()
    pool = Pool(State(Metered(sites, Runtime(randomness="seeded"))), 0)
    try:
        StudyRun(job, Slow(pool, 2)).run()
    finally:
        pool.close()
    assert job.complete
    assert [list(one.sites) for one in job.arm.rounds] == [
        ["site-1", "site-2"],
        ["site-1"],
        ["site-1", "site-2"],
        ["site-1"],
    ]
    for site, steps in Meter.charged.items():
        spent = job.arm.privacy[site]
        assert spent.steps >= steps, f"{site}: the card has {spent.steps} steps of {steps}"
        run = Mechanism(spent.noise_multiplier, spent.sampling_rate, steps)
        assert spent.epsilon >= independent(run, spent.delta) - 0.001


@pytest.mark.integration
def test_a_real_hospitals_late_update_is_on_the_card(
    coordinator: Any, hospital: Any, make_private: Make, until: Make
) -> None:
    """The trainer is held up after its charge, until the aggregator's round is over."""
    plan, study = make_private(100), "late-1"
    once = plan.participation.model_copy(update={"retries": 0, "sites": 1})
    plan = plan.model_copy(update={"participation": once})
    assert "facts" in coordinator.ask(
        hospital.node, coordinator.order(plan, 0, study, task="describe"), "query"
    )
    job = Job(
        plan,
        to_arrays(build_model(plan, 0)),
        Arm(name="t", kind="federated"),
        deadline=600.0,
        quorum=1,
        members={hospital.node: hospital.daemon.name},
        study=study,
        sign=lambda order: sign_order(coordinator.key, order),
    )
    ended: list[FedwardError] = []

    def run() -> None:
        try:
            StudyRun(job, coordinator.session.grid).run()
        except FedwardError as error:
            ended.append(error)

    aggregator = threading.Thread(target=run)
    aggregator.start()
    until(lambda: hospital.step(study) >= 0)
    trainer = hospital.daemon.children()["trainer"]
    os.kill(trainer, signal.SIGSTOP)
    job.members = {}  # the aggregator waits for this hospital no longer
    try:
        aggregator.join()
    finally:
        os.kill(trainer, signal.SIGCONT)
    assert "quorum" in str(ended[0])
    until(lambda: hospital.row(study)["released"] == 1)
    row, spent = hospital.row(study), job.arm.privacy[hospital.daemon.name]
    assert (row["charged"], spent.steps) == (1, 100)
    assert spent.epsilon == pytest.approx(row["epsilon"], abs=1e-3)
