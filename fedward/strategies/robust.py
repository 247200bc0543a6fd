"""Strategies that withstand malicious sites: they compare the updates of a round."""

from __future__ import annotations

from fedward.strategies.spec import Setting, StrategySpec

_MALICIOUS = Setting("sites that may send anything and must not matter", whole=True)

SPECS = (
    StrategySpec(
        "fedmedian",
        "median of each parameter",
        "flwr.serverapp.strategy:FedMedian",
        """\
The median of each parameter ([Yin et al., 2018](https://arxiv.org/abs/1803.01498)). Withstands
damaged updates from fewer than half of the sites. Each site has one vote, whatever its size.""",
        weighted=False,
        by_parameter=True,
        needs_all=True,
    ),
    StrategySpec(
        "fedtrimmedavg",
        "mean of each parameter without its extremes",
        "flwr.serverapp.strategy:FedTrimmedAvg",
        """\
The mean of each parameter without its largest and smallest values
([Yin et al., 2018](https://arxiv.org/abs/1803.01498)). Milder than the median. Each site has
one vote.""",
        settings={"beta": Setting("share cut off at either end of the values", 0.2, below=0.5)},
        weighted=False,
        by_parameter=True,
        needs_all=True,
    ),
    StrategySpec(
        "krum",
        "the one update that lies nearest to the others",
        "flwr.serverapp.strategy:Krum",
        """\
The one update that lies nearest to the others
([Blanchard et al., 2017](https://arxiv.org/abs/1703.02757)). All other hospitals' work of the round
is lost, so it is for research more than for medicine. With f malicious sites it needs 2 f + 3
updates.""",
        settings={"malicious": _MALICIOUS},
        arguments={"malicious": "num_malicious_nodes"},
        weighted=False,
        needs_all=True,
        updates_least=3,
        updates_per_malicious=2,
    ),
    StrategySpec(
        "multikrum",
        "mean of the updates that lie nearest to the others",
        "flwr.serverapp.strategy:MultiKrum",
        """\
The mean of the updates that lie nearest to the others
([Blanchard et al., 2017](https://arxiv.org/abs/1703.02757)). Needs 2 f + 3 updates; to keep the
number of sites minus f is usual.""",
        settings={
            "malicious": _MALICIOUS,
            "keep": Setting("updates that are kept and averaged", 1, least=1.0, whole=True),
        },
        arguments={"malicious": "num_malicious_nodes", "keep": "num_nodes_to_select"},
        needs_all=True,
        updates_least=3,
        updates_per_malicious=2,
    ),
    StrategySpec(
        "bulyan",
        "trimmed mean of the updates that Krum selects",
        "flwr.serverapp.strategy:Bulyan",
        """\
Selects as Krum does, then takes the trimmed mean of what was selected
([El Mhamdi et al., 2018](https://arxiv.org/abs/1802.07927)). The strongest guarantee, for the most
sites: it needs 4 f + 3 updates.""",
        settings={"malicious": _MALICIOUS},
        arguments={"malicious": "num_malicious_nodes"},
        weighted=False,
        by_parameter=True,
        needs_all=True,
        updates_least=3,
        updates_per_malicious=4,
    ),
)
