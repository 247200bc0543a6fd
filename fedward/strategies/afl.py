r"""Agnostic federated learning: the model for the worst mixture of hospitals (Mohri et al., 2019).

arXiv:1902.00146, equation 4: min over models x of the max over mixtures λ of Σ λ_k F_k(x). What is
best for the worst mixture of the hospitals is no worse at a hospital that was not there and whose
patients are like any mixture of theirs (section 2.2). λ ascends by exponentiated gradients, which
keep it a mixture, from the plan's weights p_k on (Sagawa et al., 2020, arXiv:1911.08731,
algorithm 1):

    λ_k ∝ p_k exp(η Σ_t (F_k(x_t) − F̄(x_t)))
    x ← Σ λ_k y_k

The sum is over the evaluations so far, F̄ the mean over the sites: taking it away changes no ratio,
and lets a site that was not evaluated count as an ordinary one. F_k is what the evaluation released
of x at the site: the plan's primary figure on validation patients, a loss as it is, another as 1
minus the figure. Nothing else leaves a site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedward.strategies.spec import Arrays, Pasts, ServerRound, ServerRule, Setting, StrategySpec


def excesses(pasts: Pasts) -> dict[str, float]:
    """By how much each site's shortfalls passed the mean of the sites', summed over evaluations."""
    total = dict.fromkeys(pasts, 0.0)
    for at in range(max((len(past.shortfalls) for past in pasts.values()), default=0)):
        found = {site: past.shortfalls[at] for site, past in pasts.items()}
        known = {site: one for site, one in found.items() if one is not None}
        for site, one in known.items():
            total[site] += one - math.fsum(known.values()) / len(known)
    return total


class AgnosticFederatedLearning(ServerRule):
    """The mean of the updates, weighted by the mixture that is worst so far."""

    def favour(self, pasts: Pasts) -> Mapping[str, float]:
        most = 30.0  # e^30 to one is a mixture of one site; more would overflow
        return {
            site: math.exp(max(-most, min(most, self.settings["eta"] * excess)))
            for site, excess in excesses(pasts).items()
        }

    def combine(self, about: ServerRound) -> Arrays:
        (mean,) = about.updates
        return mean


SPECS = (
    StrategySpec(
        "afl",
        "mean of the updates, weighted for the worst mixture of the hospitals",
        AgnosticFederatedLearning,
        """\
Weights grow at hospitals that the model keeps serving worse than the others
([Mohri et al., 2019](https://arxiv.org/abs/1902.00146)). The model is then the best one for the
worst mixture of the hospitals, and so for a hospital that takes no part and has patients like any
such mixture; it promises nothing for patients unlike all of theirs. Figures that settle in few
evaluations need a larger `eta`: after as many evaluations as 1 / `eta`, a site that is worse by 0.1
has gained a tenth in weight. A hospital whose images cannot be told better takes ever more weight:
`max_share` ends that.""",
        settings={"eta": Setting("rate at which weights follow the figures", 1.0)},
        minimum_sites=2,
        by_figures=True,
        since=2,
    ),
)
