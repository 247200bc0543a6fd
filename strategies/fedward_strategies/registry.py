"""From a strategy's entry to the object that combines updates (see :mod:`fedward.strategies`)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from flwr.serverapp.strategy import Strategy

from fedward.errors import PlanError
from fedward.strategies import STRATEGIES
from fedward_strategies.rule import RuleStrategy
from fedward_strategies.settings import StrategySettings


def build_strategy(name: str, settings: StrategySettings) -> Strategy:
    """A fresh strategy, without memory of earlier rounds.

    Raises
    ------
    PlanError
        No strategy has this name.
    """
    spec = STRATEGIES.get(name)
    if spec is None:
        raise PlanError(
            "the strategy must be known",
            value=name,
            fix=f"Choose from {', '.join(STRATEGIES)}",
            where="strategy.name",
        )
    if not isinstance(spec.server, str):
        rule = spec.server(spec.given(settings.values), settings.momentum)
        return RuleStrategy(spec, rule, **settings.common())
    module, _, kind = spec.server.partition(":")
    build: Callable[..., Strategy] = getattr(import_module(module), kind)
    return build(**settings.common(), **settings.of(spec))
