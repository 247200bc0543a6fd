"""What a strategy remembers from round to round, as named arrays for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from flwr.serverapp.strategy import FedAvg, FedAvgM, FedMedian, FedProx, Strategy
from flwr.serverapp.strategy.fedopt import FedOpt
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
_MOMENTS: Final = {"first": "m_t", "second": "v_t"}


def folds(strategy: Strategy) -> bool:
    """Whether a strategy needs only the weighted mean of the updates, not each of them."""
    return isinstance(strategy, FedAvgM | FedProx | FedOpt) or (
        type(strategy) is FedAvg and not isinstance(strategy, FedMedian)
    )


def memory_of(strategy: Strategy, names: Sequence[str]) -> Arrays:
    """Momentum and moments as ``KIND/NAME``; empty before the first round, and for most.

    Parameters
    ----------
    strategy : Strategy
        One that :func:`fedward_strategies.registry.build_strategy` made.
    names : sequence of str
        Names of the arrays that train, in their order.
    """
    found: Arrays = {}
    if isinstance(strategy, FedAvgM) and strategy.momentum_vector is not None:
        vectors = zip(names, strategy.momentum_vector, strict=True)
        found |= {f"momentum/{name}": value for name, value in vectors}
    if isinstance(strategy, FedOpt):
        for kind, attribute in _MOMENTS.items():
            moments = getattr(strategy, attribute) or {}
            found |= {f"{kind}/{name}": value for name, value in moments.items()}
    return found


def remember(strategy: Strategy, memory: Mapping[str, NDArray[Any]], names: Sequence[str]) -> None:
    """Give a fresh strategy the memory of an earlier one."""

    def of(kind: str) -> Arrays:
        return {name: memory[f"{kind}/{name}"] for name in names if f"{kind}/{name}" in memory}

    if isinstance(strategy, FedAvgM) and (vectors := of("momentum")):
        strategy.momentum_vector = list(vectors.values())
    if isinstance(strategy, FedOpt):
        for kind, attribute in _MOMENTS.items():
            if moments := of(kind):
                setattr(strategy, attribute, moments)
