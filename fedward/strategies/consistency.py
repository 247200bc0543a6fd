r"""Consistency: sites whose updates keep pointing away from the others' lose weight.

A CUSUM chart (Page, 1954, doi:10.1093/biomet/41.1-2.100) of each site's disagreement, and weights
that fall exponentially with it, as reputations do in RFFL (Xu and Lyu, 2020, arXiv:2011.10464).
With the cosine aᵢ between a site's update and the others' of the same round, all taken as of one
length, the allowance k and the plan's weight pᵢ:

    Eᵢ ← max(0, Eᵢ − aᵢ − k)
    wᵢ ∝ pᵢ exp(−β Eᵢ)

One round of disagreement is soon made good; what persists adds up. The server works the cosines out
of the updates that it has; they count from the next round on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from fedward.strategies.spec import Arrays, Pasts, ServerRound, ServerRule, Setting, StrategySpec


def disagreement(agreements: Iterable[float | None], allowance: float) -> float:
    """What has added up of a site's disagreement; rounds in which it took no part change nothing.

    Parameters
    ----------
    agreements : iterable of float or None
        Cosines, in the order of the rounds.
    allowance : float
        Disagreement of a round that is taken for ordinary.
    """
    total = 0.0
    for one in agreements:
        if one is not None:
            total = max(0.0, total - one - allowance)
    return total


class Consistency(ServerRule):
    """The mean of the updates, weighted by how far sites have agreed so far."""

    def favour(self, pasts: Pasts) -> Mapping[str, float]:
        rate, allowance = self.settings["rate"], self.settings["allowance"]
        # Never 0: who agrees again comes back.
        return {
            site: math.exp(-min(30.0, rate * disagreement(past.agreements, allowance)))
            for site, past in pasts.items()
        }

    def combine(self, about: ServerRound) -> Arrays:
        (mean,) = about.updates
        return mean


SPECS = (
    StrategySpec(
        "consistency",
        "weighted mean; sites that keep disagreeing with the others lose weight",
        Consistency,
        """\
A site whose updates point away from the others' round after round loses weight, and gains it back
when they no longer do: cosines add up as in a CUSUM chart
([Page, 1954](https://doi.org/10.1093/biomet/41.1-2.100)), and weights fall exponentially, as
reputations do in RFFL ([Xu and Lyu, 2020](https://arxiv.org/abs/2011.10464)). Against updates that
are flipped or trained on wrong labels while less than half of the weight is hostile; the first such
update still counts in full. It keeps no updates, and lets hospitals be that only differ: theirs
point the same way more often than not. Where updates are mostly noise (strict privacy, few
patients) it sees little; an `allowance` above 0 keeps noise from moving weights. The report shows
each site's [agreement](#what-each-hospital-contributed).""",
        settings={
            "rate": Setting("how fast weight falls with disagreement", 4.0),
            "allowance": Setting("disagreement of a round that does not count", 0.0, below=1.0),
        },
        minimum_sites=3,
        since=2,
    ),
)
