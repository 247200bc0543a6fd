"""What a site sends compressed, and what it keeps of it from round to round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.compression import COMPRESSED, RESIDUAL, compress, compress_model, decompress
from fedward.errors import EgressError, PolicyError, ProtocolError
from fedward.models import build_model, to_arrays
from fedward.plan import Plan, plan_hash
from fedward_client.egress.gate import Gate, expected_arrays
from fedward_client.policy.decide import DatasetFacts
from fedward_client.policy.settings import Limits
from fedward_client.site_state import SiteStates
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

Make = Callable[..., Any]
SEEDED = Runtime(randomness="seeded")
TOPK = {"method": "top-k", "share": 0.05}
INT4 = {"method": "int4", "rounding": "stochastic"}
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}


def arrived(plan: Plan, sent: dict[str, Any], round_: int = 1) -> dict[str, Any]:
    """The differences that the aggregator reads out of an update."""
    how = plan.compression_of(round_)
    assert how is not None
    shapes = {name: shape for name, (shape, _) in expected_arrays(plan, round_).items()}
    return decompress(how, sent, shapes)


def left_of(trainer: Trainer, round_: int) -> dict[str, Any]:
    kept = trainer.state.before(round_ + 1)
    return {n.removeprefix(f"{RESIDUAL}/"): v for n, v in kept.items() if n.startswith(RESIDUAL)}


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize("compression", [TOPK, INT4], ids=["top-k", "int4"])
def test_what_is_sent_and_what_is_kept_are_together_the_update(
    make_plan: Make,
    make_site: Make,
    make_order: Make,
    compression: dict[str, Any],
    privacy: dict[str, Any],
) -> None:
    """With privacy, the noised one: nothing else goes into the bytes or into what is kept."""
    plain, plan = (make_plan(privacy=privacy, compression=one) for one in (None, compression))
    model = to_arrays(build_model(plan, 0))
    update, cost = Trainer(plain, make_site(), SEEDED).train(model, make_order(plain))
    trainer = Trainer(plan, make_site(), SEEDED)
    sent, outcome = trainer.train(model, make_order(plan))
    assert list(sent) == [COMPRESSED]
    (outcome, cost) = (
        one.model_copy(update={"seconds": 0.0, "cpu_seconds": 0.0}) for one in (outcome, cost)
    )
    assert outcome == cost
    found, left = arrived(plan, sent), left_of(trainer, 1)
    for name, value in update.items():
        np.testing.assert_allclose(found[name] + left[name], value - model[name], atol=1e-6)
    assert any(value.any() for value in left.values())
    # The next round sends what is left as well: from the same start it is another update.
    again, _ = trainer.train(model, make_order(plan, round=2))
    other, _ = Trainer(plan, make_site(), SEEDED).train(model, make_order(plan, round=2))
    assert again[COMPRESSED].tobytes() != other[COMPRESSED].tobytes()


@pytest.mark.parametrize("compression", [TOPK, INT4], ids=["top-k", "int4"])
def test_a_round_that_is_asked_again_after_a_crash_sends_the_same_bytes(
    make_plan: Make, make_site: Make, make_order: Make, tmp_path: Path, compression: dict[str, Any]
) -> None:
    plan, site = make_plan(training={"rounds": 4}, compression=compression), make_site()

    def fresh() -> Trainer:
        return Trainer(plan, site, SEEDED, SiteStates(tmp_path).of("s", plan_hash(plan), "c"))

    model, trainer = to_arrays(build_model(plan, 0)), fresh()
    made = [trainer.train(model, make_order(plan, round=r))[0] for r in (1, 2, 3)]
    kept = left_of(trainer, 3)
    for round_ in (3, 2, 3):
        again, _ = fresh().train(model, make_order(plan, round=round_))
        assert again[COMPRESSED].tobytes() == made[round_ - 1][COMPRESSED].tobytes()
    # Twice asked, once applied.
    for name, value in left_of(fresh(), 3).items():
        np.testing.assert_array_equal(value, kept[name])
    states = SiteStates(tmp_path)
    states.forget("s")
    assert not states.of("s", plan_hash(plan), "c").to_arrays().keys() - {"first"}


@pytest.mark.parametrize("randomness", ["seeded", "system"])
def test_chance_of_rounding_follows_no_order_at_a_hospital(
    make_plan: Make, make_site: Make, make_order: Make, monkeypatch: Any, randomness: Any
) -> None:
    plan, states = make_plan(privacy=PRIVATE, compression=INT4), []

    def heard(*given: Any) -> Any:
        states.append(given[-1].bit_generator.state["state"])
        return compress(*given)

    monkeypatch.setattr("fedward_client.training.trainer.compress", heard)
    for _ in range(2):
        trainer = Trainer(plan, make_site(), Runtime(randomness=randomness))
        trainer.train(to_arrays(build_model(plan, 0)), make_order(plan, seed=7))
    assert (states[0] == states[1]) == (randomness == "seeded")


def test_a_stage_takes_over_what_is_left_of_its_own_arrays_alone(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    stages = [
        {"name": "end", "rounds": 1, "learning_rate": 0.1, "train": ["fc.*"]},
        {"name": "all", "rounds": 1, "learning_rate": 0.1},
    ]
    training = {"rounds": None, "learning_rate": None}
    plan = make_plan(training=training, stages=stages, compression={"method": "int4"})
    model, trainer = to_arrays(build_model(plan, 0)), Trainer(plan, make_site(), SEEDED)
    first, _ = trainer.train(model, make_order(plan))
    assert set(arrived(plan, first)) == set(left_of(trainer, 1)) == {"fc.weight", "fc.bias"}
    second, _ = trainer.train(model, make_order(plan, round=2))
    assert list(arrived(plan, second, 2)) == list(model) == list(left_of(trainer, 2))


def test_arrays_that_stay_at_the_site_are_not_in_the_bytes(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(personal={"method": "fedper"}, compression={"method": "int8"})
    model, trainer = to_arrays(build_model(plan, 0)), Trainer(plan, make_site(), SEEDED)
    sent, _ = trainer.train(model, make_order(plan))
    found = arrived(plan, sent)
    assert not any(name.startswith("fc.") for name in found)
    kept = trainer.state.before(2)
    assert {"own/fc.bias", *(f"{RESIDUAL}/{name}" for name in found)} <= kept.keys()


def test_the_gate_looks_at_the_numbers_that_the_bytes_stand_for(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(compression={"method": "int8"})
    model = to_arrays(build_model(plan, 0))
    sent, outcome = Trainer(plan, make_site(), SEEDED).train(model, make_order(plan))
    expected = expected_arrays(plan, 1)
    facts = DatasetFacts(patients=40, images=40, per_class={})
    mib = sum(value.nbytes for value in model.values()) / 2**20

    def check(arrays: dict[str, Any], most: float = 64.0) -> None:
        limits = Limits(minimum_count=1)
        gate = Gate(plan, limits, site="site-1", facts=facts, max_upload_mib=most)
        gate.check_update(arrays, expected, outcome, 1)

    check(sent, 1.01 * mib)
    # A quarter of the bytes travels; the policy's limit is on what they stand for.
    with pytest.raises(PolicyError, match="must not be larger than the site allows"):
        check(sent, 0.99 * mib)
    content = sent[COMPRESSED]
    overflow = np.concatenate([np.full(1, 3e38, "<f4").view(np.uint8), content[4:]])
    for bad, rule in (
        ({}, "compressed as its plan says"),
        ({COMPRESSED: content[1:]}, "compressed as its plan says"),
        ({COMPRESSED: content, "images": content}, "compressed as its plan says"),
        (dict(model.items()), "compressed as its plan says"),
        ({COMPRESSED: overflow}, "must be finite"),
        ({COMPRESSED: content.view(np.int8)}, "compressed as its plan says"),
    ):
        with pytest.raises(EgressError, match=rule):
            check(bad)


def test_a_site_takes_the_model_only_as_its_plan_has_it_travel(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(compression={"method": "int8", "download": "int6"})
    model, how = to_arrays(build_model(plan, 0)), plan.compression
    assert how is not None
    right = compress_model(how, model)
    trainer = Trainer(plan, make_site(), SEEDED)
    sent, _ = trainer.train(right, make_order(plan))
    assert set(arrived(plan, sent)) == set(model)
    head = right[COMPRESSED].copy()
    head[:4] = np.array([np.nan], "<f4").view(np.uint8)
    for wrong in (
        model,
        {},
        {COMPRESSED: right[COMPRESSED][:-1]},
        {COMPRESSED: np.zeros(10**6, np.uint8)},
        {COMPRESSED: head},
    ):
        with pytest.raises(ProtocolError, match="a model must be compressed as its plan says"):
            trainer.train(wrong, make_order(plan))
