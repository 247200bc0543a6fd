"""A strategy of one file, end to end: what it adds, keeps and sends, and nothing else leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from unguarded import UnguardedSites

from fedward.errors import EgressError, ModelError, PlanError, PolicyError, ProtocolError
from fedward.flower import identity
from fedward.models import build_model, from_arrays, to_arrays
from fedward.plan import Plan, plan_hash
from fedward.plan.explain import explain
from fedward.strategies import STRATEGIES, SiteResult, StrategySpec
from fedward_client.data.sample import PreparedSite
from fedward_client.egress.gate import Gate, expected_arrays
from fedward_client.policy.decide import DatasetFacts
from fedward_client.policy.settings import Limits
from fedward_client.site_state import SiteStates
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.aggregation import Aggregation
from fedward_server.checkpoints import Checkpoints
from fedward_server.events import Event, RoundEnded
from fedward_server.job import Job
from fedward_server.reply_validation import Update
from fedward_server.results import Arm
from fedward_server.round_loop import StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]
SEEDED = Runtime(randomness="seeded")
NAME = "control-variates"


@pytest.fixture(autouse=True)
def _registered(control_variates: StrategySpec) -> None:
    identity.become_server()


def convex(
    make_plan: Make,
    strategy: str,
    rounds: int,
    steps: int = 20,
    settings: Mapping[str, float] | None = None,
) -> Plan:
    """Only the last layer trains: logistic regression, with one optimum."""
    made: Plan = make_plan(
        training={
            "rounds": None,
            "learning_rate": None,
            "local_epochs": None,
            "local_steps": steps,
            "batch_size": 24,
            "optimizer": "sgd",
            "schedule": "constant",
        },
        stages=[{"name": "end", "rounds": rounds, "learning_rate": 0.5, "train": ["fc.*"]}],
        strategy={"name": strategy, "settings": settings or {}},
    )
    return made


def drifting(make_site: Make) -> list[PreparedSite]:
    """Two sites that pull apart: most of the one's patients are sick, and few of the other's."""
    sites = [make_site(f"site-{i}", seed=i) for i in (1, 2)]
    for site, share in zip(sites, (0.1, 0.9), strict=True):
        targets = np.random.default_rng(4).random(len(site.targets)) < share
        site.targets[:] = targets.astype(np.int64)
    return sites


def job_of(plan: Plan, **more: Any) -> Job:
    return Job(plan, to_arrays(build_model(plan, 0)), Arm(name="t", kind="federated"), **more)


def run(
    job: Job,
    sites: list[PreparedSite],
    workers: int = 0,
    kind: type[SimulatedSites] = SimulatedSites,
) -> Job:
    pool = Pool(State(kind(sites, SEEDED)), workers)
    try:
        StudyRun(job, LocalGrid(pool, len(sites), job.site_states)).run()
    finally:
        pool.close()
    return job


def slope(plan: Plan, model: Mapping[str, Any], sites: list[PreparedSite]) -> float:
    """Norm of the gradient of the pooled training loss: 0 at the pooled optimum."""
    net = build_model(plan, 0)
    from_arrays(net, model)
    net.eval()
    logits, targets = [], []
    for site in sites:
        own = site.split["train"]
        logits.append(net(torch.from_numpy(site.images[own])))
        targets.append(torch.from_numpy(site.targets[own]))
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))
    trained = [p for name, p in net.named_parameters() if name.startswith("fc.")]
    return math.sqrt(sum(float((g**2).sum()) for g in torch.autograd.grad(loss, trained)))


def test_it_reaches_the_pooled_optimum_where_fedavg_does_not(
    make_plan: Make, make_site: Make
) -> None:
    sites = drifting(make_site)
    plain = run(job_of(convex(make_plan, "fedavg", 40)), sites)
    plan = convex(make_plan, NAME, 40)
    corrected = run(job_of(plan), sites)
    assert slope(plan, corrected.arrays, sites) < 0.1 * slope(plan, plain.arrays, sites)
    # Kept at the sites, sent besides the update and counted, and known to the server.
    assert set(corrected.site_states) == {0, 1}
    names = [name for name in corrected.arrays if name.startswith("fc.")]
    assert set(corrected.memory) == {f"shared/{name}" for name in names}
    own = [corrected.site_states[place] for place in (0, 1)]
    for name in names:
        mean = (own[0][f"40/own/{name}"] + own[1][f"40/own/{name}"]) / 2
        np.testing.assert_allclose(corrected.memory[f"shared/{name}"], mean, atol=1e-5)
    sizes = [job.arm.rounds[0].bytes_up for job in (plain, corrected)]
    assert sizes[1] == 2 * sizes[0]


@pytest.mark.parametrize(
    ("name", "settings"), [("scaffold", {}), ("feddyn", {"alpha": 0.3}), ("fedprox", {"mu": 0.3})]
)
def test_drift_is_corrected_by_the_strategies_that_say_so(
    make_plan: Make, make_site: Make, name: str, settings: dict[str, float]
) -> None:
    sites = drifting(make_site)
    plain = run(job_of(convex(make_plan, "fedavg", 40)), sites)
    plan = convex(make_plan, name, 40, settings=settings)
    corrected = run(job_of(plan), sites)
    gain = slope(plan, corrected.arrays, sites) / slope(plan, plain.arrays, sites)
    # A proximal term slows the drift down and leaves where it leads to.
    assert gain < 0.1 if name != "fedprox" else 0.2 < gain < 1.0
    assert set(corrected.site_states) == (set() if name == "fedprox" else {0, 1})


def test_the_regularisers_of_feddyn_and_its_server_add_up(make_plan: Make, make_site: Make) -> None:
    sites = drifting(make_site)
    made = run(job_of(convex(make_plan, "feddyn", 3, settings={"alpha": 0.3})), sites)
    for name in (n for n in made.arrays if n.startswith("fc.")):
        mean = np.mean([s[f"3/gradient/{name}"] for s in made.site_states.values()], axis=0)
        np.testing.assert_allclose(made.memory[f"gradient/{name}"], mean, atol=1e-6)


def test_fednova_with_sites_of_two_sizes_counts_each_step_once(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    """With one epoch a site of three times the images takes three times the steps."""
    sites = [make_site("a", patients=12, seed=1), make_site("b", patients=48, seed=2)]
    plan = make_plan(
        training={
            "rounds": 1,
            "learning_rate": 0.1,
            "local_epochs": 1,
            "local_steps": None,
            "batch_size": 4,
            "optimizer": "sgd",
            "momentum": 0.5,
            "schedule": "constant",
        },
        strategy={"name": "fednova"},
    )
    made = run(job_of(plan, seed=3), sites)
    start = to_arrays(build_model(plan, 0))
    rounds = made.arm.rounds[0].sites
    total = sum(one.images for one in rounds.values())
    moved, steps_mean = dict.fromkeys(start, 0.0), 0.0
    for site in sites:
        told = rounds[site.name]
        update, _ = Trainer(plan, site, SEEDED).train(start, make_order(plan, seed=3))
        kept = 0.5 * (1 - 0.5**told.steps) / 0.5
        along, share = (told.steps - kept) / 0.5, told.images / total
        steps_mean += share * along
        for name in start:
            moved[name] = moved[name] + share / along * (update[name] - start[name])
    assert len({one.steps for one in rounds.values()}) == 2
    for name, value in made.arrays.items():
        np.testing.assert_allclose(value, start[name] + steps_mean * moved[name], atol=1e-5)


@pytest.mark.parametrize(
    ("training", "where"),
    [({"optimizer": "adamw"}, "training.optimizer"), ({"momentum": 0.9}, "training.momentum")],
)
def test_scaffold_needs_steps_that_its_control_variates_are_of(
    make_plan: Make, training: dict[str, Any], where: str
) -> None:
    with pytest.raises(PlanError, match=where):
        make_plan(training={"optimizer": "sgd", **training}, strategy={"name": "scaffold"})


def test_an_update_must_be_of_the_steps_that_the_plan_asks_for(
    make_plan: Make, make_site: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedNova divides by them: who claims one step for many would count many times."""
    train = Trainer.train

    def lying(self: Trainer, arrays: Any, order: Any) -> Any:
        update, outcome = train(self, arrays, order)
        fewer = {"steps": 1} if self.site.name == "site-2" else {}
        return update, outcome.model_copy(update=fewer)

    monkeypatch.setattr(Trainer, "train", lying)
    plan = make_plan(
        strategy={"name": "fednova"},
        participation={"sites": 2, "quorum": 1},
        training={"rounds": 1, "optimizer": "sgd"},
    )
    sites = [make_site(f"site-{i}", seed=i) for i in (1, 2)]
    job = run(job_of(plan), sites, kind=UnguardedSites)
    (failure,) = job.arm.rounds[0].failures
    assert failure.site == "site-2" and "steps that the plan asks for" in failure.reason


