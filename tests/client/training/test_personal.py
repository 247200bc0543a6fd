"""A model of each site's own: what trains it, what never leaves, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedward.dp.accounting import calibrate, epsilon_spent, steps_per_round
from fedward.errors import DataError, ModelError, PlanError
from fedward.flower import identity
from fedward.models import build_model, from_arrays, to_arrays
from fedward.plan import Plan, plan_hash
from fedward_client.egress.gate import expected_arrays
from fedward_client.site_state import SiteStates
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.checkpoints import Checkpoints
from fedward_server.job import Job
from fedward_server.results import Arm
from fedward_server.round_loop import StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]
SEEDED = Runtime(randomness="seeded")
SGD = {"rounds": 3, "optimizer": "sgd", "schedule": "constant", "learning_rate": 0.1}
METHODS: dict[str, dict[str, Any]] = {
    "fine-tuning": {"method": "fine-tuning", "rounds": 3},
    "ditto": {"method": "ditto", "weight": 0.5},
    "fedbn": {"method": "fedbn"},
    "fedper": {"method": "fedper"},
    "fedrep": {"method": "fedrep"},
}
DP = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}


@pytest.fixture(autouse=True)
def _registered() -> None:
    identity.become_server()


def opposed(make_site: Make) -> list[Any]:
    """Two sites that disagree: what is sick at one is healthy at the other."""
    sites = [make_site(f"site-{i}", patients=60, seed=i) for i in (1, 2)]
    sites[1].targets[:] = 1 - sites[1].targets
    return sites


def job_of(plan: Plan, **more: Any) -> Job:
    return Job(plan, to_arrays(build_model(plan, 0)), Arm(name="t", kind="federated"), **more)


def run(job: Job, sites: list[Any]) -> Job:
    pool = Pool(State(SimulatedSites(sites, SEEDED)), 0)
    try:
        StudyRun(job, LocalGrid(pool, len(sites), job.site_states)).run()
    finally:
        pool.close()
    return job


@pytest.mark.parametrize("method", METHODS)
def test_sites_that_disagree_are_served_by_models_of_their_own(
    make_plan: Make, make_site: Make, method: str
) -> None:
    more = {"rounds": 8} if method == "fine-tuning" else {}
    # With heads apart the shared layers learn from both labels at once, which takes longer.
    rounds = 12 if method == "fedper" else 8
    plan = make_plan(
        training={**SGD, "rounds": rounds, "learning_rate": 0.3, "local_epochs": 3},
        personal={**METHODS[method], **more},
    )
    arm = run(job_of(plan, seed=2), opposed(make_site)).arm
    assert arm.test is not None and arm.own is not None
    primary = plan.metrics.primary
    for site in ("site-1", "site-2"):
        own, shared = arm.own.per_site[site][primary], arm.test.per_site[site][primary]
        if method == "fedbn":  # of this network's norms alone: no worse than what is shared
            assert own is not None and shared is not None
        else:
            assert own > 0.9, (site, own, shared)
    assert arm.own.per_site.keys() == {"site-1", "site-2"} and not arm.own.not_measured


@pytest.mark.parametrize("method", METHODS)
def test_what_is_a_site_s_own_never_travels(
    make_plan: Make, make_site: Make, make_order: Make, method: str
) -> None:
    plan = make_plan(training=SGD, personal=METHODS[method])
    trainer, start = Trainer(plan, make_site(), SEEDED), to_arrays(build_model(plan, 0))
    update, _ = trainer.train(start, make_order(plan))
    assert list(update) == list(expected_arrays(plan, 1))
    stays = {
        "fedper": {"fc.weight", "fc.bias"},
        "fedrep": {"fc.weight", "fc.bias"},
        "fedbn": {name for name in start if ".adn.N." in name},
    }.get(method, set())
    assert stays <= set(start) and set(update) == set(start) - stays
    if method == "fine-tuning":
        sent, outcome = trainer.train(start, make_order(plan, round=4))
        assert sent == {} and outcome.steps == 3 * trainer.train(start, make_order(plan))[1].steps
        assert expected_arrays(plan, 4) == {}
    kept = trainer.state.before(5)
    assert bool(kept) and all(name.startswith("own/") for name in kept)


@pytest.mark.parametrize("method", ["fedper", "fedbn"])
def test_arrays_that_stay_go_on_from_round_to_round(
    make_plan: Make, make_site: Make, make_order: Make, method: str
) -> None:
    """Training with them equals training one model whose other arrays are replaced each round."""
    plan = make_plan(training=SGD, personal=METHODS[method])
    start = to_arrays(build_model(plan, 0))
    trainer = Trainer(plan, make_site(), SEEDED)
    first, _ = trainer.train(start, make_order(plan))
    other = {name: value + 0.01 for name, value in first.items()}
    second, _ = trainer.train(start | other, make_order(plan, round=2))
    plain = Trainer(make_plan(training=SGD), make_site(), SEEDED)
    own = {name[4:]: v for name, v in trainer.state.before(2).items()}
    whole, _ = plain.train({**start, **own, **other}, make_order(plain.plan, round=2))
    for name, value in second.items():
        np.testing.assert_array_equal(value, whole[name])
    for name, value in trainer.state.before(3).items():
        np.testing.assert_array_equal(value, whole[name[4:]])


def test_ditto_pulls_its_own_model_to_the_shared_one(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    """One full-batch step of SGD, written out: v - η (g(v) + λ (v - w))."""
    plan = make_plan(
        training={**SGD, "local_epochs": None, "local_steps": 1, "batch_size": 4096},
        personal={"method": "ditto", "weight": 0.5},
    )
    site, start = make_site(), to_arrays(build_model(plan, 0))
    trainer = Trainer(plan, site, SEEDED)
    moved = {name: value + 0.02 for name, value in start.items()}
    trainer.train(start, make_order(plan))
    before = {name[4:]: v for name, v in trainer.state.before(2).items()}
    _, outcome = trainer.train(moved, make_order(plan, round=2))
    assert outcome.steps == 2
    net = build_model(plan, 0)
    from_arrays(net, before)
    own = site.split["train"]
    loss = torch.nn.functional.cross_entropy(
        net(torch.from_numpy(site.images[own])), torch.from_numpy(site.targets[own])
    )
    loss.backward()  # type: ignore[no-untyped-call]
    after = trainer.state.before(3)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        step = parameter.grad.numpy() + 0.5 * (before[name] - moved[name])
        np.testing.assert_allclose(after[f"own/{name}"], before[name] - 0.1 * step, atol=2e-6)


def test_fedrep_trains_what_stays_and_then_what_travels(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    """One full-batch step of SGD for each, written out; the second one sees the first one's."""
    plan = make_plan(
        training={**SGD, "local_epochs": None, "local_steps": 1, "batch_size": 4096},
        strategy={"name": "fedprox", "settings": {"mu": 3.0}},
        personal={"method": "fedrep"},
    )
    site, start = make_site(), to_arrays(build_model(plan, 0))
    trainer = Trainer(plan, site, SEEDED)
    trainer.train(start, make_order(plan))
    head = {name[4:]: v for name, v in trainer.state.before(2).items()}
    assert head.keys() == {"fc.weight", "fc.bias"}
    moved = {name: value + 0.02 for name, value in start.items()}
    update, outcome = trainer.train(moved, make_order(plan, round=2))
    assert outcome.steps == 2
    model, own = moved | head, site.split["train"]
    for part in (head.keys(), start.keys() - head.keys()):
        net = build_model(plan, 0)
        from_arrays(net, model)
        loss = torch.nn.functional.cross_entropy(
            net(torch.from_numpy(site.images[own])), torch.from_numpy(site.targets[own])
        )
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in net.named_parameters():
            if name in part:
                assert parameter.grad is not None
                model[name] = model[name] - 0.1 * parameter.grad.numpy()
    for name, value in update.items():  # one step from it: the proximal term is 0
        np.testing.assert_allclose(value, model[name], atol=2e-6)
    for name, value in trainer.state.before(3).items():
        np.testing.assert_allclose(value, model[name[4:]], atol=2e-6)
    assert all(parameter.requires_grad for parameter in trainer._model.parameters())


