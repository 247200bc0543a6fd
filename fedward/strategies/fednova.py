r"""FedNova: updates are normalised by what their sites' steps amount to (Wang et al., 2020).

arXiv:2007.07481, equation 4 with the coefficients of section 3. A site that takes more local steps
moves further, and FedAvg's mean then is of another objective than the sites' mean loss. With the
received model x, weights wᵢ that sum to 1, τᵢ local steps of SGD with momentum m:

    aᵢ = (τᵢ − m (1 − m^τᵢ) / (1 − m)) / (1 − m)       τᵢ itself without momentum
    x ← x + (Σ wᵢ aᵢ) Σᵢ wᵢ (yᵢ − x) / aᵢ

The sum on the right is a weighted mean of the updates with weights wᵢ / aᵢ, times their sum.
"""

from __future__ import annotations

from fedward.strategies.spec import Arrays, Contribution, ServerRound, ServerRule, StrategySpec


def effective_steps(steps: int, momentum: float) -> float:
    """‖aᵢ‖₁ of a constant rate: how far so many steps along one gradient go, in single steps."""
    if momentum == 0.0:
        return float(steps)
    kept = momentum * (1.0 - momentum**steps) / (1.0 - momentum)
    return (steps - kept) / (1.0 - momentum)


class FedNova(ServerRule):
    """Normalised averaging."""

    def weight(self, made: Contribution) -> float:
        return made.weight / effective_steps(made.steps, self.momentum)

    def combine(self, about: ServerRound) -> Arrays:
        (mean,) = about.updates
        total = sum(made.weight for made in about.contributions)
        steps = sum(
            made.weight / total * effective_steps(made.steps, self.momentum)
            for made in about.contributions
        )
        scale = steps * sum(self.weight(made) for made in about.contributions) / total
        return {name: start + scale * (mean[name] - start) for name, start in about.model.items()}


SPECS = (
    StrategySpec(
        "fednova",
        "weighted mean of updates, each divided by its site's local steps",
        FedNova,
        """\
Divides each update by what its site's steps amount to, then takes one step of their mean size
([Wang et al., 2020](https://arxiv.org/abs/2007.07481)). For plans with `local_epochs` and hospitals
of very different size: a large one takes more steps in a round, and with `fedavg` counts twice.
With `local_steps` it is `fedavg`.""",
        sgd=True,
        since=2,
    ),
)