@pytest.mark.parametrize("workers", [0, 2])
def test_a_simulation_broken_off_after_each_round_ends_as_one_that_was_not(
    make_plan: Make, make_site: Make, tmp_path: Path, workers: int
) -> None:
    sites = drifting(make_site)
    plan = convex(make_plan, NAME, 4, steps=3)
    whole = run(job_of(plan, seed=5), sites)
    for _ in range(8):
        kept = Checkpoints(tmp_path / "study", plan_hash(plan))
        job = job_of(plan, seed=5, save=kept.save)
        kept.restore(job)
        if job.complete:
            break

        def stop_after_a_round(event: Event, job: Job = job) -> None:
            if isinstance(event, RoundEnded):
                job.stop.set()

        job.listen = stop_after_a_round
        run(job, sites, workers)  # new trainers, in new processes
    assert job.complete and len(job.arm.rounds) == 4
    for name, value in whole.arrays.items():
        np.testing.assert_array_equal(job.arrays[name], value)
    for place, state in whole.site_states.items():
        assert state.keys() == job.site_states[place].keys()
        assert all(np.array_equal(v, job.site_states[place][n]) for n, v in state.items())


def start_of(plan: Plan, shared: float = 0.0) -> dict[str, Any]:
    model = to_arrays(build_model(plan, 0))
    names = [name for name in model if not plan.stages or name.startswith("fc.")]
    return model | {f"shared/{n}": np.full_like(model[n], shared) for n in names}


