r"""Norm clipping: no update moves the model further than the median one (Sun et al., 2019).

arXiv:1911.07963, section 4, with a threshold that follows the round. With the received model x,
updates Δᵢ = yᵢ − x and M = f · medianᵢ ‖Δᵢ‖:

    x ← x + Σ wᵢ Δᵢ min(1, M / ‖Δᵢ‖)
"""

from __future__ import annotations

import statistics

from fedward.strategies.rfa import distance, weighted_mean
from fedward.strategies.spec import Arrays, ServerRound, ServerRule, Setting, StrategySpec


class NormClipping(ServerRule):
    """The mean of clipped updates."""

    def combine(self, about: ServerRound) -> Arrays:
        norms = [distance(one, about.model) for one in about.updates]
        most = self.settings["factor"] * statistics.median(norms)
        total = sum(made.weight for made in about.contributions)
        shares = [
            made.weight / total * (min(1.0, most / norm) if norm else 1.0)
            for made, norm in zip(about.contributions, norms, strict=True)
        ]
        # Weights of the updates, and of the model that they left: together 1.
        return weighted_mean([*about.updates, about.model], [*shares, 1.0 - sum(shares)])


SPECS = (
    StrategySpec(
        "norm-clipping",
        "weighted mean of the updates, each clipped to the median norm",
        NormClipping,
        """\
The weighted mean of the updates, each scaled down to at most `factor` times the round's median norm
([Sun et al., 2019](https://arxiv.org/abs/1911.07963)). Against updates that
are scaled up; a flipped update of ordinary size passes.""",
        settings={"factor": Setting("times the median norm", 1.0, above_least=True)},
        needs_all=True,
        since=2,
    ),
)
