r"""FedDyn: a dynamic regulariser aligns the sites' optima with the shared one (Acar et al., 2021).

arXiv:2111.04263, algorithm 1. Site i keeps the gradient hᵢ, the server h, all zero at first. With
the received model x and P of N sites taking part:

    yᵢ = argmin L_i(y) − ⟨hᵢ, y⟩ + (α/2)·‖y − x‖²     each step's gradient: g − hᵢ + α (y − x)
    hᵢ⁺ = hᵢ − α (yᵢ − x)
    h ← h − (α / N) Σᵢ (yᵢ − x)
    x ← mean of yᵢ − h / α

Nothing but the update leaves a site. hᵢ is a sum of updates, which ε counts.
"""

from __future__ import annotations

from fedward.strategies.spec import (
    Arrays,
    Contribution,
    Memory,
    ServerRound,
    ServerRule,
    Setting,
    SiteHook,
    SiteResult,
    SiteRound,
    StrategySpec,
)


class DynamicRegularizer(SiteHook):
    """Adds α (y − x) − hᵢ to each gradient."""

    def __init__(self, about: SiteRound) -> None:
        super().__init__(about)
        self._alpha = about.settings["alpha"]
        self._start = {name: one.detach().clone() for name, one in about.parameters.items()}

    def add_to_gradient(self, rate: float) -> None:
        for name, origin in self._start.items():
            parameter = self.about.parameters[name]
            if parameter.grad is not None:
                parameter.grad.add_(parameter - origin, alpha=self._alpha)
                parameter.grad.sub_(self.about.kept["gradient"][name])

    def finish(self) -> SiteResult:
        before = self.about.kept["gradient"]
        moved = {n: p.detach() - self._start[n] for n, p in self.about.parameters.items()}
        return SiteResult({"gradient": {n: before[n] - self._alpha * m for n, m in moved.items()}})


class FedDyn(ServerRule):
    """The mean model, moved by the sum of all updates so far."""

    gradient: Arrays | None = None

    def weight(self, made: Contribution) -> float:
        return 1.0  # the regularisers cancel in a mean where each site counts once

    def combine(self, about: ServerRound) -> Arrays:
        (mean,) = about.updates
        alpha, before = self.settings["alpha"], self.gradient or {}
        self.gradient = {
            name: before.get(name, 0.0) - alpha * about.taking_part * (mean[name] - start)
            for name, start in about.model.items()
        }
        return {name: mean[name] - self.gradient[name] / alpha for name in about.model}


SPECS = (
    StrategySpec(
        "feddyn",
        "mean of the updates; a dynamic regulariser aligns the sites",
        FedDyn,
        """\
Each site keeps the sum of its own updates as a linear term of its loss, so that where all sites
rest the shared model is the optimum of their mean loss
([Acar et al., 2021](https://arxiv.org/abs/2111.04263)). For hospitals that differ and many local
steps; it moves no more bytes than `fedavg`. Each site has one vote, whatever its size. A small
`alpha` moves fast and may overshoot.""",
        settings={"alpha": Setting("weight of the regulariser", 0.1, above_least=True)},
        weighted=False,
        minimum_sites=2,
        memory={"gradient": Memory("gradient")},
        site=DynamicRegularizer,
        kept={"gradient": "the sum of its own updates"},
        since=2,
    ),
)
