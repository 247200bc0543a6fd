"""The discrete Laplace mechanism, sampled exactly in integers.

Canonne, Kamath and Steinke, "The discrete Gaussian for differential privacy" (2020,
arXiv:2004.00010), algorithms 1 and 2. No floating-point number is involved, so the attack of
Mironov (2012, "On significance of the least significant bits for differential privacy") on sampled
noise has nothing to work with.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

RandBelow = Callable[[int], int]


def discrete_laplace(
    shape: tuple[int, ...], scale: Fraction, randbelow: RandBelow = secrets.randbelow
) -> NDArray[np.int64]:
    """Draw independent integers X with P(X = x) proportional to exp(-abs(x) / scale).

    Added to integers that one person changes by at most Δ in L1 norm, they make the result
    (Δ / scale)-differentially private.

    Parameters
    ----------
    shape : tuple of int
        Shape of the result.
    scale : Fraction
        Above 0.
    randbelow : callable
        Gives a uniform integer from 0 to n - 1. The default is the operating system's
        cryptographic source; a simulation gives a seeded one.

    Raises
    ------
    ValueError
        The scale is not above 0.
    """
    if scale <= 0:
        raise ValueError(f"the scale of the noise must be above 0, not {scale}")
    draws = [_draw(scale, randbelow) for _ in range(math.prod(shape))]
    return np.array(draws, dtype=np.int64).reshape(shape)


def variance(scale: Fraction) -> float:
    """Variance of :func:`discrete_laplace`: 2 q / (1 - q)² with q = exp(-1 / scale)."""
    below = -math.expm1(-1 / float(scale))  # 1 - q without cancellation
    return 2 * (1 - below) / below**2


def _draw(scale: Fraction, randbelow: RandBelow) -> int:
    numerator, denominator = scale.numerator, scale.denominator
    while True:
        remainder = randbelow(numerator)
        if not _bernoulli_exp(remainder, numerator, randbelow):
            continue
        wholes = 0
        while _bernoulli_exp(1, 1, randbelow):
            wholes += 1
        magnitude = (remainder + numerator * wholes) // denominator
        negative = randbelow(2)
        if magnitude or not negative:  # else zero would be drawn twice as often
            return -magnitude if negative else magnitude


def _bernoulli_exp(numerator: int, denominator: int, randbelow: RandBelow) -> bool:
    """True with probability exp(-numerator / denominator), the fraction in 0 to 1."""
    k = 1
    while randbelow(denominator * k) < numerator:
        k += 1
    return k % 2 == 1
