"""Membership inference: was this patient among those that the model was trained on?

The unit is the patient: each score is the mean over the patient's images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedward_simulation.audit.bounds import clopper_pearson

Scores = NDArray[np.float64]
_SMALLEST = 1e-6  # of a standard deviation


@dataclass(frozen=True)
class Shadows:
    """What models that were trained on random halves say of each patient.

    Attributes
    ----------
    confidence : NDArray
        ``(shadows, patients)``.
    inside : NDArray
        ``(shadows, patients)`` whether the patient was in that half.
    """

    confidence: Scores
    inside: NDArray[np.bool_]

    def without(self, place: int) -> Shadows:
        """All but one, which is then attacked."""
        return Shadows(
            np.delete(self.confidence, place, axis=0), np.delete(self.inside, place, axis=0)
        )


@dataclass(frozen=True)
class Separation:
    """How well scores tell members from others.

    Attributes
    ----------
    auc, auc_error : float
        Area under the ROC curve and its standard error (Hanley and McNeil, 1982,
        doi:10.1148/radiology.143.1.7063747).
    true_rates : dict
        False positive rate to the true positive rate there, with its lower and upper bound (each at
        97.5 % by Clopper-Pearson); only rates that so few others can resolve.
    """

    auc: float
    auc_error: float
    true_rates: dict[float, tuple[float, float, float]]


def by_patient(values: Scores, patients: NDArray[np.int64], count: int) -> Scores:
    """``(count,)`` mean of the values of each patient's images; NaN without any."""
    images = np.bincount(patients, minlength=count)
    totals = np.bincount(patients, weights=values, minlength=count)
    mean: Scores = np.divide(totals, images, out=np.full(count, np.nan), where=images > 0)
    return mean


def lira_offline(observed: Scores, shadows: Shadows) -> Scores:
    """How far each confidence lies above that of models without the patient.

    Carlini et al., 2022, arXiv:2112.03570, section VI-C (offline), with one variance for all
    patients, as they advise for few shadow models.
    """
    outside = ~shadows.inside
    mean = _means(shadows.confidence, outside)
    return (observed - mean) / _spread(shadows.confidence, outside, mean)


def lira_online(observed: Scores, shadows: Shadows) -> Scores:
    """Log-likelihood ratio of each confidence, with the patient against without.

    Carlini et al., 2022, arXiv:2112.03570, algorithm 1, with one variance for all patients.
    """
    inside, outside = shadows.inside, ~shadows.inside
    with_, without = _means(shadows.confidence, inside), _means(shadows.confidence, outside)
    near = stats.norm.logpdf(observed, with_, _spread(shadows.confidence, inside, with_))
    far = stats.norm.logpdf(observed, without, _spread(shadows.confidence, outside, without))
    return np.asarray(near - far)


def _means(values: Scores, chosen: NDArray[np.bool_]) -> Scores:
    """Mean over the chosen models; of a patient whom none had, the others' average shift."""
    counts = chosen.sum(axis=0)
    totals = np.where(chosen, values, 0.0).sum(axis=0)
    empty = np.full(values.shape[1], np.nan)
    mean: Scores = np.divide(totals, counts, out=empty, where=counts > 0)
    lacking = np.isnan(mean)
    if lacking.any():
        every = values.mean(axis=0)
        shift = float(np.mean((mean - every)[~lacking])) if not lacking.all() else 0.0
        mean[lacking] = every[lacking] + shift
    return mean


def _spread(values: Scores, chosen: NDArray[np.bool_], mean: Scores) -> float:
    """One standard deviation for all, each patient's own mean taken off."""
    counts = chosen.sum(axis=0)
    freedom = int((counts - 1).clip(min=0).sum())
    if not freedom:
        return max(float(values.std()), _SMALLEST)
    squares = float(np.where(chosen, (values - mean) ** 2, 0.0).sum())
    return max(float(np.sqrt(squares / freedom)), _SMALLEST)


def separation(scores: Scores, members: NDArray[np.bool_]) -> Separation:
    """How well higher scores tell members from others.

    Parameters
    ----------
    scores, members : NDArray
        ``(n,)``; both kinds must be there.
    """
    inside, outside = scores[members], scores[~members]
    n, k = len(inside), len(outside)
    ranks = stats.rankdata(np.concatenate([inside, outside]))
    auc = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * k))
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n - 1) * (first - auc**2) + (k - 1) * (second - auc**2)
    rates = {rate: _true_rate(inside, outside, rate) for rate in (0.01, 0.001) if k * rate >= 1}
    return Separation(auc, float(np.sqrt(max(0.0, variance) / (n * k))), rates)


def _true_rate(inside: Scores, outside: Scores, rate: float) -> tuple[float, float, float]:
    allowed = int(len(outside) * rate)
    threshold = np.sort(outside)[::-1][allowed]  # so many others lie above it, or fewer
    found = int((inside > threshold).sum())
    low, high = clopper_pearson(found, len(inside), 0.975)
    return found / len(inside), low, high
