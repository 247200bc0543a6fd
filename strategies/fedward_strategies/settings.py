"""What a strategy needs to know of a study, in one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedward.strategies import StrategySpec


@dataclass(frozen=True)
class StrategySettings:
    """Settings common to all strategies, and those of the one chosen.

    Attributes
    ----------
    values : mapping
        The plan's ``[strategy.settings]``.
    weight_key : str
        Metric of a reply that weighs its update.
    momentum : float
        Of the sites' optimiser.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    weight_key: str = "num-examples"
    momentum: float = 0.0

    def common(self) -> dict[str, Any]:
        """Arguments that each of Flower's strategies takes.

        A study names its sites itself and waits for them itself: every node that the grid shows
        takes part, and Flower never waits for more.
        """
        return {
            "fraction_train": 1.0,
            "fraction_evaluate": 0.0,
            "min_train_nodes": 1,
            "min_evaluate_nodes": 0,
            "min_available_nodes": 1,
            "weighted_by_key": self.weight_key,
        }

    def of(self, spec: StrategySpec) -> dict[str, float | int]:
        """The settings that are given, under the argument names of the strategy's class."""
        given = {key: value for key, value in self.values.items() if key in spec.settings}
        return {spec.arguments.get(key, key): v for key, v in spec.normal(given).items()}
