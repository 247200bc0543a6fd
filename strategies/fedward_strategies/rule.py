"""A server rule as one of Flower's strategies (see :class:`fedward.strategies.ServerRule`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fedward.strategies import Contribution, ServerRound, ServerRule, StrategySpec

Arrays = dict[str, NDArray[Any]]


class RuleStrategy(FedAvg):
    """Asks as FedAvg does, and combines as the rule says.

    Parameters
    ----------
    spec : StrategySpec
        The strategy's entry.
    rule : ServerRule
        Its rule.
    **common
        Arguments of FedAvg.

    Attributes
    ----------
    contributions, sites
        Of the round that is combined next, as in :class:`~fedward.strategies.ServerRound`.
    """

    def __init__(self, spec: StrategySpec, rule: ServerRule, **common: Any) -> None:
        super().__init__(**common)
        self.spec, self.rule = spec, rule
        self.contributions: Sequence[Contribution] = ()
        self.sites = 0
        self._model: Arrays = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._model, _ = self._apart(arrays, self.spec.received)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        records = [next(iter(one.content.array_records.values())) for one in replies]
        if not records:
            return None, None
        apart = [self._apart(record, self.spec.sent) for record in records]
        combined = self.rule.combine(
            ServerRound(
                model=self._model,
                updates=[update for update, _ in apart],
                sent=apart[0][1],
                contributions=self.contributions,
                sites=self.sites,
            )
        )
        made = {name: np.asarray(combined[name]).astype(v.dtype) for name, v in self._model.items()}
        return ArrayRecord({name: Array(value) for name, value in made.items()}), None

    @staticmethod
    def _apart(record: ArrayRecord, kinds: Iterable[str]) -> tuple[Arrays, Mapping[str, Arrays]]:
        """The model's arrays, and those beside it by kind and name."""
        besides: dict[str, Arrays] = {kind: {} for kind in kinds}
        model: Arrays = {}
        for name, array in record.items():
            kind, _, of = name.partition("/")
            if of and kind in besides:
                besides[kind][of] = array.numpy()
            else:
                model[name] = array.numpy()
        return model, besides
