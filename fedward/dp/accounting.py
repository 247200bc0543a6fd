"""Privacy arithmetic: what an update costs, and how much noise a target needs.

The mechanism is DP-SGD (Abadi et al., 2016, arXiv:1607.00133) with the patient as the unit: each
step draws every patient with the same chance, bounds what one patient adds to the gradient, and
adds Gaussian noise. The steps are composed by Opacus' parts for privacy random variables (Gopi et
al., 2021, arXiv:2106.02848).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from fedward.errors import PrivacyError
from fedward.plan.schema import CENTERING_STEPS, Plan
from fedward.rule_codes import RuleCode

# Opacus is imported where it is used: its import takes longer than torch's, and a process that
# meets no private plan needs none of it.
if TYPE_CHECKING:
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.prv import Domain

_MOST_NOISE = 1e6
_ERROR = 0.01  # that the accountant may make in ε, always upwards
_MOST_POINTS = 2**25  # of its grid; more would take gigabytes
_ORDERS = list(range(2, 64))
_FILTER_ORDERS = (*_ORDERS, 64, 80, 96, 128, 192, 256, 384, 512)
_MOST_DELTA = 3  # δ = 1e-3, for however few patients

_History = tuple[tuple[float, float, int], ...]  # noise multiplier, sampling rate, steps


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
        raise PrivacyError(
            RuleCode.NEEDS_PATIENTS, values={"patients": patients}, fix="Bring more data"
        )
    if plan.privacy.sampling_rate is not None:
        return plan.privacy.sampling_rate
    return min(1.0, plan.training.batch_size / patients)


def steps_per_round(plan: Plan, rate: float) -> int:
    """Private steps in a round: ``local_steps``, or what passes over the patients take."""
    if plan.training.local_steps is not None:
        return plan.training.local_steps
    return math.ceil((plan.training.local_epochs or 1) / rate)


def private_steps_in(plan: Plan, rate: float, round_: int) -> int:
    """Private steps in this round.

    Those of the round that measures the mean of the features have the noise and the sampling of all
    others, so that a study is one kind of step to every accountant.
    """
    if plan.is_centering(round_):
        return plan.privacy.centering_steps or CENTERING_STEPS
    return steps_per_round(plan, rate) * plan.passes(round_)


def private_steps_until(plan: Plan, rate: float, round_: int) -> int:
    """Private steps of the rounds up to this one."""
    later = plan.passes_until(round_) - plan.passes(1)
    return private_steps_in(plan, rate, 1) + steps_per_round(plan, rate) * later


def steps_in_round(plan: Plan, images: int, patients: int, round_: int = 0) -> int:
    """Steps of a round at a site with so many training images and patients.

    Round 0 stands for one pass of the local training, of which a round may have several.
    """
    if plan.privacy.on:
        return private_steps_in(plan, sampling_rate(plan, patients), round_)
    if plan.is_centering(round_):
        return 1
    training = plan.training
    if training.local_steps is not None:
        return training.local_steps * plan.passes(round_)
    batches = max(1, round(images / training.batch_size))
    return batches * (training.local_epochs or 1) * plan.passes(round_)


def calibrate(plan: Plan, patients: int) -> Mechanism:
    """The mechanism that a site with so many training patients runs to meet the plan's target.

    Raises
    ------
    PrivacyError
        The plan asks for no privacy, or no noise reaches the target.
    """
    target = plan.privacy
    if target.epsilon is None or target.delta is None:
        raise PrivacyError(RuleCode.NEEDS_PRIVACY, fix="Set privacy.epsilon")
    rate = sampling_rate(plan, patients)
    steps = private_steps_until(plan, rate, plan.last_round)
    return Mechanism(noise_for(target.epsilon, target.delta, rate, steps), rate, steps)


@lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """A noise multiplier with which so many steps cost at most ε at δ, and hardly less.

    Raises
    ------
    PrivacyError
        No sensible noise reaches the target.
    """
    cost = partial(_cost_of, rate=rate, steps=steps, delta=delta)
    noise = _tighten(_safe_start(epsilon, delta, rate, steps), cost, epsilon)
    if noise > _MOST_NOISE:
        raise PrivacyError(
            RuleCode.TARGET,
            values={"epsilon": epsilon, "delta": delta, "steps": steps, "rate": rate},
            value=f"epsilon {epsilon}, delta {delta}, {steps} steps at rate {rate:.4g}",
            fix="Raise epsilon or delta, or plan fewer steps",
            where="privacy",
        )
    # Upwards to six places: the accountant's last digits differ from machine to machine.
    return math.ceil(noise * 1e6) / 1e6


def _cost_of(noise: float, rate: float, steps: int, delta: float) -> float:
    try:
        return epsilon_spent(noise, rate, steps, delta)
    except PrivacyError:
        return math.inf  # so little noise that the accountant cannot follow


def _safe_start(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Noise that is surely enough: Rényi accounting's, or the Gaussian mechanism's bound.

    The tight accountant needs ever more memory the smaller the noise, so the search comes from
    above. The Gaussian bound (Dwork and Roth, 2014, theorem A.1) ignores the sampling.
    """
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _quiet():
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=rate,
                    steps=steps,
                    accountant="rdp",
                    epsilon_tolerance=epsilon / 3,
                    alphas=_ORDERS,
                )
            )
    except (ValueError, RuntimeError, ArithmeticError):
        return math.sqrt(2 * math.log(1.25 / delta) * steps) / min(epsilon, 1.0)