def test_a_round_that_is_asked_again_after_a_crash_gives_the_same_bytes(
    make_plan: Make, make_site: Make, make_order: Make, tmp_path: Path
) -> None:
    plan, site = make_plan(training={"rounds": 4}, strategy={"name": NAME}), make_site()

    def fresh() -> Trainer:
        return Trainer(plan, site, SEEDED, SiteStates(tmp_path).of("s", plan_hash(plan), "c"))

    start, trainer = start_of(plan), fresh()
    made = [trainer.train(start, make_order(plan, round=r))[0] for r in (1, 2, 3)]
    for round_ in (3, 2, 3):
        again, _ = fresh().train(start, make_order(plan, round=round_))
        assert again.keys() == made[round_ - 1].keys()
        for name, value in made[round_ - 1].items():
            np.testing.assert_array_equal(again[name], value)
    forgetful, _ = Trainer(plan, site, SEEDED).train(start, make_order(plan, round=3))
    assert any(not np.array_equal(forgetful[name], value) for name, value in made[2].items())


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("shared/fc.bias"),
        lambda arrays: arrays.update({"shared/fc.bias": np.zeros(3, np.float32)}),
        lambda arrays: arrays.update({"shared/fc.bias": np.zeros(2)}),
        lambda arrays: arrays.update({"shared/fc.bias": np.full(2, np.nan, np.float32)}),
        lambda arrays: arrays.update({"shared/other": np.zeros(2, np.float32)}),
        lambda arrays: arrays.update({"other/fc.bias": np.zeros(2, np.float32)}),
    ],
    ids=["missing", "shape", "dtype", "nan", "another array", "another kind"],
)
def test_a_site_takes_exactly_what_the_strategy_declares(
    make_plan: Make, make_site: Make, make_order: Make, change: Callable[[Any], Any]
) -> None:
    plan = make_plan(strategy={"name": NAME})
    arrays = start_of(plan)
    change(arrays)
    with pytest.raises((ProtocolError, ModelError)):
        Trainer(plan, make_site(), SEEDED).train(arrays, make_order(plan))
    fedavg = make_plan()
    with pytest.raises(ModelError, match="no such array"):
        Trainer(fedavg, make_site(), SEEDED).train(start_of(plan), make_order(fedavg))


