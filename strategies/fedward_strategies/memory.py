"""What a strategy remembers from round to round, as named arrays for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedward.strategies import ServerRule, StrategySpec
from fedward_strategies.rule import RuleStrategy

Arrays = dict[str, NDArray[Any]]


def memory_of(strategy: Strategy, spec: StrategySpec, names: Sequence[str]) -> Arrays:
    """Momentum, moments and the like as ``KIND/NAME``; empty before the first round.

    Parameters
    ----------
    strategy : Strategy
        One that :func:`fedward_strategies.registry.build_strategy` made.
    spec : StrategySpec
        Its entry.
    names : sequence of str
        Names of the arrays that train, in their order.
    """
    found: Arrays = {}
    for kind, (attribute, as_list) in spec.memory.items():
        held = getattr(_holder(strategy), attribute)
        if held is not None:
            by_name = dict(zip(names, held, strict=True)) if as_list else held
            found |= {f"{kind}/{name}": value for name, value in by_name.items()}
    return found


def remember(
    strategy: Strategy,
    spec: StrategySpec,
    memory: Mapping[str, NDArray[Any]],
    names: Sequence[str],
) -> None:
    """Give a fresh strategy the memory of an earlier one."""
    for kind, (attribute, as_list) in spec.memory.items():
        held = {name: memory[f"{kind}/{name}"] for name in names if f"{kind}/{name}" in memory}
        if held:
            setattr(_holder(strategy), attribute, list(held.values()) if as_list else held)


def _holder(strategy: Strategy) -> Strategy | ServerRule:
    return strategy.rule if isinstance(strategy, RuleStrategy) else strategy