def _tighten(start: float, cost: Callable[[float], float], epsilon: float) -> float:
    """The smallest noise whose cost lies within half a percent under the target.

    Cost falls with noise nearly as a power, so a secant in logarithms needs few of its costly
    evaluations; the bracket keeps it safe.
    """
    low, high = 0.0, math.inf
    noise, slope, before = start, 1.0, None
    for _ in range(40):
        if noise > _MOST_NOISE:
            break
        spent = cost(noise)
        if 0.995 * epsilon <= spent <= epsilon:
            return noise
        low, high = (low, noise) if spent <= epsilon else (noise, high)
        if before is not None and before[0] != noise and before[1] != spent < math.inf:
            slope = -math.log(spent / before[1]) / math.log(noise / before[0])
        before = (noise, spent) if spent < math.inf else before
        guess = noise * (spent / (0.998 * epsilon)) ** (1.0 / max(slope, 0.2))
        inside = low < guess < high
        noise = guess if inside else (low + high) / 2 if math.isfinite(high) else 2 * noise
    return high


@lru_cache(maxsize=4096)
def epsilon_spent(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """ε that so many steps have cost at δ (an upper bound).

    Raises
    ------
    PrivacyError
        There is so little noise, or so many steps, that no accountant can follow.
    """
    if steps == 0:
        return 0.0
    spent = _prv(((noise_multiplier, rate, steps),), delta)
    if spent is not None:
        return spent
    raise PrivacyError(
        RuleCode.COST,
        values={"noise": noise_multiplier, "steps": steps, "rate": rate, "delta": delta},
        value=f"noise {noise_multiplier:.4g}, {steps} steps at rate {rate:.4g}, delta {delta}",
        fix="Plan fewer steps, or a larger delta",
        where="privacy",
    )


def default_delta(patients: int) -> float:
    """The largest power of ten that is at most 1 / (10 patients), and at most 1e-3.

    At δ = 1 / n, publishing one patient of n whole would be allowed (Dwork and Roth, 2014, section
    2.3). A power of ten tells whoever is refused no more than the order of magnitude of n.
    """
    return float(f"1e-{max(_MOST_DELTA, len(str(max(patients, 1) - 1)) + 1)}")


def epsilon_composed(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """ε at δ (an upper bound) of mechanisms that ran over the same patients, one after another.

    The mechanisms must have been fixed before the first of them ran; their outputs may depend on
    earlier outputs, and some of them may be left out on the way: what dominates each of them for
    all earlier outputs dominates the whole (Zhu, Dong and Wang, 2022, arXiv:2106.08567, theorem
    10). Where settings are chosen on the way, take :func:`epsilon_filtered`.

    Where the tight accountant cannot follow, Rényi accounting (Mironov, 2017, arXiv:1702.07476)
    bounds the same ε from farther above.

    Parameters
    ----------
    mechanisms : iterable of Mechanism
        ``steps`` are those that were taken. The order does not matter.
    delta : float
        For all of them together.

    Raises
    ------
    PrivacyError
        No accountant can follow.
    """
    total: Counter[tuple[float, float]] = Counter()
    for one in mechanisms:
        total[one.noise_multiplier, one.sampling_rate] += one.steps
    return _composed(tuple(sorted((noise, rate, n) for (noise, rate), n in total.items())), delta)


def epsilon_filtered(mechanisms: Iterable[Mechanism], delta: float, cap: float) -> float:
    """ε at δ of mechanisms that were chosen one after another, to be held against a cap.

    A Rényi filter. While Rényi divergences of one order α, fixed in advance, add up to at most B,
    all outputs together are (α, B)-Rényi private, however each mechanism was chosen from what came
    before it (Feldman and Zrnic, 2021, arXiv:2008.11193): the exponential of α - 1 times (privacy
    loss so far less divergence so far) is a supermartingale. The order follows from cap and δ
    alone; it is the one at which the most Gaussian mechanisms fit under the cap. From Rényi to ε:
    Balle et al., 2020, arXiv:1905.09982, theorem 21.

    Parameters
    ----------
    mechanisms : iterable of Mechanism
        All that ran, and those that are considered.
    delta : float
        For all of them together.
    cap : float
        The ε that must not be exceeded. The answer is an upper bound for any cap that was fixed
        before the first mechanism, and closest where it is near the cap.

    Returns
    -------
    float
        0 if there are none; infinity if no order can follow. Even little costs the conversion's
        own share of ε, up to half of the cap.
    """
    order = _filter_order(cap, delta)
    spent = sum(
        _divergence(one.noise_multiplier, one.sampling_rate, order) * one.steps
        for one in mechanisms
        if one.steps
    )
    return _from_renyi(order, spent, delta) if spent else 0.0


@lru_cache(maxsize=256)
def _filter_order(cap: float, delta: float) -> int:
    return max(_FILTER_ORDERS, key=lambda order: (cap - _from_renyi(order, 0.0, delta)) / order)


@lru_cache(maxsize=4096)
def _divergence(noise: float, rate: float, order: int) -> float:
    """Rényi divergence of one step, in nats (Mironov, Talwar and Zhang, 2019, arXiv:1908.10530)."""
    from opacus.accountants.analysis.rdp import compute_rdp

    with suppress(ValueError, RuntimeError, ArithmeticError), _quiet():
        found = float(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=[order])[0])
        # What is not a number is above no cap, and must not pass as a cost.
        return found if found >= 0 else math.inf
    return math.inf


def _from_renyi(order: int, divergence: float, delta: float) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with _quiet():
        spent, _ = get_privacy_spent(orders=[order], rdp=[divergence], delta=delta)
    return max(0.0, float(spent))


@lru_cache(maxsize=4096)
def _composed(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    history = tuple(entry for entry in history if entry[2])
    if not history:
        return 0.0
    spent = _prv(history, delta)
    if spent is None:
        spent = _rdp(history, delta)
    if spent is not None:
        return spent
    raise PrivacyError(
        RuleCode.COSTS,
        value=f"{sum(steps for *_, steps in history)} steps of {len(history)} kinds",
        fix="Plan more noise, or a larger delta",
        where="privacy",
    )


def _prv(history: _History, delta: float) -> float | None:
    from opacus.accountants.analysis.prv import (
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        compose_heterogeneous,
        discretize,
    )

    # Numbers out of the range of floats end as a grid that is too large does.
    with suppress(ValueError, RuntimeError, ArithmeticError), _quiet():
        error = delta / 1000
        grid, counts = _grid(history, error), [steps for *_, steps in history]
        if grid is None:
            return None
        losses = [PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in history]
        cut = [TruncatedPrivacyRandomVariable(loss, grid.t_min, grid.t_max) for loss in losses]
        composed = compose_heterogeneous([discretize(one, grid) for one in cut], counts)
        *_, highest = composed.compute_epsilon(delta, error, _ERROR)
        return _sensible(float(highest))
    return None


def _grid(history: _History, error: float) -> Domain | None:
    """Where the composed privacy loss is looked at; None if that takes too many points.

    The ends need only a bound of ε (Gopi et al., 2021, remark 5.6). Each Rényi order gives one;
    those of fractional orders are hardly closer, and take a hundred times as long.
    """
    from opacus.accountants.analysis.prv import Domain

    steps = sum(count for *_, count in history)
    single = [_bound([(noise, rate, 1)], error / (8 * steps)) for noise, rate, _ in history]
    half = max(*single, _bound(history, error / 4), _ERROR) + 3
    mesh = _ERROR / math.sqrt(steps * math.log(12 / error) / 2)
    return Domain.create_aligned(-half, half, mesh) if 2 * half / mesh <= _MOST_POINTS else None


def _bound(history: Iterable[tuple[float, float, int]], delta: float) -> float:
    return float(_accountant(history).get_epsilon(delta, alphas=_ORDERS))


def _rdp(history: _History, delta: float) -> float | None:
    with suppress(ValueError, RuntimeError, ArithmeticError), _quiet():
        return _sensible(float(_accountant(history).get_epsilon(delta)))
    return None


def _accountant(history: Iterable[tuple[float, float, int]]) -> RDPAccountant:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(history)
    return accountant


def _sensible(epsilon: float) -> float | None:
    # What is not a number is above no cap, and must not pass as a cost.
    return epsilon if math.isfinite(epsilon) and epsilon >= 0 else None


@contextmanager
def _quiet() -> Iterator[None]:
    # The search tries noise levels far off, for which the accountant warns about overflow.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