def test_what_a_hook_sends_undeclared_does_not_leave(
    make_plan: Make, make_site: Make, make_order: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = STRATEGIES[NAME]
    assert spec.site is not None
    honest = spec.site

    class Leaking(honest):  # type: ignore[misc, valid-type]
        def finish(self) -> SiteResult:
            made: SiteResult = super().finish()
            return SiteResult(made.kept, {**made.sent, "images": made.sent["change"]})

    monkeypatch.setitem(STRATEGIES, NAME, replace(spec, site=Leaking))
    plan = make_plan(strategy={"name": NAME})
    with pytest.raises(PlanError, match="keeps and sends the arrays that it declares"):
        Trainer(plan, make_site(), SEEDED).train(start_of(plan), make_order(plan))


def test_the_gate_lets_out_what_the_plan_s_strategy_declares_and_nothing_else(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan, fedavg = make_plan(strategy={"name": NAME}), make_plan()
    arrays, outcome = Trainer(plan, make_site(), SEEDED).train(start_of(plan), make_order(plan))
    facts = DatasetFacts(patients=40, images=40, per_class={})
    size = sum(value.nbytes for value in arrays.values())

    def gate(of: Plan, most: float = 64.0) -> Gate:
        limits = Limits(minimum_count=1)
        return Gate(of, limits, site="site-1", facts=facts, max_upload_mib=most)

    expected = expected_arrays(plan, 1)
    assert list(arrays) == list(expected) and len(expected) == 2 * len(expected_arrays(fedavg, 1))
    gate(plan).check_update(arrays, expected, outcome, 1)
    with pytest.raises(PolicyError):
        gate(plan, 0.75 * size / 2**20).check_update(arrays, expected, outcome, 1)
    with pytest.raises(EgressError):
        gate(fedavg).check_update(arrays, expected_arrays(fedavg, 1), outcome, 1)
    name = next(reversed(arrays))
    for bad in (
        {key: value for key, value in arrays.items() if key != name},
        arrays | {name: arrays[name].astype(np.float64)},
        arrays | {name: np.zeros(7, np.float32)},
        arrays | {name: np.full_like(arrays[name], np.inf)},
        arrays | {f"images/{name}": arrays[name]},
    ):
        with pytest.raises(EgressError):
            gate(plan).check_update(bad, expected, outcome, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a.pop("change/fc.bias"), "exactly the arrays"),
        (lambda a: a.update({"more/fc.bias": a["fc.bias"]}), "exactly the arrays"),
        (lambda a: a.update({"change/fc.bias": np.zeros(9, np.float32)}), "shapes and dtypes"),
        (lambda a: a.update({"change/fc.bias": a["fc.bias"] * np.nan}), "must be finite"),
        (lambda a: a.update({"change/fc.bias": a["fc.bias"] * 0 + 1e9}), "in proportion"),
    ],
)
def test_the_aggregator_refuses_what_is_not_declared(
    make_plan: Make,
    make_site: Make,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], Any],
    reason: str,
) -> None:
    plan = make_plan(
        strategy={"name": NAME}, participation={"sites": 2, "quorum": 1}, training={"rounds": 1}
    )
    train = Trainer.train

    def lying(self: Trainer, arrays: Any, order: Any) -> Any:
        update, outcome = train(self, arrays, order)
        if self.site.name == "site-2":
            change(update)
        return update, outcome

    monkeypatch.setattr(Trainer, "train", lying)
    job = run(job_of(plan), [make_site(f"site-{i}", seed=i) for i in (1, 2)])
    (failure,) = job.arm.rounds[0].failures
    assert failure.site == "site-2" and reason in failure.reason
    assert list(job.arm.rounds[0].sites) == ["site-1"]


