"""FedAvg."""

from fedward.strategies.spec import StrategySpec

SPECS = (
    StrategySpec(
        "fedavg",
        "weighted mean of the updates",
        "flwr.serverapp.strategy:FedAvg",
        """\
Weighted mean of the updates
([McMahan et al., 2017](https://arxiv.org/abs/1602.05629)). The default, and what all others are
measured against.""",
    ),
)
