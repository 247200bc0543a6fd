"""The strategies by name: Flower's own, with the study's settings.

fedavg (McMahan et al., 2017, arXiv:1602.05629), fedprox (Li et al., 2020, arXiv:1812.06127),
fedavgm (Hsu et al., 2019, arXiv:1909.06335), fedadam, fedyogi, fedadagrad (Reddi et al., 2021,
arXiv:2003.00295), fedmedian and fedtrimmedavg (Yin et al., 2018, arXiv:1803.01498), krum and
multikrum (Blanchard et al., 2017, arXiv:1703.02757), bulyan (El Mhamdi et al., 2018,
arXiv:1802.07927).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)

from fedward.errors import PlanError
from fedward_strategies.settings import StrategySettings

Builder = Callable[[StrategySettings], Strategy]


def _built(kind: Callable[..., Strategy], **names: str) -> Builder:
    def build(settings: StrategySettings) -> Strategy:
        arguments: dict[str, Any] = {**settings.common(), **settings.of(**names)}
        for key in ("num_malicious_nodes", "num_nodes_to_select"):
            if key in arguments:
                arguments[key] = int(arguments[key])
        return kind(**arguments)

    return build


_ADAPTIVE = {"eta": "eta", "tau": "tau"}
_MOMENTS = {**_ADAPTIVE, "beta_1": "beta_1", "beta_2": "beta_2"}

STRATEGIES: dict[str, Builder] = {
    "fedavg": _built(FedAvg),
    "fedprox": _built(FedProx, mu="proximal_mu"),
    "fedavgm": _built(
        FedAvgM, server_learning_rate="server_learning_rate", server_momentum="server_momentum"
    ),
    "fedadam": _built(FedAdam, **_MOMENTS),
    "fedyogi": _built(FedYogi, **_MOMENTS),
    "fedadagrad": _built(FedAdagrad, **_ADAPTIVE),
    "fedmedian": _built(FedMedian),
    "fedtrimmedavg": _built(FedTrimmedAvg, beta="beta"),
    "krum": _built(Krum, malicious="num_malicious_nodes"),
    "multikrum": _built(MultiKrum, malicious="num_malicious_nodes", keep="num_nodes_to_select"),
    "bulyan": _built(Bulyan, malicious="num_malicious_nodes"),
}


def build_strategy(name: str, settings: StrategySettings) -> Strategy:
    """A fresh strategy, without memory of earlier rounds.

    Raises
    ------
    PlanError
        No strategy has this name.
    """
    if name not in STRATEGIES:
        raise PlanError(
            "the strategy must be known",
            value=name,
            fix=f"Choose from {', '.join(STRATEGIES)}",
            where="strategy.name",
        )
    return STRATEGIES[name](settings)