def test_what_is_sent_besides_is_bounded_as_an_update_is() -> None:
    def update(besides: float) -> Update:
        from flwr.app import Message, RecordDict

        from fedward.protocol import TrainOutcome

        told = TrainOutcome(site="s", round=1, patients=5, images=5, steps=1, seconds=1.0)
        message = Message(RecordDict(), dst_node_id=1, message_type="train")
        return Update(message, told, 1, 1.0, 1.0, besides)

    gathered = Aggregation(fold=False)
    for site, besides in (("a", 1.0), ("b", 1.2), ("c", 50.0)):
        gathered.add(site, update(besides))
    found = gathered.outliers(dict.fromkeys("abc", 1.0), 10.0)
    assert list(found) == ["c"] and "besides an update" in found["c"].reason
    assert gathered.too_far(update(100.0), 1.0) and not gathered.too_far(update(1.0), 1.0)


def test_with_privacy_only_what_follows_from_the_update_may_be_sent(
    make_plan: Make, make_site: Make, make_order: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
    with pytest.raises(PlanError, match="noise of an update does not cover"):
        make_plan(strategy={"name": NAME}, privacy=privacy)
    monkeypatch.setitem(STRATEGIES, NAME, replace(STRATEGIES[NAME], sent_from_update=True))
    plan = make_plan(strategy={"name": NAME}, privacy=privacy)
    start = start_of(plan)
    arrays, outcome = Trainer(plan, make_site(), SEEDED).train(start, make_order(plan))
    assert outcome.epsilon is not None
    # It is worked out from the noised update and what the aggregator knows.
    rate = 0.01 * outcome.steps
    change = (start["fc.bias"] - arrays["fc.bias"]) / rate
    np.testing.assert_allclose(arrays["change/fc.bias"], change, rtol=0.5)


def test_plan_check_tells_what_is_kept_and_sent(make_plan: Make) -> None:
    text = " ".join(explain(make_plan(strategy={"name": NAME}), 1_000_000).split())
    assert "model parameters, the change of its control variate and the counts" in text
    assert "a site keeps its control variate" in text
    assert "at most about 8 MB each way" in text
    assert "about 4 MB" in " ".join(explain(make_plan(), 1_000_000).split())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("scaffold", {}),
        ("feddyn", {"alpha": 0.1}),
        ("fednova", {}),
        ("rfa", {}),
        ("norm-clipping", {}),
    ],
)
def test_each_goes_with_privacy_and_costs_no_more(
    make_plan: Make, make_site: Make, name: str, settings: dict[str, float]
) -> None:
    privacy = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
    sites = [make_site(f"site-{i}", seed=i) for i in (1, 2)]
    training = {"rounds": 2, "optimizer": "sgd"}
    jobs = [
        run(job_of(make_plan(training=training, strategy=strategy, privacy=privacy), seed=4), sites)
        for strategy in ({"name": "fedavg"}, {"name": name, "settings": settings})
    ]
    told, plain = (job.arm.privacy for job in reversed(jobs))
    assert told == plain and all(7.0 < one.epsilon <= 8.0 for one in told.values())
    assert not any(one.failures for job in jobs for one in job.arm.rounds)
