r"""q-FedAvg: hospitals that the model serves badly count more (Li et al., 2020).

arXiv:1905.10497, algorithm 2, with all sites of the round in place of a sample. With the received
model x, weights p_k, the sites' models y_k, the Lipschitz constant L of the gradients and F_k(x),
how badly x does at site k:

    Δ_k = F_k(x)^q L (x − y_k)
    h_k = q F_k(x)^(q−1) ‖L (x − y_k)‖² + L F_k(x)^q
    x ← x − Σ p_k Δ_k / Σ p_k h_k

With weights p_k F_k^q and their mean m of the y_k, which is how the updates are added up, that is

    x ← x + (m − x) / (1 + q L · mean of ‖y_k − x‖² / F_k)

F_k is what the last evaluation released of x at the site: the plan's primary figure on validation
patients, a loss as it is, another as 1 minus the figure. Nothing else leaves a site. Before the
first evaluation it is FedAvg.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedward.strategies.spec import Arrays, Pasts, ServerRound, ServerRule, Setting, StrategySpec


class QFedAvg(ServerRule):
    """The mean weighted by the q-th power of shortfalls, and a step that its steepness bounds."""

    _shortfalls: Mapping[str, float] = {}

    def favour(self, pasts: Pasts) -> Mapping[str, float]:
        found = {
            site: next((one for one in reversed(past.shortfalls) if one is not None), None)
            for site, past in pasts.items()
        }
        known = [one for one in found.values() if one is not None]
        usual = math.fsum(known) / len(known) if known else 1.0
        self._shortfalls = {
            site: usual if one is None else one for site, one in found.items() if known
        }
        q = self.settings["q"]
        # Over the mean, so that a site that is new, and so not named, weighs as an ordinary one.
        return {site: (one / usual) ** q for site, one in self._shortfalls.items()}

    def combine(self, about: ServerRound) -> Arrays:
        (mean,) = about.updates
        total = math.fsum(made.weight for made in about.contributions)
        steepness = math.fsum(
            made.weight / total * made.norm**2 / self._shortfalls[made.site]
            for made in about.contributions
            if made.site in self._shortfalls
        )
        scale = 1.0 / (1.0 + self.settings["q"] * self.settings["lipschitz"] * steepness)
        return {name: start + scale * (mean[name] - start) for name, start in about.model.items()}


SPECS = (
    StrategySpec(
        "q-fedavg",
        "mean of the updates; sites that the model serves badly weigh more",
        QFedAvg,
        """\
A site's weight is multiplied by the `q`-th power of how badly the received model does there
([Li et al., 2020](https://arxiv.org/abs/1905.10497)), so that figures become more even over
hospitals, at some cost to their mean. `q` = 0 is `fedavg`; 0.1 to 5 is usual. Steps become the
shorter the larger updates are against the loss: `lipschitz` scales that, and 1 / learning rate is
usual. It needs SGD.""",
        settings={
            "q": Setting("power of the shortfall", 1.0, below=10.0),
            "lipschitz": Setting(
                "Lipschitz constant of the loss's gradient: about 1 / learning rate",
                above_least=True,
            ),
        },
        sgd=True,
        minimum_sites=2,
        by_figures=True,
        since=2,
    ),
)
