"""A strategy that forgot and was reminded goes on as if it had not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedward.strategies import Contribution
from fedward_strategies.memory import memory_of, remember
from fedward_strategies.registry import STRATEGIES, build_strategy
from fedward_strategies.rule import RuleStrategy
from fedward_strategies.settings import StrategySettings

SETTINGS: dict[str, dict[str, float]] = {
    "fedavgm": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "fedadam": {"eta": 0.1, "tau": 1e-3, "beta_1": 0.9, "beta_2": 0.99},
    "fedyogi": {"eta": 0.1, "tau": 1e-3, "beta_1": 0.9, "beta_2": 0.99},
    "fedadagrad": {"eta": 0.1, "tau": 1e-3},
    "scaffold": {"server_learning_rate": 0.5},
    "feddyn": {"alpha": 0.1},
}
NAMES = ("w", "b")


class OneNode:
    """As much of a grid as a strategy asks for."""

    def get_node_ids(self) -> list[int]:
        return [7]


def record(arrays: dict[str, Any]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def turn(strategy: Any, round_: int, arrays: dict[str, Any], update: dict[str, Any]) -> Any:
    list(strategy.configure_train(round_, record(arrays), ConfigRecord(), OneNode()))
    if isinstance(strategy, RuleStrategy):
        strategy.contributions, strategy.sites = [Contribution(3.0, 2)], 1
        for kind in strategy.spec.sent:
            update = update | {f"{kind}/{name}": update[name] * round_ for name in NAMES}
    content = RecordDict({"arrays": record(update), "metrics": MetricRecord({"num-examples": 3.0})})
    reply = Message(content, dst_node_id=7, message_type="train")
    new, _ = strategy.aggregate_train(round_, [reply])
    return {name: array.numpy().astype(np.float32) for name, array in new.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_reminded_strategy_goes_on_bit_for_bit(name: str) -> None:
    from fedward.flower import identity

    identity.become_server()
    rng = np.random.default_rng(0)

    def draw() -> dict[str, Any]:
        return {n: rng.normal(size=(3, 2)).astype(np.float32) for n in NAMES}

    settings = StrategySettings(values=SETTINGS[name])
    arrays, updates = draw(), [draw() for _ in range(4)]
    whole = build_strategy(name, settings)
    broken = build_strategy(name, settings)
    straight, resumed = arrays, arrays
    for round_, update in enumerate(updates, 1):
        straight = turn(whole, round_, straight, update)
        memory = memory_of(broken, STRATEGIES[name], NAMES)
        assert bool(memory) == (round_ > 1)
        broken = build_strategy(name, settings)
        remember(broken, STRATEGIES[name], memory, NAMES)
        resumed = turn(broken, round_, resumed, update)
        for n in NAMES:
            np.testing.assert_array_equal(resumed[n], straight[n])


def test_which_need_every_update() -> None:
    apart = {name for name, spec in STRATEGIES.items() if spec.needs_all}
    classes = {"fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"}
    assert apart == classes | {"rfa", "norm-clipping"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_who_needs_all_updates_says_so(name: str) -> None:
    """Of the others the weighted mean of the updates is enough: it gives the same model."""
    from fedward.flower import identity

    identity.become_server()
    rng = np.random.default_rng(1)
    values = [rng.normal(size=(3, 2)).astype(np.float32) ** 3 for _ in range(7)]
    mean = np.mean(values, axis=0, dtype=np.float64).astype(np.float32)
    made = []
    if not isinstance(STRATEGIES[name].server, str):
        # Of a rule the aggregator makes the mean itself, with the rule's weights.
        assert STRATEGIES[name].needs_all == (name in ("rfa", "norm-clipping"))
        return
    for updates in (values, [mean]):
        strategy = _of(name)
        start = record({"w": np.zeros((3, 2), np.float32)})
        list(strategy.configure_train(1, start, ConfigRecord(), OneNode()))
        metrics = MetricRecord({"num-examples": 3.0})
        contents = [RecordDict({"arrays": record({"w": u}), "metrics": metrics}) for u in updates]
        replies = [Message(one, dst_node_id=7, message_type="train") for one in contents]
        arrays, _ = strategy.aggregate_train(1, replies)
        # Bulyan takes no round of one update.
        made.append(np.full((3, 2), np.nan) if arrays is None else arrays["w"].numpy())
    assert np.allclose(*made, rtol=1e-5, atol=1e-6) == (not STRATEGIES[name].needs_all)


def _of(name: str) -> Any:
    values = {**SETTINGS.get(name, {}), **({"mu": 0.1} if name == "fedprox" else {})}
    values |= {"beta": 0.2} if name == "fedtrimmedavg" else {}
    values |= {"malicious": 1} if name in ("krum", "multikrum", "bulyan") else {}
    values |= {"keep": 1} if name == "multikrum" else {}
    return build_strategy(name, StrategySettings(values=values))
