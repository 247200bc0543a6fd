"""The arms beside federation: the study's own recipe over the right patients, undivided."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedward.flower import identity
from fedward.models import build_model, from_arrays, to_arrays
from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan
from fedward.tasks.registry import counts_from_arrays
from fedward_client.data.sample import PreparedSite
from fedward_client.training.batches import shuffled
from fedward_client.training.fit import Draws
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.job import Job
from fedward_server.results import Arm
from fedward_server.round_loop import StudyRun
from fedward_simulation.baselines import lone_arm, lone_plan, shares
from fedward_simulation.checkpoint import ArmFolder
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites, pool_sites

SEEDED = Runtime(randomness="seeded")
ADAM = {"name": "fedadam", "settings": {"eta": 0.01, "tau": 1e-3}}
STEPS = {"local_epochs": None, "local_steps": 1, "schedule": "constant", "optimizer": "sgd"}
Make = Callable[..., Any]
Model = Mapping[str, NDArray[Any]]


@pytest.fixture
def sites(make_site: Make) -> list[PreparedSite]:
    return [make_site(f"site-{i}", patients=10 * i, images_per_patient=2, seed=i) for i in (2, 3)]


def start_of(plan: Plan) -> dict[str, NDArray[Any]]:
    return to_arrays(build_model(plan, 0))


def model_of(
    plan: Plan, sites: list[PreparedSite], site: str | None, folder: Path
) -> tuple[Arm, Model]:
    """A lone arm and the model that it delivers, as its checkpoint has it."""
    place = ArmFolder(folder, plan_hash(plan), 0)
    state = State(SimulatedSites(sites, SEEDED))
    arm, answers = lone_arm(state, plan, start_of(plan), 3, site, place)
    assert {name: len(one.patients) for name, one in answers.items()} == {
        one.name: len(one.split["test"]) for one in sites
    }
    job = Job(plan, start_of(plan), Arm(name="", kind="alone"))
    place.open(job)
    return arm, job.average


def trained_through(plan: Plan, site: PreparedSite) -> Model:
    """Plain training with one AdamW from the first round to the last, in torch alone."""
    model, indices = build_model(plan, 0), site.split["train"]
    from_arrays(model, start_of(plan))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    model.train()
    for round_ in range(1, plan.rounds + 1):
        order = Draws.make(SEEDED, 3, site.name, round_).order
        for batch in shuffled(indices, 8, order, epochs=1, steps=None):
            optimizer.zero_grad()
            images, labels = torch.from_numpy(site.images[batch]), site.targets[batch]
            torch.nn.functional.cross_entropy(model(images), torch.from_numpy(labels)).backward()
            optimizer.step()
    return to_arrays(model)


def test_pooling_keeps_patients_apart_and_in_their_part(sites: list[PreparedSite]) -> None:
    whole = pool_sites(sites)
    assert whole.name == "pooled"
    assert len(np.unique(whole.patients)) == 20 + 30
    for part in ("train", "validation", "test"):
        expected = np.concatenate([s.images[s.split[part]] for s in sites])
        np.testing.assert_array_equal(whole.images[whole.split[part]], expected)
        labels = np.concatenate([s.targets[s.split[part]] for s in sites])
        np.testing.assert_array_equal(whole.targets[whole.split[part]], labels)
        assert whole.patients_in(part) == sum(s.patients_in(part) for s in sites)
    parts = [set(whole.patients[index].tolist()) for index in whole.split.values()]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    # Two images have one patient in the pool exactly where they had one in their hospital.
    owner = np.concatenate([[f"{s.name}-{p}" for p in s.patients] for s in sites])
    same = owner[:, None] == owner[None, :]
    np.testing.assert_array_equal(same, whole.patients[:, None] == whole.patients[None, :])


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedmedian"])
@pytest.mark.parametrize("name", ["site-2", None])
def test_without_an_optimiser_at_the_server_a_lone_arm_is_plain_training(
    make_plan: Make,
    make_order: Make,
    sites: list[PreparedSite],
    name: str | None,
    strategy: str,
    tmp_path: Path,
) -> None:
    mu = {"settings": {"mu": 1.0}} if strategy == "fedprox" else {}
    plan = make_plan(
        training={"rounds": 3, "schedule": "constant"}, strategy={"name": strategy, **mu}
    )
    arm, model = model_of(plan, sites, name, tmp_path)
    data = pool_sites(sites) if name is None else sites[0]
    for key, value in trained_through(plan, data).items():
        np.testing.assert_allclose(model[key], value, rtol=1e-4, atol=1e-5)
    assert (arm.kind, arm.site) == (("pooled", None) if name is None else ("alone", name))
    assert [r.round for r in arm.rounds] == [1, 2, 3]
    assert all(r.validation["auc"] is not None and not r.sites for r in arm.rounds)
    assert arm.test is not None
    for site in sites:
        counts, _ = Trainer(plan, site, SEEDED).evaluate(
            model, make_order(plan, round=0, part="test")
        )
        expected = counts_from_arrays(plan.task, counts).figures(plan.metrics.report)
        assert arm.test.per_site[site.name] == expected
    assert arm.test.images == {s.name: len(s.split["test"]) for s in sites}


def test_an_optimiser_at_the_server_is_there_for_one_site_too(
    make_plan: Make, make_order: Make, sites: list[PreparedSite], tmp_path: Path
) -> None:
    plan = make_plan(training={"rounds": 3, **STEPS}, strategy=ADAM)
    _, model = model_of(plan, sites, "site-2", tmp_path)
    trainer, current = Trainer(plan, sites[0], SEEDED), start_of(plan)
    first = {name: np.zeros_like(value) for name, value in current.items()}
    second = {name: np.zeros_like(value) for name, value in current.items()}
    for round_ in (1, 2, 3):  # Reddi et al., 2021, algorithm 2, with Adam's bias correction
        update, _ = trainer.train(current, make_order(plan, round=round_, seed=3))
        rate = 0.01 * math.sqrt(1 - 0.99 ** (round_ + 1)) / (1 - 0.9 ** (round_ + 1))
        for name, value in current.items():
            delta = update[name] - value
            first[name] = 0.9 * first[name] + 0.1 * delta
            second[name] = 0.99 * second[name] + 0.01 * delta**2
            current[name] = value + rate * first[name] / (np.sqrt(second[name]) + 1e-3)
    for name, value in current.items():
        np.testing.assert_allclose(model[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "strategy",
    [ADAM, {"name": "fedavgm", "settings": {"server_momentum": 0.9}}],
    ids=lambda strategy: strategy["name"],
)
def test_pooled_data_train_as_the_federation_where_the_division_makes_no_difference(
    make_plan: Make, make_site: Make, strategy: dict[str, Any], tmp_path: Path
) -> None:
    """Sites of one size, all images in each step: the mean of their gradients is that of all."""
    sites = [make_site(f"site-{i}", patients=40, seed=i) for i in (1, 2)]
    plan = make_plan(training={"rounds": 4, "batch_size": 24, **STEPS}, strategy=strategy)
    identity.become_server()
    job = Job(plan, start_of(plan), Arm(name="federated", kind="federated"), seed=3)
    StudyRun(job, LocalGrid(Pool(State(SimulatedSites(sites, SEEDED)), 0), 2)).run()
    _, pooled = model_of(plan, sites, None, tmp_path)
    moved = max(np.abs(job.average[name] - value).max() for name, value in start_of(plan).items())
    assert moved > 0.002
    for name, value in job.average.items():
        np.testing.assert_allclose(pooled[name], value, rtol=1e-3, atol=moved / 1000)


def test_a_lone_arm_sees_as_many_images_as_the_sites_together(make_plan: Make) -> None:
    steps = make_plan(training={"local_epochs": None, "local_steps": 3})
    whole = lone_plan(steps, 4).training
    assert (whole.local_steps, whole.batch_size) == (12, 8)
    whole = lone_plan(make_plan(), 4).training
    assert (whole.local_epochs, whole.batch_size) == (1, 8)
    adam = make_plan(training={"local_epochs": None, "local_steps": 3}, strategy=ADAM)
    whole = lone_plan(adam, 4).training
    assert (whole.local_steps, whole.batch_size) == (3, 32)
    whole = lone_plan(adam, 1024).training  # a step has a bound
    assert (whole.local_steps, whole.batch_size) == (6, 4096)
    assert lone_plan(adam, 4).strategy == adam.strategy
    assert lone_plan(adam, 1).training == adam.training
    robust = make_plan(
        strategy={"name": "krum", "settings": {"malicious": 1}}, participation={"sites": 9}
    )
    assert lone_plan(robust, 9).strategy.name == "fedavg"


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [
        ({"optimizer": "adamw"}, {"name": "fedavg", "averaging": 0.5}),
        ({"optimizer": "sgd", "momentum": 0.9}, {"name": "fedavg"}),
        ({"optimizer": "adam"}, ADAM),
    ],
    ids=["adamw", "momentum", "fedadam"],
)
def test_a_lone_arm_that_was_broken_off_ends_as_one_that_was_not(
    make_plan: Make,
    sites: list[PreparedSite],
    tmp_path: Path,
    optimizer: dict[str, Any],
    strategy: dict[str, Any],
) -> None:
    stages = [
        {"name": "a", "rounds": 3, "learning_rate": 0.01},
        {"name": "b", "rounds": 2, "learning_rate": 0.01, "train": ["fc.*"]},
    ]
    plan = make_plan(
        training={"rounds": None, "learning_rate": None, **optimizer},
        stages=stages,
        strategy=strategy,
    )
    arm, whole = model_of(plan, sites, None, tmp_path / "whole")
    place, breaks = ArmFolder(tmp_path / "broken", plan_hash(plan), 3600), 0
    while True:
        begun = list[int]()

        def watch(step: int, steps: int, begun: list[int] = begun) -> None:
            if step == 1:
                begun.append(steps)  # training, evaluation, training
            if len(begun) == 3 and step == 2:
                raise KeyboardInterrupt

        state = State(SimulatedSites(sites, replace(SEEDED, watch=watch)))
        try:
            again, _ = lone_arm(state, plan, start_of(plan), 3, None, place)
            break
        except KeyboardInterrupt:
            breaks += 1
            assert place.rounds == min(breaks, plan.rounds)
    assert breaks >= 3
    job = Job(plan, start_of(plan), Arm(name="", kind="alone"))
    place.open(job)
    for name, value in whole.items():
        np.testing.assert_array_equal(job.average[name], value, strict=True)
    assert again.test == arm.test
    assert [r.train_loss for r in again.rounds] == [r.train_loss for r in arm.rounds]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_arms_are_shared_out_evenly(sites: list[PreparedSite], workers: int) -> None:
    places = shares(sites, workers)
    assert set(places) == {"site-2", "site-3", None}
    assert set(places.values()) == set(range(min(max(1, workers), 3)))
    if workers == 2:
        assert places["site-2"] == places["site-3"] != places[None]


@pytest.mark.parametrize("name", [None, "site-2"])
def test_without_test_patients_an_arm_says_why_it_has_no_figures(
    sites: list[PreparedSite], make_plan: Make, name: str | None
) -> None:
    none = np.empty(0, np.int64)
    bare = [replace(one, split={**one.split, "test": none}) for one in sites]
    plan = make_plan(training={"rounds": 1}, split={"given": False, "test": 0.0})
    state = State(SimulatedSites(bare, SEEDED))
    arm, _ = lone_arm(state, plan, to_arrays(build_model(plan, 0)), 0, name)
    assert arm.finished
    assert arm.test is None
    assert arm.unmeasured == "no site has test patients (split.test is 0)"


def test_a_lone_arm_that_was_broken_off_before_its_test_is_tested(
    sites: list[PreparedSite], make_plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(training={"rounds": 1})
    arm, _ = model_of(plan, sites, "site-2", tmp_path / "whole")
    place = ArmFolder(tmp_path / "broken", plan_hash(plan), 0)
    state = State(SimulatedSites(sites, SEEDED))

    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fedward_simulation.baselines.answers_on_test", stop)
        lone_arm(state, plan, start_of(plan), 3, "site-2", place)
    again, _ = lone_arm(state, plan, start_of(plan), 3, "site-2", place)
    assert again.test == arm.test
    assert again.rounds[0].bytes_down == 0 and not again.rounds[0].sites
