"""What each site adds to a round, from the updates alone: no data, and no further exchange.

With the sites' shares wᵢ, their updates uᵢ (the site's model minus the one that was sent) and the
sum of the others s₋ᵢ = Σ_{j≠i} wⱼ uⱼ:

    pull of i = wᵢ ⟨uᵢ, s₋ᵢ⟩
    agreement of i = cos(uᵢ, Σ_{j≠i} wⱼ uⱼ / ‖uⱼ‖)

The pull is the Shapley value of i in the game in which a coalition S is worth ‖Σ_S wᵢ uᵢ‖² minus
Σ_S ‖wᵢ uᵢ‖²: by how much its updates lengthen each other's step (after Xu et al., 2021, "Gradient
driven rewards to guarantee fairness in collaborative machine learning", whose worth of a coalition
is a cosine). What a site's update has to itself, the noise of privacy above all, is in no pull.
The agreement is the direction part of FedCE (Jiang et al., 2023, arXiv:2303.16520), with updates
of one length, so that who sends a long one turns no one else's.

An update is kept as a sketch (Weinberger et al., 2009, arXiv:0902.2206): each parameter is added,
with a random sign, to one of 32,768 numbers. Inner products of sketches are those of the updates in
expectation, with a standard deviation of at most √2 / √32,768 = 0.008 of the product of the norms;
of a model with no more parameters they are exact. So a server that adds updates up as they come
need not keep them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE: Final = 1 << 15
_CHUNK: Final = 1 << 18


class Sketch:
    """The sketch of one update; all of a round must have one seed, size and order of arrays.

    Parameters
    ----------
    seed : sequence of int
        Of the draw. A site that knew it could hide behind it.
    size : int
        Parameters of the update.
    """

    def __init__(self, seed: Sequence[int], size: int) -> None:
        self._whole = size <= SIZE
        self._rng = np.random.default_rng(seed)
        self._done = 0
        self._values = np.zeros(min(size, SIZE))

    def add(self, change: NDArray[Any]) -> None:
        """Take the next array in: what an update changes of it."""
        flat = np.asarray(change, np.float64).ravel()
        if self._whole:
            self._values[self._done : self._done + flat.size] = flat
            self._done += flat.size
            return
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            drawn = self._rng.integers(0, 2 * SIZE, part.size, dtype=np.uint16)
            signed = np.where(drawn < SIZE, part, -part)
            self._values += np.bincount(drawn % SIZE, signed, SIZE)

    def kept(self) -> NDArray[np.float32]:
        """The sketch, ``(min(size, 32768),)``."""
        # A copy, made last: what stays must not lie among large arrays that are freed, whose room
        # the next update could not take.
        return self._values.astype(np.float32)


class Added(NamedTuple):
    """What one site adds to a round.

    Attributes
    ----------
    pull : float
        In squared units of the parameters; of several rounds they can be added up.
    agreement : float
        From -1 to 1.
    """

    pull: float
    agreement: float


def added(
    sketches: Mapping[str, NDArray[np.floating[Any]]], shares: Mapping[str, float]
) -> dict[str, Added]:
    """What each site adds; nothing of a site that was alone in its round.

    Parameters
    ----------
    sketches, shares : mapping
        Of the same sites: the sketch of each update, and its share of the round's weight.
    """
    sites = sorted(sketches)
    if len(sites) < 2:
        return {}
    moved = np.stack([sketches[site] for site in sites]).astype(np.float64)
    weights = np.array([shares[site] for site in sites])
    inner = moved @ moved.T
    lengths = np.sqrt(np.diag(inner))
    units = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    found = {}
    for at, site in enumerate(sites):
        others = np.where(np.arange(len(sites)) == at, 0.0, weights)
        turned = others * units
        length = math.sqrt(max(0.0, float(turned @ inner @ turned)))
        along = float(inner[at] @ turned) * float(units[at])
        agreement = max(-1.0, min(1.0, along / length)) if length > 0 else 0.0
        found[site] = Added(float(weights[at] * (inner[at] @ others)), agreement)
    return found
