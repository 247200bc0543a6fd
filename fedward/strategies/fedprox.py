"""FedProx: sites are held near the shared model while they train."""

from __future__ import annotations

from fedward.strategies.spec import Setting, SiteHook, SiteRound, StrategySpec


class ProximalTerm(SiteHook):
    """The gradient of (μ/2)·‖w − wᵗ‖² (Li et al., 2020, arXiv:1812.06127, equation 2).

    It depends on no image, so that adding it after the noise costs no privacy.
    """

    def __init__(self, about: SiteRound) -> None:
        super().__init__(about)
        self._mu = about.settings["mu"]
        started = about.parameters if self._mu else {}
        self._start = {name: one.detach().clone() for name, one in started.items()}

    def add_to_gradient(self, rate: float) -> None:
        for name, origin in self._start.items():
            parameter = self.about.parameters[name]
            if parameter.grad is not None:
                parameter.grad.add_(parameter - origin, alpha=self._mu)


SPECS = (
    StrategySpec(
        "fedprox",
        "weighted mean; sites are held near the shared model while they train",
        "flwr.serverapp.strategy:FedProx",
        """\
The same mean; while a site trains, it is held near the shared model by the term
(μ/2)·‖w − wᵗ‖² in its loss ([Li et al., 2020](https://arxiv.org/abs/1812.06127)). For hospitals
whose patients or scanners differ, and for many local steps between rounds. A `mu` of 0 is
`fedavg`, 0.01 to 1 is usual.""",
        settings={"mu": Setting("weight of the proximal term, (μ/2)·‖w − wᵗ‖²")},
        arguments={"mu": "proximal_mu"},
        site=ProximalTerm,
    ),
)
