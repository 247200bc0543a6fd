"""Strategies that take a step of their own with the mean update."""

from __future__ import annotations

from fedward.strategies.spec import Memory, Setting, StrategySpec

_ETA = "server learning rate"
_TAU = Setting("adaptivity: added to the root of the second moment", 1e-3, above_least=True)
_BETA_1 = Setting("decay of the first moment", 0.9, below=1.0)
_BETA_2 = Setting("decay of the second moment", 0.99, below=1.0)
_MOMENTS = {"first": Memory("m_t"), "second": Memory("v_t")}

SPECS = (
    StrategySpec(
        "fedavgm",
        "weighted mean with momentum at the server",
        "flwr.serverapp.strategy:FedAvgM",
        """\
The mean with momentum at the server ([Hsu et al., 2019](https://arxiv.org/abs/1909.06335)). For
skewed labels and few local steps. A momentum of 0 is `fedavg`, 0.9 is usual.""",
        settings={
            "server_learning_rate": Setting(_ETA, 1.0, above_least=True),
            "server_momentum": Setting("server momentum", 0.0, below=1.0),
        },
        server_optimizer=True,
        memory={"momentum": Memory("momentum_vector", as_list=True)},
    ),
    StrategySpec(
        "fedadam",
        "Adam at the server",
        "flwr.serverapp.strategy:FedAdam",
        """\
Adam at the server, on the mean update
([Reddi et al., 2021](https://arxiv.org/abs/2003.00295)). For layers of very different scale, and
for many rounds. Its `eta` needs tuning more than anything else here.""",
        settings={
            "eta": Setting(_ETA, 0.1, above_least=True),
            "beta_1": _BETA_1,
            "beta_2": _BETA_2,
            "tau": _TAU,
        },
        server_optimizer=True,
        memory=_MOMENTS,
    ),
    StrategySpec(
        "fedyogi",
        "Yogi at the server",
        "flwr.serverapp.strategy:FedYogi",
        """\
As `fedadam`, with a second moment that grows more slowly
([Reddi et al., 2021](https://arxiv.org/abs/2003.00295)). For the same cases when `fedadam` is
unsteady.""",
        settings={
            "eta": Setting(_ETA, 0.01, above_least=True),
            "beta_1": _BETA_1,
            "beta_2": _BETA_2,
            "tau": _TAU,
        },
        server_optimizer=True,
        memory=_MOMENTS,
    ),
    StrategySpec(
        "fedadagrad",
        "Adagrad at the server",
        "flwr.serverapp.strategy:FedAdagrad",
        """\
Adagrad at the server: steps only become smaller
([Reddi et al., 2021](https://arxiv.org/abs/2003.00295)). For sparse updates.""",
        settings={"eta": Setting(_ETA, 0.1, above_least=True), "tau": _TAU},
        server_optimizer=True,
        memory=_MOMENTS,
    ),
)
