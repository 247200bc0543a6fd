r"""SCAFFOLD: control variates correct the drift of each site (Karimireddy et al., 2020).

arXiv:1910.06378, algorithm 1 with option II. Site i has a control variate cᵢ, the server c, all
zero at first. With the received model x, K local steps of rates η₁ … η_K and S of N sites:

    y ← y − ηₖ (gᵢ(y) − cᵢ + c)                 each local step
    cᵢ⁺ = cᵢ − c + (x − yᵢ) / Σₖ ηₖ             at the end of a site's round
    x ← x + ηg Σᵢ wᵢ (yᵢ − x)                   at the server, the weights wᵢ summing to 1
    c ← c + (S / N) Σᵢ wᵢ (cᵢ⁺ − cᵢ)             the paper has equal weights

With differential privacy gᵢ has its noise already, and cᵢ⁺ − cᵢ follows from the update yᵢ and from
c, which the aggregator knows: it is post-processing of what ε counts.
"""

from __future__ import annotations

from fedward.strategies.spec import (
    Arrays,
    Memory,
    ServerRound,
    ServerRule,
    Setting,
    SiteHook,
    SiteResult,
    SiteRound,
    StrategySpec,
)


class ControlVariate(SiteHook):
    """Adds the server's control variate minus the site's own to each gradient."""

    def __init__(self, about: SiteRound) -> None:
        super().__init__(about)
        self._start = {name: one.detach().clone() for name, one in about.parameters.items()}
        own, shared = about.kept["own"], about.received["shared"]
        self._correction = {name: shared[name] - own[name] for name in about.parameters}
        self._rates = 0.0

    def add_to_gradient(self, rate: float) -> None:
        self._rates += rate
        for name, correction in self._correction.items():
            parameter = self.about.parameters[name]
            if parameter.grad is not None:
                parameter.grad.add_(correction)

    def finish(self) -> SiteResult:
        own, changes = {}, {}
        for name, parameter in self.about.parameters.items():
            mean_step = (self._start[name] - parameter.detach()) / self._rates
            own[name] = mean_step - self._correction[name]
            changes[name] = own[name] - self.about.kept["own"][name]
        return SiteResult({"own": own}, {"change": changes})


class Scaffold(ServerRule):
    """Moves the model by the mean update, and the control variate by the mean of its changes."""

    shared: Arrays | None = None

    def combine(self, about: ServerRound) -> Arrays:
        (mean,) = about.updates
        eta, before = self.settings["server_learning_rate"], self.shared or {}
        self.shared = {
            name: before.get(name, 0.0) + about.taking_part * change
            for name, change in about.sent["change"].items()
        }
        if eta == 1.0:
            return mean
        return {name: start + eta * (mean[name] - start) for name, start in about.model.items()}


SPECS = (
    StrategySpec(
        "scaffold",
        "weighted mean; each site corrects its drift by control variates",
        Scaffold,
        """\
Each site keeps a control variate, an estimate of its own gradient, and the server keeps their mean;
while a site trains, the difference is added to each gradient, so that all sites pull to the same
optimum ([Karimireddy et al., 2020](https://arxiv.org/abs/1910.06378), option II). For hospitals
whose patients differ and many local steps. It moves twice the bytes, each way. A control variate is
per step: it needs SGD without momentum. With differential privacy it is a mean of noised gradients,
and has the less noise the more steps a round has.""",
        settings={"server_learning_rate": Setting("server learning rate", 1.0, above_least=True)},
        minimum_sites=2,
        plain_sgd=True,
        memory={"shared": Memory("shared")},
        site=ControlVariate,
        kept={"own": "its control variate"},
        received=("shared",),
        sent={"change": "the change of its control variate"},
        sent_from_update=True,
        since=2,
    ),
)
