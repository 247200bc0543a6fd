"""A simulated hospital and a real one answer the same orders with the same replies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedward.flower import control_client, identity
from fedward.models import build_model, to_arrays
from fedward.plan.schema import Plan
from fedward.protocol import Refusal
from fedward.rule_codes import RuleCode
from fedward_client.link.messages import TrainerMessage
from fedward_client.training.runtime import Runtime
from fedward_simulation.site_service import load_policy
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]


def ask(sites: SimulatedSites, what: str, order: TrainerMessage) -> TrainerMessage:
    context = Context(1, 7, {"partition-id": 0}, RecordDict(), {})
    return sites.answer(context, what, order)


def same(one: TrainerMessage, other: TrainerMessage) -> None:
    """Equal, but for what was measured with a clock."""
    clocks = {"seconds", "cpu_seconds"}
    assert one.kind == other.kind
    told = [{k: v for k, v in each.record.items() if k not in clocks} for each in (one, other)]
    assert told[0] == told[1]
    assert list(one.arrays) == list(other.arrays)
    for name, value in one.arrays.items():
        np.testing.assert_array_equal(other.arrays[name], value)


@pytest.mark.integration
def test_a_simulated_hospital_answers_as_a_real_one(make_hospital: Make, plan: Plan) -> None:
    policy = 'counts = "minimum-cells"\ncount_noise = 0.0\nminimum_count = 3\nrounding = 2'
    hospital = make_hospital("", policy)
    real = hospital.desk
    kinds = []
    first = hospital.order(plan, 0, task="describe")
    replies = {"describe": real.answer("describe", first)}
    prepared = hospital.trainers.get(real._contexts.of("tiny-1", plan)).site
    runtime = Runtime(randomness="seeded", seeded_counts=True)
    simulated = SimulatedSites([prepared], runtime, load_policy(hospital.folder / "site.toml"))
    same(replies["describe"], ask(simulated, "describe", first))
    for what, round_, more in (
        ("train", 1, {}),
        ("evaluate", 1, {}),
        ("train", 2, {}),
        ("train", 7, {}),
        ("evaluate", 0, {"part": "test"}),
        ("evaluate", 1, {"part": "test"}),
        ("evaluate", 1, {"model": 1}),
    ):
        order = hospital.order(plan, round_, task=what, **more)
        made = real.answer(what, order)
        kinds.append(made.kind)
        same(made, ask(simulated, what, order))
    # The plan has two rounds; one evaluation is none of its own, one is of a second model.
    assert kinds == ["update", "counts", "update", "refusal", "counts", "refusal", "refusal"]


@pytest.mark.integration
def test_they_refuse_alike_what_a_policy_forbids(
    make_hospital: Make, plan: Plan, private_plan: Plan
) -> None:
    hospital = make_hospital("", "max_epsilon_per_study = 3.0\nminimum_per_class = 9")
    prepared = hospital.trainers.get(hospital.desk._contexts.of("tiny-1", plan)).site
    policy = load_policy(hospital.folder / "site.toml")
    simulated = SimulatedSites([prepared], Runtime(randomness="seeded"), policy)
    named = plan.study.model_copy(update={"name": "large"})
    unserved = plan.model_copy(update={"study": named})
    for study, asked in (("tiny-9", private_plan), ("other", unserved)):
        order = hospital.order(asked, 0, study=study, task="describe")
        made = hospital.desk.answer("describe", order)
        assert made.kind == "refusal"
        same(made, ask(simulated, "describe", order))
    few = SimulatedSites([prepared], Runtime(), policy.model_copy(update={"minimum_patients": 99}))
    refusal = Refusal.from_flat(ask(few, "describe", hospital.order(plan, 0)).record)
    assert (refusal.kind, refusal.code) == ("policy", RuleCode.PATIENTS)


def test_a_private_round_is_charged_and_answered_once(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(
        privacy={"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0},
        training={"batch_size": 6},
    )
    tired: list[int] = []

    def watch(step: int, steps: int) -> None:
        if tired:
            raise RuntimeError

    sites = SimulatedSites([make_site()], replace(Runtime(randomness="seeded"), watch=watch))
    model = to_arrays(build_model(plan, 0))

    def order(round_: int) -> TrainerMessage:
        return TrainerMessage("order", dict(make_order(plan, round_).to_flat()), model)

    first = ask(sites, "train", order(1))
    assert first.kind == "update"
    same(first, ask(sites, "train", order(1)))
    tired.append(1)
    lost = Refusal.from_flat(ask(sites, "train", order(2)).record)
    assert (lost.code, lost.charged) == (RuleCode.UNEXPECTED, None)
    tired.clear()
    again = Refusal.from_flat(ask(sites, "train", order(2)).record)
    assert (again.kind, again.code, again.charged) == ("budget", RuleCode.CHARGE_SPENT, None)
    past = Refusal.from_flat(ask(sites, "train", order(9)).record)
    assert (past.code, past.charged) == (RuleCode.ROUNDS, False)


def test_the_bundle_names_applications_that_exist() -> None:
    identity.become_server()
    text = control_client._BUNDLE["pyproject.toml"].decode()
    found = {}
    for line in text.split("[tool.flwr.app.components]")[1].strip().splitlines():
        kind, _, name = line.partition(" = ")
        module, _, attribute = name.strip('"').partition(":")
        found[kind] = getattr(import_module(module), attribute)
    assert isinstance(found["serverapp"], ServerApp)
    assert isinstance(found["clientapp"], ClientApp)
    # It has no hospital of its own, and says so.
    message = Message(RecordDict({"config": ConfigRecord({"round": 1})}), 7, "train")
    identity.stamp(message)
    reply = found["clientapp"](message, Context(1, 7, {}, RecordDict(), {}))
    refusal = Refusal.from_flat(dict(reply.content.config_records["refusal"]))
    assert refusal.code is RuleCode.TRAINER_GONE
