r"""RFA: the geometric median of the updates (Pillutla et al., 2022).

arXiv:1912.13445, algorithm 2, the smoothed Weiszfeld iteration. With the sites' models yᵢ, their
weights wᵢ and the smoothing ν, from the weighted mean v on:

    βᵢ = wᵢ / max(ν, ‖v − yᵢ‖)
    v ← Σ βᵢ yᵢ / Σ βᵢ

The point whose weighted sum of distances to all updates is least: an update far away pulls no
harder than one nearby, so sites with less than half of the weight move it only so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward.strategies.spec import Arrays, ServerRound, ServerRule, Setting, StrategySpec

_SMOOTHING: Final = 1e-6  # of the largest distance


def geometric_median(
    updates: Sequence[Arrays], weights: Sequence[float], iterations: int
) -> dict[str, NDArray[Any]]:
    """The smoothed geometric median of models, all their arrays as one vector.

    Parameters
    ----------
    updates : sequence of mapping
        Models of the same names and shapes.
    weights : sequence of float
        One above 0 for each.
    iterations : int
        Of Weiszfeld's, from the weighted mean.
    """
    median = weighted_mean(updates, weights)
    for _ in range(iterations):
        distances = [distance(median, one) for one in updates]
        least = _SMOOTHING * max(distances)
        if least == 0.0:  # all updates are equal
            break
        median = weighted_mean(
            updates, [w / max(least, far) for w, far in zip(weights, distances, strict=True)]
        )
    return median


def weighted_mean(updates: Sequence[Arrays], weights: Sequence[float]) -> dict[str, NDArray[Any]]:
    """Mean of models in double precision."""
    total = math.fsum(weights)
    return {
        name: np.add.reduce(
            [
                np.multiply(one[name], weight / total, dtype=np.float64)
                for one, weight in zip(updates, weights, strict=True)
            ]
        )
        for name in updates[0]
    }


def distance(one: Arrays, other: Arrays) -> float:
    """L2 distance of two models, all their arrays as one vector."""
    differences = (np.subtract(one[n], other[n], dtype=np.float64).ravel() for n in one)
    return math.sqrt(sum(float(d @ d) for d in differences))


class GeometricMedian(ServerRule):
    """The geometric median of a round."""

    def combine(self, about: ServerRound) -> Arrays:
        weights = [made.weight for made in about.contributions]
        return geometric_median(about.updates, weights, int(self.settings["iterations"]))


SPECS = (
    StrategySpec(
        "rfa",
        "geometric median of the updates",
        GeometricMedian,
        """\
The geometric median of the updates: the model with the least weighted sum of distances to all of
them ([Pillutla et al., 2022](https://arxiv.org/abs/1912.13445)). Withstands any updates of sites
that have less than half of the weight together. It keeps the sites' weights and compares whole
updates, not single parameters.""",
        settings={"iterations": Setting("Weiszfeld iterations", 8, least=1.0, whole=True)},
        needs_all=True,
        since=2,
    ),
)