@pytest.mark.parametrize("method", ["fedper", "fedrep"])
def test_a_plan_names_the_parameters_that_stay(
    make_plan: Make, make_site: Make, make_order: Make, method: str
) -> None:
    start = to_arrays(build_model(make_plan(), 0))
    first = next(iter(start)).rpartition(".")[0]
    plan = make_plan(training=SGD, personal={"method": method, "local": [f"{first}.*", "fc.bias"]})
    update, _ = Trainer(plan, make_site(), SEEDED).train(start, make_order(plan))
    stays = {name for name in start if name.startswith(f"{first}.")} | {"fc.bias"}
    assert stays < start.keys() and update.keys() == start.keys() - stays
    assert list(update) == list(expected_arrays(plan, 1))
    nothing = make_plan(personal={"method": method, "local": ["fc.*", "none.*"]})
    with pytest.raises(ModelError, match=r"personal\.local.*none"):
        Trainer(nothing, make_site(), SEEDED)
    everything = make_plan(personal={"method": method, "local": ["*"]})
    with pytest.raises(ModelError, match="must train arrays that travel"):
        Trainer(everything, make_site(), SEEDED).train(start, make_order(everything))


def test_a_site_takes_the_shared_model_where_that_is_better_for_it(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    site = make_site(patients=60)
    good = make_plan(training={**SGD, "learning_rate": 0.3, "local_epochs": 10})
    shared, _ = Trainer(good, site, SEEDED).train(to_arrays(build_model(good, 0)), make_order(good))
    figures = {}
    for choose, may in ((True, True), (False, True), (True, False)):
        # At this rate its own training destroys the model.
        personal = {**METHODS["fine-tuning"], "learning_rate": 10.0, "choose": choose}
        plan = make_plan(training=SGD, personal=personal)
        trainer = Trainer(plan, site, SEEDED)
        trainer.may_choose = may  # what a hospital's policy says
        trainer.train(shared, make_order(plan, round=4))
        order = make_order(plan, round=4, task="evaluate", part="test")
        figures[choose and may] = trainer.answers(shared, order).exact().figures(["auc"])["auc"]
    assert figures[True] > 0.9 and figures[True] > (figures[False] or 0.0)


@pytest.mark.parametrize(("first", "may"), [(1, True), (1, False), (2, True)])
def test_a_site_takes_what_it_trained_alone_where_that_is_best_for_it(
    make_plan: Make, make_site: Make, make_order: Make, first: int, may: bool
) -> None:
    """Not where it may not choose, nor what it began after others had trained the model."""
    # Its own training and the shared model are of no use, as where all other hospitals differ.
    personal = {**METHODS["fine-tuning"], "learning_rate": 10.0, "alone": True}
    plan = make_plan(training={**SGD, "learning_rate": 0.3, "local_epochs": 5}, personal=personal)
    trainer, start = Trainer(plan, make_site(patients=60), SEEDED), to_arrays(build_model(plan, 0))
    trainer.may_choose = may
    for round_ in range(first, 4):
        trainer.train(start, make_order(plan, round=round_))
    useless = {name: np.zeros_like(value) for name, value in start.items()}
    trainer.train(useless, make_order(plan, round=4))
    order = make_order(plan, round=4, task="evaluate", part="test")
    found = trainer.answers(useless, order).exact().figures(["auc"])["auc"]
    if may and first == 1:
        lone = make_order(plan, round=5, task="evaluate", part="test")
        alone = trainer.answers(useless, lone).exact().figures(["auc"])["auc"]
        assert found == alone and alone > 0.9
    else:
        assert found is not None and found < 0.9


@pytest.mark.parametrize("method", METHODS)
def test_the_own_training_is_inside_the_plan_s_epsilon(
    make_plan: Make, make_site: Make, make_order: Make, method: str
) -> None:
    plan = make_plan(training=SGD, personal=METHODS[method], privacy=DP)
    site, start = make_site(), to_arrays(build_model(plan, 0))
    trainer, taken, told = Trainer(plan, site, SEEDED), 0, 0.0
    rounds = [1, 2, 3, *([4] if method == "fine-tuning" else [])]
    for round_ in rounds:
        _, outcome = trainer.train(start, make_order(plan, round=round_))
        taken += outcome.steps
        told = outcome.epsilon or 0.0
    mechanism = calibrate(plan, site.patients_in("train"))
    each = steps_per_round(plan, mechanism.sampling_rate)
    passes = {"fine-tuning": 3 + 3, "ditto": 2 * 3, "fedrep": 2 * 3}.get(method, 3)
    assert taken == mechanism.steps == passes * each
    spent = epsilon_spent(mechanism.noise_multiplier, mechanism.sampling_rate, taken, 1e-3)
    assert told == pytest.approx(spent) and 7.5 < told <= 8.0
    plain = calibrate(make_plan(training=SGD, privacy=DP), site.patients_in("train"))
    more = mechanism.noise_multiplier > plain.noise_multiplier
    assert more == (passes > 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_broken_off_after_each_round_ends_as_one_that_was_not(
    make_plan: Make, make_site: Make, tmp_path: Path, method: str
) -> None:
    from fedward_server.events import Event, RoundEnded

    sites = opposed(make_site)
    plan = make_plan(training=SGD, personal=METHODS[method])
    whole = run(job_of(plan, seed=5), sites)
    for _ in range(6):
        kept = Checkpoints(tmp_path / "study", plan_hash(plan))
        job = job_of(plan, seed=5, save=kept.save)
        kept.restore(job)
        if job.complete:
            break

        def stop_after_a_round(event: Event, job: Job = job) -> None:
            if isinstance(event, RoundEnded) and len(job.arm.rounds) < 3:
                job.stop.set()

        job.listen = stop_after_a_round
        run(job, sites)
    assert job.complete and job.arm.own == whole.arm.own
    for name, value in whole.arrays.items():
        np.testing.assert_array_equal(job.arrays[name], value)


def test_what_a_site_trains_alone_is_what_a_study_of_it_alone_gives(
    make_plan: Make, make_site: Make
) -> None:
    training = {**SGD, "rounds": 4}
    sites = opposed(make_site)
    plan = make_plan(training=training, personal={"alone": True})
    arm = run(job_of(plan, seed=5), sites).arm
    assert arm.alone is not None and arm.own is None
    plain = run(job_of(make_plan(training=training), seed=5), sites)
    assert plain.arm.test == arm.test  # it changes nothing of the shared model
    for place, site in enumerate(sites):
        lone = job_of(make_plan(training=training, participation={"sites": 1}), seed=5)
        pool = Pool(State(SimulatedSites([site], SEEDED)), 0)
        StudyRun(lone, LocalGrid(pool, 1, lone.site_states)).run()
        assert lone.arm.test is not None
        told, own = arm.alone.per_site[site.name], lone.arm.test.per_site[site.name]
        # Other batches, the draws of a second model being its own.
        assert told["auc"] == pytest.approx(own["auc"], abs=0.1), place
    assert [one.name for one in arm.lone] == ["alone: site-1", "alone: site-2"]


def test_a_site_that_joined_later_has_nothing_that_it_trained_alone(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(training=SGD, personal={"alone": True})
    start = to_arrays(build_model(plan, 0))
    order = make_order(plan, round=4, task="evaluate", part="test")
    for first in (1, 2):
        trainer = Trainer(plan, make_site(), SEEDED)
        for round_ in range(first, 4):
            trainer.train(start, make_order(plan, round=round_))
        if first == 1:
            alone = trainer.model_of(start, order)
            assert any(not np.array_equal(alone[name], start[name]) for name in start)
        else:
            with pytest.raises(DataError, match="begin with the study's first round"):
                trainer.model_of(start, order)


@pytest.mark.parametrize("private", [False, True])
def test_alone_beside_an_own_model(
    make_plan: Make, make_site: Make, make_order: Make, private: bool
) -> None:
    personal = {**METHODS["fine-tuning"], "alone": True}
    plan = make_plan(training=SGD, personal=personal, **({"privacy": DP} if private else {}))
    assert (plan.own_round, plan.alone_round, plan.tests) == (4, 5, (0, 4, 5))
    assert plan.evaluation_epsilon("test") == pytest.approx(plan.metrics.epsilon / 3)
    trainer, start, taken = Trainer(plan, make_site(), SEEDED), to_arrays(build_model(plan, 0)), 0
    for round_ in (1, 2, 3, 4):
        taken += trainer.train(start, make_order(plan, round=round_))[1].steps
    if private:
        assert taken == calibrate(plan, trainer.site.patients_in("train")).steps
    models = [
        trainer.model_of(start, make_order(plan, round=round_, task="evaluate", part="test"))
        for round_ in plan.tests
    ]
    assert np.array_equal(models[0]["fc.weight"], start["fc.weight"])
    assert not np.array_equal(models[2]["fc.weight"], start["fc.weight"])
    assert not np.array_equal(models[1]["fc.weight"], models[2]["fc.weight"])


@pytest.mark.parametrize(
    ("personal", "where"),
    [
        ({}, "personal.method"),
        ({"method": "fine-tuning"}, "personal.rounds"),
        ({"method": "ditto"}, "personal.weight"),
        ({"method": "fedbn", "rounds": 3}, "personal.rounds"),
        ({"method": "fedper", "weight": 1.0}, "personal.weight"),
        ({"method": "fedbn", "local": ["fc.*"]}, "personal.local"),
    ],
)
def test_settings_that_a_method_lacks_or_does_not_know(
    make_plan: Make, personal: Mapping[str, Any], where: str
) -> None:
    with pytest.raises(PlanError, match=where):
        make_plan(personal=personal)


def test_a_stage_must_have_something_to_share(make_plan: Make, make_site: Make) -> None:
    plan = make_plan(
        training={"rounds": None, "learning_rate": None},
        stages=[{"name": "head", "rounds": 1, "learning_rate": 0.1, "train": ["fc.*"]}],
        personal={"method": "fedper"},
    )
    with pytest.raises(ModelError, match="must train arrays that travel"):
        Trainer(plan, make_site(), SEEDED).train(to_arrays(build_model(plan, 0)), _first(plan))


def test_with_fedrep_a_stage_must_train_what_stays(make_plan: Make, make_site: Make) -> None:
    plan = make_plan(
        training={"rounds": None, "learning_rate": None},
        stages=[{"name": "body", "rounds": 1, "learning_rate": 0.1, "train": ["[!f]*"]}],
        personal={"method": "fedrep"},
    )
    with pytest.raises(ModelError, match="arrays that stay at the site"):
        Trainer(plan, make_site(), SEEDED).train(to_arrays(build_model(plan, 0)), _first(plan))


def _first(plan: Plan) -> Any:
    from fedward.plan import canonical
    from fedward.protocol import RoundOrder

    return RoundOrder(plan=canonical(plan), plan_hash=plan_hash(plan), round=1)


def test_states_of_a_study_are_found_again(
    make_plan: Make, make_site: Make, make_order: Make, tmp_path: Path
) -> None:
    """A trainer that ended goes on with the site's own model from the disk."""
    plan = make_plan(training=SGD, personal=METHODS["ditto"])
    site, start = make_site(), to_arrays(build_model(plan, 0))

    def fresh() -> Trainer:
        return Trainer(plan, site, SEEDED, SiteStates(tmp_path).of("s", plan_hash(plan), "c"))

    one = fresh()
    for round_ in (1, 2, 3):
        one.train(start, make_order(plan, round=round_))
        fresh().train(start, make_order(plan, round=round_))  # asked again after a crash
    order = make_order(plan, round=4, task="evaluate", part="test")
    kept = fresh().model_of(start, order)
    for name, value in one.model_of(start, order).items():
        np.testing.assert_array_equal(kept[name], value)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["scaffold", "feddyn"])
def test_own_models_go_with_strategies_that_keep_state(
    make_plan: Make, make_site: Make, strategy: str, method: str, private: bool
) -> None:
    """What both keep at a site lies side by side, and the strategy sees what travels alone."""
    settings = {"settings": {"alpha": 0.1}} if strategy == "feddyn" else {}
    plan = make_plan(
        training={**SGD, "rounds": 2},
        strategy={"name": strategy, **settings},
        personal={**METHODS[method], "alone": True},
        **({"privacy": DP} if private else {}),
    )
    job = run(job_of(plan, seed=1), opposed(make_site))
    assert job.arm.own is not None and job.arm.alone is not None
    for found in (job.arm.own, job.arm.alone):
        assert set(found.per_site) == {"site-1", "site-2"} and not found.not_measured
    assert all(not one.failures for one in job.arm.rounds)
    if private:
        assert {round(one.epsilon) for one in job.arm.privacy.values()} == {8}
    travels = {name for name in expected_arrays(plan, 1) if "/" not in name}
    assert {name.partition("/")[2] for name in job.memory} == travels


def test_a_choice_is_measured_once_for_the_test_and_for_the_file(
    make_plan: Make, make_site: Make, make_order: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(training=SGD, personal=METHODS["fine-tuning"])
    trainer, start = Trainer(plan, make_site(), SEEDED), to_arrays(build_model(plan, 0))
    trainer.train(start, make_order(plan, round=4))
    scored: list[int] = []
    score = Trainer._score

    def counted(self: Trainer, *arguments: Any) -> float | None:
        scored.append(1)
        return score(self, *arguments)

    monkeypatch.setattr(Trainer, "_score", counted)
    order = make_order(plan, round=4, task="evaluate", part="test", arrays="0" * 64)
    trainer.evaluate(start, order)
    trainer.model_of(start, order)
    assert len(scored) == 2  # the shared one and the own one
    trainer.model_of(start, order.model_copy(update={"arrays": "1" * 64}))
    assert len(scored) == 4  # another model is another question
