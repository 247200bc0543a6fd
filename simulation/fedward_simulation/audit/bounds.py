"""Lower bounds on ε from what an attacker got right.

A bound here says: a mechanism with a smaller ε would have let the attacker do so well with a
chance of at most 1 - ``confidence``. It never says that ε is not larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedward.dp.accounting import epsilon_spent
from fedward.errors import PrivacyError

_FRACTIONS = (0.25, 1.0)  # of the patients on whom the attacker commits itself
_LARGEST = 1e6  # a noise multiplier with which nothing can be told
_SMALLEST = 0.7  # for which the accountant is quick


@dataclass(frozen=True)
class Guessed:
    """What the guesses of one attack show.

    Attributes
    ----------
    epsilon : float
        Lower bound on ε; 0 where the guesses show nothing.
    ceiling : float
        What the bound would be had every guess been right.
    guesses, correct : int
        Of the number of guesses that gave the bound.
    """

    epsilon: float
    ceiling: float
    guesses: int
    correct: int


def clopper_pearson(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Lower and upper bound on a chance, each of them alone at the given confidence.

    Parameters
    ----------
    successes, trials : int
        What was counted.
    confidence : float
        Of each side (Clopper and Pearson, 1934, doi:10.1093/biomet/26.4.404).
    """
    alpha = 1.0 - confidence
    low = stats.beta.ppf(alpha, successes, trials - successes + 1) if successes else 0.0
    high = (
        stats.beta.ppf(1 - alpha, successes + 1, trials - successes) if successes < trials else 1.0
    )
    return float(low), float(high)


def one_run_p_value(
    members: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """Chance of so many right guesses, or more, about an (ε, δ)-private mechanism (an upper bound).

    Parameters
    ----------
    members : int
        Patients who were each in with a chance of one half, independently.
    guesses, correct : int
        About how many the attacker committed itself, and how many of these it got right.

    Notes
    -----
    Steinke, Nasr and Jagielski, 2023, arXiv:2305.08846, theorem 5.2 and appendix D.
    """
    chance = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, chance))
    if not delta:
        return tail
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance))
    slip = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, tail + 2.0 * members * delta * slip)


def one_run_epsilon(
    members: int, guesses: int, correct: int, delta: float, confidence: float
) -> float:
    """The smallest ε with which so many right guesses are not too unlikely.

    See :func:`one_run_p_value`.
    """
    allowed = 1.0 - confidence

    def unlikely(epsilon: float) -> bool:
        return one_run_p_value(members, guesses, correct, epsilon, delta) < allowed

    return _last(unlikely, 0.0, 64.0)


def best_guesses(
    scores: NDArray[np.float64], inside: NDArray[np.bool_], delta: float, confidence: float
) -> Guessed:
    """The best one-run bound over a few numbers of guesses, paid for by Bonferroni.

    Parameters
    ----------
    scores : NDArray
        ``(m,)``; the attacker calls the highest members, the lowest not, and abstains between.
    inside : NDArray
        ``(m,)`` whether each was in, by independent fair coins.
    """
    count, each = len(scores), 1.0 - (1.0 - confidence) / len(_FRACTIONS)
    order, found = np.argsort(-scores, kind="stable"), []
    for fraction in _FRACTIONS:
        half = int(count * fraction / 2)
        if not half:
            continue
        correct = int(inside[order[:half]].sum() + (~inside[order[-half:]]).sum())
        epsilon = one_run_epsilon(count, 2 * half, correct, delta, each)
        most = one_run_epsilon(count, 2 * half, 2 * half, delta, each)
        found.append(Guessed(epsilon, most, 2 * half, correct))
    if not found:
        return Guessed(0.0, 0.0, 0, 0)
    best = max(found, key=lambda one: (one.epsilon, one.guesses))
    return Guessed(best.epsilon, max(one.ceiling for one in found), best.guesses, best.correct)


def noise_at_most(
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    rate: float,
    thresholds: Sequence[float],
    confidence: float,
) -> float:
    """Upper bound on the noise multiplier of a subsampled Gaussian step, from trials.

    Parameters
    ----------
    inside : NDArray
        ``(n,)`` one observation of a step each, in units of the clipping norm, where the patient
        was among the training data and was drawn with chance ``rate``: its mean is the share of
        the patient's bounded gradient.
    outside : NDArray
        ``(k,)`` the same without the patient.
    thresholds : sequence of float
        Fixed before looking; an observation above one is called "in". Their number is paid for.

    Returns
    -------
    float
        Infinity where the trials bound nothing.

    Notes
    -----
    As Nasr et al., 2023, arXiv:2302.07956: steps of one run are trials of the same mechanism, and
    Clopper-Pearson bounds the rates. With a false positive rate of at most a, the best test of a
    subsampled Gaussian has a true positive rate of (1 - q) a + q Φ(Φ⁻¹(a) + 1/σ).
    """
    each = 1.0 - (1.0 - confidence) / (2 * len(thresholds))
    smallest = math.inf
    for threshold in thresholds:
        _, false = clopper_pearson(int((outside > threshold).sum()), len(outside), each)
        true, _ = clopper_pearson(int((inside > threshold).sum()), len(inside), each)
        smallest = min(smallest, _noise(true, false, rate))
    return smallest


def noise_of_shares(
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    rate: float,
    promised: float,
    confidence: float,
) -> float:
    """Upper bound on the noise multiplier, from trials whose patients give different shares.

    Parameters
    ----------
    inside, outside : NDArray
        ``(n, 2)`` and ``(k, 2)``: an observation as in :func:`noise_at_most`, and the share of the
        clipping norm, in (0, 1], that the patient gives where drawn.
    promised : float
        The noise multiplier that the site promises.

    Returns
    -------
    float
        Infinity where the trials bound nothing.

    Notes
    -----
    Without noise an observation is the share or nothing, so half of the share tells the two apart;
    shares are known before an update is looked at. Divided by its share a trial has more noise, not
    less, so the bound holds. With noise, thresholds at the promised one are better. The three
    thresholds share the confidence.
    """
    each = (1.0 - confidence) / 3
    own = [values / shares for values, shares in (inside.T, outside.T)]
    return min(
        noise_at_most(own[0], own[1], rate, (0.5,), 1.0 - each),
        noise_at_most(inside[:, 0], outside[:, 0], rate, (promised, 2 * promised), 1.0 - 2 * each),
    )


def _noise(true: float, false: float, rate: float) -> float:
    drawn = (true - (1.0 - rate) * false) / rate
    if not 0.0 < false < 1.0 or drawn <= false:
        return math.inf
    # A rate of one cannot come of a finite shift: the trials are then as if from the edge.
    shift = stats.norm.ppf(min(drawn, 1.0 - 1e-12)) - stats.norm.ppf(false)
    return float(1.0 / shift) if shift > 0 else math.inf


def steps_epsilon(
    noise_multiplier: float, rate: float, steps: int, delta: float, least: float = _SMALLEST
) -> float:
    """ε that so many steps with at most this noise cost at least, by the PRV accountant.

    The accountant follows little noise slowly, and very little not at all: for less noise than
    ``least`` the ε of that stands, which is smaller.
    """
    noise = max(noise_multiplier, least)
    while noise < _LARGEST:
        try:
            # The accountant's own error, upwards, is taken off again.
            return max(0.0, epsilon_spent(noise, rate, steps, delta) - 0.03)
        except PrivacyError:
            noise *= 1.25
    return 0.0


def _last(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number for which something holds that holds below it and not above."""
    if not holds(low):
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
