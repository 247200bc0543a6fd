"""The client application: it answers orders, and refuses everything else without details."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan import Plan, plan_from, plan_hash
from fedward.plan.schema import Strategy
from fedward.protocol import EvaluateOutcome, Refusal, RoundOrder, SiteFacts, TrainOutcome
from fedward.rule_codes import RuleCode
from fedward.tasks.registry import counts_from_arrays
from fedward_client.app import client_app
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]
PLANTED = "/data/ward-7/DOE^JANE.dcm"


class BrokenSites(SimulatedSites):
    """Sites whose data cannot be opened."""

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        """Fail, quoting a file."""
        raise FileNotFoundError(2, "No such file", PLANTED)


@pytest.fixture
def plan(make_plan: Make) -> Plan:
    made: Plan = make_plan(strategy={"name": "fedprox", "settings": {"mu": 0.5}})
    return made


@pytest.fixture
def ask(plan: Plan, make_site: Make, make_order: Make) -> Callable[..., RecordDict]:
    """Sends one message to a site and gives the content of its reply."""
    identity.become_server()
    usual = SimulatedSites([make_site()], Runtime(randomness="seeded"))

    def send(
        kind: str,
        config: Mapping[str, Any] | None = None,
        sites: SimulatedSites = usual,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        **order: Any,
    ) -> RecordDict:
        made: RoundOrder = make_order(plan, **order)
        model = to_arrays(build_model(plan, 0)) if arrays is None else arrays
        content: dict[str, Any] = {
            "arrays": ArrayRecord({name: Array(value) for name, value in model.items()}),
            "config": ConfigRecord(dict(config) if config is not None else made.to_flat()),  # type: ignore[arg-type]
        }
        node = {"partition-id": 0, "num-partitions": 1}
        message = Message(RecordDict(content), 7, kind)
        identity.stamp(message)
        reply = client_app(sites)(message, Context(1, 7, node, RecordDict(), {}))  # type: ignore[arg-type]
        assert reply.has_content()
        return reply.content

    return send


def refused(content: RecordDict) -> Refusal:
    assert list(content) == ["refusal"]
    return Refusal.from_flat(dict(content.config_records["refusal"]))


def test_it_describes_trains_and_evaluates(ask: Callable[..., RecordDict], plan: Plan) -> None:
    facts = SiteFacts.from_flat(dict(ask("query", round=0).config_records["facts"]))
    assert (facts.site, facts.patients, facts.train_patients) == ("site-1", 40, 24)
    trained = ask("train")
    outcome = TrainOutcome.from_flat(dict(trained.config_records["outcome"]))
    assert (outcome.round, outcome.images, outcome.steps) == (1, 24, 3)
    assert list(trained.array_records["arrays"]) == list(to_arrays(build_model(plan, 0)))
    assert dict(trained.metric_records["metrics"]) == {"num-examples": 24.0}
    measured = ask("evaluate", round=0, part="test")
    told = EvaluateOutcome.from_flat(dict(measured.config_records["outcome"]))
    assert (told.part, told.images) == ("test", 8)
    counts = {name: array.numpy() for name, array in measured.array_records["counts"].items()}
    assert counts_from_arrays(plan.task, counts).to_arrays()["loss"][1] == 8


def test_the_proximal_weight_is_that_of_the_plan(
    ask: Callable[..., RecordDict], plan: Plan, make_order: Make
) -> None:
    # The term is zero in the first step, so an order of several steps is what shows it.
    settings = Strategy(name="fedprox", settings={"mu": 50.0})
    prox = make_order(plan.model_copy(update={"strategy": settings})).to_flat()
    plain = ask("train", {**make_order(plan).to_flat(), "server-round": 1, "proximal-mu": 50.0})
    held = ask("train", {**prox, "server-round": 1, "proximal-mu": 0.0})
    start = to_arrays(build_model(plan, 0))

    def distance(content: RecordDict) -> float:
        arrays = {name: array.numpy() for name, array in content.array_records["arrays"].items()}
        return float(sum(((arrays[name] - start[name]) ** 2).sum() for name in start))

    assert distance(held) < distance(plain)


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"plan_hash": "0" * 64},
        {"plan_hash": "short"},
        {"round": -1},
        {"version": 2},
        {"part": "everything"},
        {"seed": "0"},
        {"plan": "{}"},
        {"round": 1.5},
    ],
)
def test_an_order_that_is_not_valid_is_refused(
    ask: Callable[..., RecordDict], plan: Plan, make_order: Make, kind: str, change: dict[str, Any]
) -> None:
    refusal = refused(ask(kind, {**make_order(plan).to_flat(), **change}))
    assert refusal.site == "site-1"
    assert "RoundOrder" in refusal.rule


def test_a_plan_that_breaks_a_rule_is_refused_by_rule(
    ask: Callable[..., RecordDict], plan: Plan, make_order: Make
) -> None:
    import hashlib

    text = make_order(plan).plan.replace('"cnn"', '"cnm"')
    digest = hashlib.sha256(text.encode()).hexdigest()
    flat = {**make_order(plan).to_flat(), "plan": text, "plan_hash": digest}
    assert refused(ask("train", flat)).value.startswith("model.name")
    assert digest != plan_hash(plan)


def test_arrays_of_another_model_are_refused(ask: Callable[..., RecordDict]) -> None:
    refusal = refused(ask("train", arrays={"fc.weight": np.zeros((2, 2), np.float32)}))
    assert "cover the whole model" in refusal.rule
    assert refusal.value.endswith(" missing")


def test_a_refusal_tells_the_value_and_not_only_the_key(
    ask: Callable[..., RecordDict], plan: Plan, make_order: Make
) -> None:
    privacy = {
        "mechanism": "dp-sgd",
        "epsilon": 1e-12,
        "delta": 1e-3,
        "clipping_norm": 1.0,
        "sampling_rate": 0.5,
    }
    private = plan_from({**plan.model_dump(mode="python"), "privacy": privacy})
    refusal = refused(ask("train", make_order(private).to_flat()))
    assert refusal.value.startswith("privacy: epsilon 1e-12, delta 0.001")


def test_a_round_that_the_plan_has_not_is_refused(ask: Callable[..., RecordDict]) -> None:
    refusal = refused(ask("train", round=3))
    # No round that the plan does not have leaves a site, but as the value of the rule.
    assert (refusal.code, refusal.round, refusal.values["round"]) == (RuleCode.ROUNDS, 0, 3)


def test_an_unexpected_error_goes_back_without_details(
    ask: Callable[..., RecordDict], make_site: Make
) -> None:
    for kind in ("query", "train", "evaluate"):
        content = ask(kind, sites=BrokenSites([make_site()], Runtime()))
        refusal = refused(content)
        assert refusal.rule == "an unexpected error stopped the site"
        assert refusal.value == "FileNotFoundError"
        for word in ("ward-7", "DOE", "No such file", "Traceback"):
            assert word not in repr(content)


def test_a_message_without_an_order_is_refused(
    make_site: Make, ask: Callable[..., RecordDict]
) -> None:
    app = client_app(SimulatedSites([make_site()], Runtime()))
    message = Message(RecordDict({}), 7, "train")
    identity.stamp(message)
    reply = app(message, Context(1, 7, {"partition-id": 0}, RecordDict(), {}))
    assert "must carry an order" in refused(reply.content).rule
