"""Whether a map can be trusted, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from fedward.models import build_model
from fedward.networks import MODELS
from fedward.plan.schema import Plan
from fedward_client.explain.maps import blurred, mean_image

_STEPS: Final = 20
_SEED: Final = 181003292  # whatever no study begins with


def deletion_and_insertion(
    probability: Callable[[Tensor], NDArray[np.float64]],
    images: Tensor,
    found: NDArray[np.float32],
    steps: int = _STEPS,
) -> tuple[float, float]:
    """Areas under the curves of deletion and insertion (Petsiuk et al. 2018, arXiv:1806.07421).

    Parameters
    ----------
    probability : callable
        From images ``(n, C, *S)`` to the probability of the class, ``(n,)``.
    images : Tensor
        ``(1, C, *S)``.
    found : NDArray
        The map ``(*S)``. Pixels are taken from its largest value to its smallest; equal ones by
        chance, always the same.
    steps : int
        Into which the pixels are divided.

    Returns
    -------
    tuple of float
        Deletion: the mean replaces the pixels; a good map has a small area. Insertion: the pixels
        replace those of a blurred image; a good map has a large area.
    """
    chance = np.random.default_rng(_SEED).permutation(found.size)
    rank = np.empty(found.size, np.int64)
    rank[np.lexsort((chance, -found.ravel().astype(np.float64)))] = np.arange(found.size)
    places = torch.from_numpy(rank.reshape(found.shape)).to(images.device)
    starts = (images, mean_image(images)), (blurred(images), images)
    areas = []
    for before, after in starts:
        counts = [round(found.size * step / steps) for step in range(steps + 1)]
        curve = probability(torch.cat([torch.where(places < n, after, before) for n in counts]))
        areas.append(float(np.trapezoid(curve, dx=1 / steps)))
    return areas[0], areas[1]


def points_at(found: NDArray[np.float32], mask: NDArray[np.bool_]) -> tuple[bool, float]:
    """The pointing game, and its version by energy.

    Parameters
    ----------
    found : NDArray
        The map ``(*S)``.
    mask : NDArray
        Where the finding is, ``(*S)``, not empty.

    Returns
    -------
    tuple
        Whether the largest value lies in the mask (Zhang et al. 2018, arXiv:1608.00507); the share
        of what is above 0 that does (Wang et al. 2020, arXiv:1910.01279).
    """
    above = np.maximum(found, 0).astype(np.float64)
    whole = float(above.sum())
    hit = bool(mask.ravel()[int(np.argmax(found))])
    return hit, float(above[mask].sum()) / whole if whole > 0 else 0.0


def randomised(plan: Plan, network: nn.Module, *, head_alone: bool) -> nn.Module:
    """A network with fresh weights, in all layers or in the last, for the sanity check.

    Parameters
    ----------
    plan : Plan
        Of the network.
    network : nn.Module
        With the model's weights.
    head_alone : bool
        Whether the other layers keep theirs.
    """
    fresh = build_model(plan, _SEED)
    if head_alone:
        head = MODELS[plan.model.name].head
        state = network.state_dict().items()
        kept = {name: value for name, value in state if not fnmatchcase(name, head)}
        fresh.load_state_dict(kept, strict=False)
    return fresh.eval()


def likeness(one: NDArray[Any], other: NDArray[Any]) -> float | None:
    """Spearman's rank correlation of two arrays of one shape; None where one is constant.

    Of maps of a trained and a randomised network it should be near 0 (Adebayo et al. 2018,
    arXiv:1810.03292): else the map shows the image rather than what the network learnt.
    """
    if one.min() == one.max() or other.min() == other.max():
        return None
    return float(stats.spearmanr(one.ravel(), other.ravel()).statistic)


def tells_wrong(unsure: NDArray[np.float32], wrong: NDArray[np.bool_]) -> float | None:
    """The chance that a wrong pixel is less sure than a right one (AUC); None without either.

    Parameters
    ----------
    unsure : NDArray
        Uncertainty.
    wrong : NDArray
        Of the same shape.
    """
    bad = int(np.count_nonzero(wrong))
    good = wrong.size - bad
    if not bad or not good:
        return None
    _, place, count = np.unique(unsure, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # of equal ones their mean
    ranks = float(rank[place.ravel()][wrong.ravel()].sum())
    return (ranks - bad * (bad + 1) / 2) / (bad * good)
