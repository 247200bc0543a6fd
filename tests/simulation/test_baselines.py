"""The arms beside federation are plain training on the right patients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from client.data.types import PreparedSite
from client.training.runtime import Runtime
from client.training.trainer import Trainer
from fedward.metrics import counts_from_arrays
from fedward.models import build_model, to_arrays
from simulation.baselines import as_many_images, lone_arm, shares
from simulation.local import State
from simulation.sites import SimulatedSites, pool_sites

SEEDED = Runtime(randomness="seeded")
Make = Callable[..., Any]


@pytest.fixture
def sites(make_site: Make) -> list[PreparedSite]:
    return [make_site(f"site-{i}", patients=10 * i, images_per_patient=2, seed=i) for i in (2, 3)]


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


@pytest.mark.parametrize("name", ["site-2", None])
def test_a_lone_arm_is_direct_training_measured_everywhere(
    make_plan: Make, make_order: Make, sites: list[PreparedSite], name: str | None
) -> None:
    plan = make_plan()
    start = to_arrays(build_model(plan, 0))
    arm, answers = lone_arm(State(SimulatedSites(sites, SEEDED)), plan, start, 3, name)
    assert {site: len(one.patients) for site, one in answers.items()} == {
        s.name: len(s.split["test"]) for s in sites
    }
    data = pool_sites(sites) if name is None else sites[0]
    trained = list(Trainer(plan, data, SEEDED).alone(start, 3))
    assert [r.train_loss for r in arm.rounds] == [loss for _, _, loss in trained]
    assert (arm.kind, arm.site) == (("pooled", None) if name is None else ("alone", name))
    assert arm.test is not None
    model = trained[-1][1]
    for site in sites:
        counts, _ = Trainer(plan, site, SEEDED).evaluate(
            model, make_order(plan, round=0, part="test")
        )
        expected = counts_from_arrays(plan.task, counts).figures(plan.metrics.report)
        assert arm.test.per_site[site.name] == expected
    assert arm.test.images == {s.name: len(s.split["test"]) for s in sites}


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_arms_are_shared_out_evenly(sites: list[PreparedSite], workers: int) -> None:
    places = shares(sites, workers)
    assert set(places) == {"site-2", "site-3", None}
    assert set(places.values()) == set(range(min(max(1, workers), 3)))
    if workers == 2:
        assert places["site-2"] == places["site-3"] != places[None]


def test_pooled_data_see_as_many_images_as_the_sites_together(make_plan: Any) -> None:
    steps = make_plan(training={"local_epochs": None, "local_steps": 3})
    assert as_many_images(steps, 4).training.local_steps == 12
    epochs = make_plan()
    assert as_many_images(epochs, 4) == epochs


@pytest.mark.parametrize("name", [None, "site-2"])
def test_without_test_patients_an_arm_says_why_it_has_no_figures(
    sites: list[PreparedSite], make_plan: Make, name: str | None
) -> None:
    none = np.empty(0, np.int64)
    bare = [dataclasses.replace(one, split={**one.split, "test": none}) for one in sites]
    plan = make_plan(training={"rounds": 1}, split={"given": False, "test": 0.0})
    state = State(SimulatedSites(bare, SEEDED))
    arm = lone_arm(state, plan, to_arrays(build_model(plan, 0)), 0, name)
    assert arm.finished
    assert arm.test is None
    assert arm.unmeasured == "no site has test patients (split.test is 0)"
