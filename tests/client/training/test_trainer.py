"""The trainer: deterministic, learns, freezes what a stage freezes, accounts for what it spends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import least, sections

from fedward.dp.accounting import epsilon_spent
from fedward.errors import DataError, ModelError, PrivacyError, ProtocolError
from fedward.models import build_model, to_arrays
from fedward.plan import Plan, plan_from
from fedward.plan.schema import Strategy
from fedward.tasks.registry import counts_from_arrays
from fedward_client.data.sample import PreparedSite
from fedward_client.training.fit import Draws
from fedward_client.training.optimizers import rate_at
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

SEEDED = Runtime(randomness="seeded")
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
Make = Callable[..., Any]


def equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, PRIVATE], ids=["plain", "private"])
def test_same_seed_same_update_and_other_seed_another(
    make_plan: Make, make_site: Make, make_order: Make, privacy: dict[str, Any]
) -> None:
    plan: Plan = make_plan(privacy=privacy)
    start = to_arrays(build_model(plan, 0))
    site: PreparedSite = make_site()
    first, _ = Trainer(plan, site, SEEDED).train(start, make_order(plan))
    again, _ = Trainer(plan, site, SEEDED).train(start, make_order(plan))
    other, _ = Trainer(plan, site, SEEDED).train(start, make_order(plan, seed=1))
    later, _ = Trainer(plan, site, SEEDED).train(start, make_order(plan, round=2))
    assert equal(first, again)
    assert not equal(first, other)
    assert not equal(first, later)
    assert equal(start, to_arrays(build_model(plan, 0)))


def test_a_hospital_never_repeats_its_noise(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(privacy=PRIVATE)
    start, site = to_arrays(build_model(plan, 0)), make_site()
    first, _ = Trainer(plan, site, Runtime()).train(start, make_order(plan))
    second, _ = Trainer(plan, site, Runtime()).train(start, make_order(plan))
    assert not equal(first, second)


def test_a_private_round_is_released_once(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(privacy=PRIVATE)
    start, trainer = to_arrays(build_model(plan, 0)), Trainer(plan, make_site(), Runtime())
    first, outcome = trainer.train(start, make_order(plan, round=1))
    again, repeated = trainer.train(start, make_order(plan, round=1, seed=9))
    assert equal(first, again)
    assert outcome == repeated
    trainer.train(start, make_order(plan, round=2))
    with pytest.raises(PrivacyError, match="trained once"):
        trainer.train(start, make_order(plan, round=1))


@pytest.mark.parametrize("round_", [0, 3, 10**9])
def test_a_round_outside_the_plan_is_refused(
    make_plan: Make, make_site: Make, make_order: Make, round_: int
) -> None:
    plan = make_plan()
    trainer = Trainer(plan, make_site(), SEEDED)
    with pytest.raises(ProtocolError, match="rounds 1 to 2"):
        trainer.train(to_arrays(build_model(plan, 0)), make_order(plan, round=round_))


def test_training_learns(make_plan: Make, make_site: Make, make_order: Make) -> None:
    plan = make_plan(training={"rounds": 6, "local_epochs": 4})
    trainer = Trainer(plan, make_site(patients=80), SEEDED)
    arrays = to_arrays(build_model(plan, 0))
    for round_ in range(1, 7):
        arrays, outcome = trainer.train(arrays, make_order(plan, round=round_))
    counts, _ = trainer.evaluate(arrays, make_order(plan, round=0, part="test"))
    assert counts_from_arrays(plan.task, counts).figures(["auc"])["auc"] > 0.9
    assert outcome.patients == 48
    assert outcome.steps == 24


def test_frozen_layers_stay_bit_identical_and_only_trained_arrays_leave(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(
        training={"rounds": None, "learning_rate": None},
        stages=[
            {"name": "head", "rounds": 1, "learning_rate": 0.05, "train": ["fc.*"]},
            {"name": "all", "rounds": 1, "learning_rate": 0.01},
        ],
    )
    start, trainer = to_arrays(build_model(plan, 0)), Trainer(plan, make_site(), SEEDED)
    head, _ = trainer.train(start, make_order(plan, round=1))
    assert set(head) == {"fc.weight", "fc.bias"}
    assert not np.array_equal(head["fc.weight"], start["fc.weight"])
    whole, _ = trainer.train({**start, **head}, make_order(plan, round=2))
    assert set(whole) == set(start)


def test_cached_features_count_towards_the_caches_bound(
    make_plan: Make, make_site: Make, make_order: Make, tmp_path: Path
) -> None:
    plan = make_plan(
        training={"rounds": None, "learning_rate": None},
        stages=[{"name": "head", "rounds": 1, "learning_rate": 0.05, "train": ["fc.*"]}],
    )
    site, updates = make_site(), []
    (tmp_path / "features-0123.npy").write_bytes(bytes(100))  # of an earlier release

    def train(seed: int, most: int) -> None:
        runtime = replace(SEEDED, cache=tmp_path, cache_bytes=most)
        start = to_arrays(build_model(plan, seed))
        updates.append(Trainer(plan, site, runtime).train(start, make_order(plan))[0])

    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    train(0, 1 << 30)
    one = size()
    assert not list(tmp_path.glob("features-*"))
    for seed in range(1, 5):  # as many other frozen backbones
        train(seed, 2 * one + 4096)
        assert size() <= 2 * one + 4096
    assert len(list(tmp_path.glob("*/features.npy"))) == 2
    # Without room for a single one nothing is kept, nothing else is removed, and training goes on.
    train(0, 1000)
    assert len(list(tmp_path.glob("*/features.npy"))) == 2
    for name, value in updates[0].items():
        np.testing.assert_array_equal(updates[-1][name], value)


def test_cached_features_give_the_same_update_as_the_whole_model(
    make_plan: Make,
    make_site: Make,
    make_order: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    plan = make_plan(
        training={"rounds": None, "learning_rate": None},
        stages=[{"name": "head", "rounds": 1, "learning_rate": 0.05, "train": ["fc.*"]}],
    )
    start, site = to_arrays(build_model(plan, 0)), make_site()
    runtime = replace(SEEDED, cache=tmp_path)
    cached, _ = Trainer(plan, site, runtime).train(start, make_order(plan))
    assert len(list(tmp_path.glob("*/features.npy"))) == 1
    reread, _ = Trainer(plan, site, runtime).train(start, make_order(plan))
    monkeypatch.setattr(
        "fedward_client.training.trainer.split_at_trainable", lambda model, names: (None, model)
    )
    whole, _ = Trainer(plan, site, SEEDED).train(start, make_order(plan))
    assert equal(cached, reread)
    for name, value in whole.items():
        np.testing.assert_allclose(cached[name], value, rtol=1e-5, atol=1e-6)


def test_fedprox_term_is_the_gradient_of_half_mu_times_the_squared_distance(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    """Two plain SGD steps, against the same two steps written out with the loss term in it."""
    plan = make_plan(
        training={
            "rounds": 1,
            "local_epochs": None,
            "local_steps": 3,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "schedule": "constant",
            "batch_size": 24,
        },
        strategy={"name": "fedprox", "settings": {"mu": 2.5}},
    )
    site, start, mu = make_site(), to_arrays(build_model(plan, 0)), 2.5
    ours, _ = Trainer(plan, site, SEEDED).train(start, make_order(plan))
    plain = plan.model_copy(update={"strategy": Strategy()})
    without, _ = Trainer(plain, site, SEEDED).train(start, make_order(plain))
    assert not equal(ours, without)
    model = build_model(plan, 0)
    origin = [p.detach().clone() for p in model.parameters()]
    order = Draws.make(SEEDED, 0, site.name, 1).order.permutation(site.split["train"])
    for _ in range(3):
        logits = model(torch.from_numpy(site.images[np.sort(order)]))
        targets = torch.from_numpy(site.targets[np.sort(order)])
        loss = torch.nn.functional.cross_entropy(logits, targets)
        distance = sum(
            ((p - o) ** 2).sum() for p, o in zip(model.parameters(), origin, strict=True)
        )
        gradients = torch.autograd.grad(loss + mu / 2 * distance, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for name, value in to_arrays(model).items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-5)


def test_private_outcome_states_what_was_spent(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(privacy=PRIVATE, training={"rounds": 3})
    trainer = Trainer(plan, make_site(), SEEDED)
    start = to_arrays(build_model(plan, 0))
    spent = [trainer.train(start, make_order(plan, round=r))[1] for r in (1, 2, 3)]
    assert spent[0].epsilon < spent[1].epsilon < spent[2].epsilon <= 8.0
    assert spent[2].epsilon > 7.8
    last = spent[2]
    total = epsilon_spent(last.noise_multiplier, last.sampling_rate, 3 * last.steps, 1e-3)
    assert last.epsilon == pytest.approx(total)
    assert last.sampling_rate == pytest.approx(8 / 24)


def test_a_private_update_differs_from_the_plain_one_and_small_chunks_change_nothing(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(privacy={**PRIVATE, "sampling_rate": 0.9, "images_per_patient": 3})
    site, start = make_site(images_per_patient=4), to_arrays(build_model(plan, 0))
    large, _ = Trainer(plan, site, SEEDED).train(start, make_order(plan))
    small, _ = Trainer(plan, site, replace(SEEDED, physical_batch=8)).train(start, make_order(plan))
    for name, value in large.items():
        np.testing.assert_allclose(small[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "bookkeeping"])
def test_each_mode_gives_the_same_private_update(
    make_plan: Make, make_site: Make, make_order: Make, mode: Any
) -> None:
    plan = make_plan(privacy=PRIVATE)
    start = to_arrays(build_model(plan, 0))
    usual, _ = Trainer(plan, make_site(), replace(SEEDED, grad_sample_mode="hooks")).train(
        start, make_order(plan)
    )
    ours, _ = Trainer(plan, make_site(), replace(SEEDED, grad_sample_mode=mode)).train(
        start, make_order(plan)
    )
    for name, value in usual.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["vit", "unetr"])
def test_a_transformer_trains_privately_without_being_told_how(
    make_site: Make, make_order: Make, name: str
) -> None:
    """Its layers are none that bookkeeping knows, so the trainer goes by functorch."""
    given, site = sections(name, side=16, **least(name)), make_site()
    given["training"]["optimizer"] = "sgd"
    if name == "unetr":
        given["task"]["classes"] = ["bright"]
        site = replace(site, targets=(site.images[:, 0] > 1).astype(np.int64))
    plan = plan_from(given)
    start = to_arrays(build_model(plan, 0))
    trained, outcome = Trainer(plan, site, SEEDED).train(start, make_order(plan))
    assert outcome.noise_multiplier is None and outcome.loss is not None
    assert any((trained[key] != start[key]).any() for key in start)
    plan = plan_from({**given, "privacy": PRIVATE})
    trained, outcome = Trainer(plan, site, SEEDED).train(start, make_order(plan))
    assert outcome.noise_multiplier and outcome.loss is None
    assert all((trained[key] != start[key]).any() for key in start)
    hooks = replace(SEEDED, grad_sample_mode="hooks")
    by_hooks, _ = Trainer(plan, site, hooks).train(start, make_order(plan))
    for key, value in by_hooks.items():
        np.testing.assert_allclose(trained[key], value, rtol=2e-3, atol=2e-4)


def test_bad_arrays_and_missing_parts_are_clear_errors(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan()
    start, trainer = to_arrays(build_model(plan, 0)), Trainer(plan, make_site(), SEEDED)
    with pytest.raises(ModelError, match=r"fc\.bias"):
        trainer.train({k: v for k, v in start.items() if k != "fc.bias"}, make_order(plan))
    site = make_site()
    empty = replace(site, split={**site.split, "test": np.empty(0, np.int64)})
    with pytest.raises(DataError, match="test patients"):
        Trainer(plan, empty, SEEDED).evaluate(start, make_order(plan, round=0, part="test"))


def test_learning_rate_follows_each_stage(make_plan: Make) -> None:
    plan = make_plan(
        training={"rounds": None, "learning_rate": None},
        stages=[
            {"name": "a", "rounds": 2, "learning_rate": 1.0},
            {"name": "b", "rounds": 4, "learning_rate": 0.5},
        ],
    )
    assert rate_at(plan, 1, 0.0) == pytest.approx(1.0)
    assert rate_at(plan, 2, 0.0) == pytest.approx(0.505)
    assert rate_at(plan, 3, 0.0) == pytest.approx(0.5)
    assert rate_at(plan, 6, 1.0) == pytest.approx(0.005)
