"""Privacy arithmetic: what an update costs, and how much noise a target needs.

The mechanism is DP-SGD (Abadi et al., 2016, arXiv:1607.00133) with the patient as the unit: each
step draws every patient with the same chance, bounds what one patient adds to the gradient, and
adds Gaussian noise. Opacus' PRV accountant (Gopi et al., 2021, arXiv:2106.02848) composes the steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from opacus.accountants import PRVAccountant
from opacus.accountants.utils import get_noise_multiplier

from fedward.errors import PrivacyError
from fedward.plan.schema import Plan


@dataclass(frozen=True)
class Mechanism:
    """What a site does in each step, as the accountant sees it.

    Attributes
    ----------
    noise_multiplier : float
        Standard deviation of the noise over the clipping norm.
    sampling_rate : float
        Chance of a patient to be in a step.
    steps : int
        Steps over the whole study.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int


def sampling_rate(plan: Plan, patients: int) -> float:
    """Chance of one of a site's training patients to be in a step.

    Raises
    ------
    PrivacyError
        The site has no training patient.
    """
    if patients < 1:
        raise PrivacyError("private training needs patients", value=patients, fix="Bring more data")
    if plan.privacy.sampling_rate is not None:
        return plan.privacy.sampling_rate
    return min(1.0, plan.training.batch_size / patients)


def steps_per_round(plan: Plan, rate: float) -> int:
    """Private steps in a round: ``local_steps``, or what passes over the patients take."""
    if plan.training.local_steps is not None:
        return plan.training.local_steps
    return math.ceil((plan.training.local_epochs or 1) / rate)


def calibrate(plan: Plan, patients: int) -> Mechanism:
    """The mechanism that a site with so many training patients runs to meet the plan's target.

    Raises
    ------
    PrivacyError
        The plan asks for no privacy, or no noise reaches the target.
    """
    target = plan.privacy
    if target.epsilon is None or target.delta is None:
        raise PrivacyError("a plan without privacy has no noise to calibrate", fix="Set privacy.epsilon")
    rate = sampling_rate(plan, patients)
    steps = steps_per_round(plan, rate) * plan.rounds
    return Mechanism(noise_for(target.epsilon, target.delta, rate, steps), rate, steps)


@lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The smallest noise multiplier, to one part in five hundred, that keeps to (ε, δ).

    Rényi accounting, quick and never below the true cost, gives the upper end of the search; the
    tight accountant then needs few tries.

    Raises
    ------
    PrivacyError
        No finite noise reaches the target.
    """
    try:
        with _quiet():
            high = float(
                get_noise_multiplier(
                    target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps,
                    accountant="rdp", epsilon_tolerance=epsilon / 100,
                )
            )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise PrivacyError(
            "the target must be reachable with finite noise",
            value=f"epsilon {epsilon}, delta {delta}, {steps} steps at rate {rate:.4g}",
            fix="Raise epsilon or delta, or plan fewer steps",
            where="privacy",
        ) from error
    while epsilon_spent(high, rate, steps, delta) > epsilon:
        high *= 1.05
    low = 0.8 * high
    while high - low > high / 500:
        middle = (low + high) / 2
        if epsilon_spent(middle, rate, steps, delta) <= epsilon:
            high = middle
        else:
            low = middle
    return high


@lru_cache(maxsize=4096)
def epsilon_spent(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """ε that so many steps have cost at δ (an upper bound)."""
    if steps == 0:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, rate, steps)]
    with _quiet():
        return float(accountant.get_epsilon(delta))


@contextmanager
def _quiet() -> Iterator[None]:
    # The search tries noise levels far off, for which the accountant warns about overflow.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
