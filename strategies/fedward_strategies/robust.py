"""Bounds on what one site can do to a round: its share of the weight, and its update's norm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


def capped_weights(weights: Mapping[str, float], max_share: float) -> dict[str, float]:
    """Lower the largest weights until no site has more than a share of their sum.

    Water-filling: the result is ``min(weight, level)`` for the largest level that is at most
    ``max_share`` of the sum of the results. With fewer than ``1 / max_share`` sites there is no
    such level, and all get the same weight.

    Parameters
    ----------
    weights : mapping
        Site to weight, above 0.
    max_share : float
        In (0, 1]; 1 changes nothing.

    Returns
    -------
    dict
        Site to weight, in the same order.
    """
    descending = sorted(weights.values(), reverse=True)
    for capped, weight in enumerate(descending):
        room = 1 - capped * max_share
        if room <= 0:
            break
        # `capped` sites lie at the level, the others keep their weight.
        level = max_share * math.fsum(descending[capped:]) / room
        if weight <= level:
            return {s: min(w, level) for s, w in weights.items()} if capped else dict(weights)
    return dict.fromkeys(weights, descending[-1]) if weights else {}


def most_capped(max_share: float) -> int:
    """Upper bound on how many sites, the heaviest, :func:`capped_weights` can lower."""
    return math.ceil(1 / max_share) - 1


def dominates(share: float, sites: int) -> bool:
    """Whether a share of several sites' sum is more than midway from an even one to the whole.

    More than 0.75 of two sites, 0.625 of four, 0.55 of ten.
    """
    return sites > 1 and share > (1 + 1 / sites) / 2


# Times wider that the bound of norms is for a site because it says that it is larger.
_MOST_WIDER = 4.0


@dataclass(frozen=True)
class NormBound:
    """The largest norm of an update that a round takes, after the median of its updates' norms.

    Norm bounding against scaled updates follows Sun et al., 2019 (arXiv:1911.07963). The bound is
    wider for a site that is larger than the median one, which takes more steps in an epoch, and
    for one that is smaller, whose private noise is larger per image: by the ratio of the sizes.

    Attributes
    ----------
    median : float
        Median L2 norm of the round's updates, each minus the model that was sent.
    size : float
        Median size of the sites (training images, or patients where the study is private).
    ratio : float
        Largest norm in units of the median, for a site of the median size.
    """

    median: float
    size: float
    ratio: float

    @classmethod
    def of(cls, norms: Iterable[float], sizes: Iterable[float], ratio: float) -> NormBound:
        """The bound of a round, from the norms of its updates and the sizes of its sites."""
        return cls(statistics.median(norms), statistics.median(sizes), ratio)

    def limit(self, size: float) -> float:
        """The largest norm for a site of a size; infinite where the median norm is 0.

        Of two sites neither is beyond it: their median is half of their sum, and which one is the
        outlier cannot be told.
        """
        if self.median <= 0 or self.size <= 0 or size <= 0:
            return math.inf
        larger = min(size / self.size, _MOST_WIDER)
        return self.ratio * self.median * max(larger, self.size / size)
