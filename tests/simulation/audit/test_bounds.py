"""Lower bounds on ε, held against independent computations and mechanisms of known ε."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from fedward.dp.accounting import epsilon_spent
from fedward_simulation.audit.bounds import (
    best_guesses,
    clopper_pearson,
    noise_at_most,
    noise_of_shares,
    one_run_epsilon,
    one_run_p_value,
    steps_epsilon,
)


def gaussian_delta(epsilon: float, noise: float) -> float:
    """δ of one Gaussian mechanism at ε: the mass by which one density exceeds e^ε the other."""

    def excess(x: float) -> float:
        return max(
            0.0,
            stats.norm.pdf(x, 1.0, noise) - math.exp(epsilon) * stats.norm.pdf(x, 0.0, noise),
        )

    return float(integrate.quad(excess, -20 * noise, 20 * noise, limit=500)[0])


@pytest.mark.parametrize(("successes", "trials"), [(0, 30), (3, 100), (57, 60), (40, 40)])
def test_clopper_pearson_is_scipys_exact_interval(successes: int, trials: int) -> None:
    # Each side at 97.5 % gives the two-sided interval at 95 %.
    found = clopper_pearson(successes, trials, 0.975)
    exact = stats.binomtest(successes, trials).proportion_ci(0.95, "exact")
    assert found == pytest.approx((exact.low, exact.high), abs=1e-9)


@pytest.mark.parametrize(("guesses", "correct"), [(20, 20), (50, 41), (120, 71)])
def test_without_delta_the_one_run_bound_is_the_binomial_tail(guesses: int, correct: int) -> None:
    """Of a pure mechanism each guess is right with a chance of e^ε / (1 + e^ε) at most."""
    epsilon = one_run_epsilon(200, guesses, correct, 0.0, 0.95)
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail = sum(
        math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k)
        for k in range(correct, guesses + 1)
    )
    assert tail == pytest.approx(0.05, rel=1e-4)


def test_with_delta_the_p_value_is_that_of_the_papers_own_program() -> None:
    """Steinke, Nasr and Jagielski, 2023, appendix D, as it is printed there."""

    def printed(m: int, r: int, v: int, eps: float, delta: float) -> float:
        q = 1 / (1 + math.exp(-eps))
        beta = stats.binom.sf(v - 1, r, q)
        alpha, sum_ = 0.0, 0.0
        for i in range(1, v + 1):
            sum_ = sum_ + stats.binom.pmf(v - i, r, q)
            if sum_ > i * alpha:
                alpha = sum_ / i
        return float(min(beta + alpha * delta * 2 * m, 1))

    for case in ((100, 80, 70, 1.0, 1e-3), (1000, 200, 160, 2.0, 1e-5), (50, 50, 50, 0.1, 1e-2)):
        assert one_run_p_value(*case) == pytest.approx(printed(*case), rel=1e-9)


def test_randomised_response_is_bounded_close_to_its_epsilon_and_not_above() -> None:
    """The mechanism for which the one-run bound is tight: each bit told truly with that chance."""
    rng, epsilon, above, found = np.random.default_rng(5), 2.0, 0, []
    for _ in range(100):
        inside = rng.random(1000) < 0.5
        truth = rng.random(1000) < 1 / (1 + math.exp(-epsilon))
        told = np.where(truth, inside, ~inside) + 1e-6 * rng.random(1000)
        found.append(best_guesses(told, inside, 0.0, 0.95).epsilon)
        above += found[-1] > epsilon
    assert above <= 11  # of 100 runs at 95 %: 5 expected at most
    assert np.mean(found) > 0.8 * epsilon


@pytest.mark.parametrize("noise", [0.7, 2.0])
def test_one_gaussian_mechanism_is_bounded_below_its_epsilon(noise: float) -> None:
    """Many canaries in one run, each with noise of its own; δ by integrating the densities."""
    rng, above, found, epsilon = np.random.default_rng(6), 0, [], 1.5
    delta = gaussian_delta(epsilon, noise)
    for _ in range(40):
        inside = rng.random(1000) < 0.5
        scores = inside + noise * rng.normal(size=1000)
        found.append(best_guesses(scores, inside, delta, 0.95).epsilon)
        above += found[-1] > epsilon
    assert above <= 6  # of 40 at 95 %: 2 expected at most


@pytest.mark.parametrize(("noise", "rate"), [(0.8, 1.0), (1.5, 0.5), (4.0, 0.5)])
def test_trials_of_a_step_bound_its_noise_and_come_close(noise: float, rate: float) -> None:
    rng, below, found = np.random.default_rng(7), 0, []
    thresholds = (0.5, noise, 2 * noise)
    for _ in range(60):
        drawn = rng.random(20_000) < rate
        inside = drawn + noise * rng.normal(size=20_000)
        outside = noise * rng.normal(size=20_000)
        found.append(noise_at_most(inside, outside, rate, thresholds, 0.95))
        below += found[-1] < noise
    assert below <= 8  # of 60 at 95 %: 3 expected at most
    assert np.median(found) < 1.6 * noise


def trials(
    rng: np.random.Generator, count: int, rate: float, noise: float, *, there: bool
) -> np.ndarray:
    """Observations of patients that give between three tenths and all of the clipping norm."""
    shares = rng.uniform(0.3, 1.0, count)
    drawn = (rng.random(count) < rate) & there
    return np.stack([shares * drawn + noise * rng.normal(size=count), shares], axis=1)


@pytest.mark.parametrize(("noise", "rate"), [(0.3, 0.5), (0.8, 1.0), (1.5, 0.5), (4.0, 0.5)])
def test_trials_of_different_shares_bound_the_noise(noise: float, rate: float) -> None:
    rng, below = np.random.default_rng(11), 0
    for _ in range(60):
        inside, outside = (trials(rng, 5_000, rate, noise, there=there) for there in (True, False))
        below += noise_of_shares(inside, outside, rate, noise, 0.95) < noise
    assert below <= 8  # of 60 at 95 %: 3 expected at most


def test_noise_that_is_not_there_is_found_where_patients_give_little_of_the_norm() -> None:
    """Each gives a third of it: never as much as half, which a fixed threshold would ask for."""
    rng = np.random.default_rng(12)
    drawn = (rng.random(150) < 0.5) / 3.0
    # What others give in the same direction blurs an observation, and stands in for no noise.
    inside, outside = (
        np.stack(
            [values + rng.normal(scale=0.08, size=len(values)), np.full(len(values), 1 / 3)], 1
        )
        for values in (drawn, np.zeros(230))
    )
    assert noise_at_most(inside[:, 0], outside[:, 0], 0.5, (0.5, 4.0, 8.0), 0.95) == math.inf
    most = noise_of_shares(inside, outside, 0.5, 4.0, 0.95)
    assert most < 1.0
    assert steps_epsilon(most, 0.5, 16, 1e-4) > 5


def test_the_epsilon_of_steps_is_below_the_truth_and_close_to_it() -> None:
    """A subsampled Gaussian mechanism of known cost, simulated directly."""
    noise, rate, steps, delta = 2.0, 0.5, 60, 1e-4
    truth = epsilon_spent(noise, rate, steps, delta)
    rng, found = np.random.default_rng(8), []
    for _ in range(8):
        drawn = rng.random(20_000) < rate
        inside = drawn + noise * rng.normal(size=20_000)
        outside = noise * rng.normal(size=20_000)
        most = noise_at_most(inside, outside, rate, (0.5, noise, 2 * noise), 0.95)
        found.append(steps_epsilon(most, rate, steps, delta))
    assert max(found) < truth
    assert np.median(found) > 0.6 * truth


def test_noise_that_is_not_there_is_found() -> None:
    """Promised a noise of 4, given none: the bound on the noise is far below the promise."""
    rng = np.random.default_rng(9)
    inside = (rng.random(600) < 0.5).astype(float)
    most = noise_at_most(inside, np.zeros(600), 0.5, (0.5, 4.0, 8.0), 0.95)
    assert most < 0.4
    assert steps_epsilon(most, 0.5, 10, 1e-4) > 10


def test_trials_that_tell_nothing_bound_nothing() -> None:
    rng = np.random.default_rng(10)
    values = rng.normal(size=(2, 500))
    assert noise_at_most(values[0], values[1], 0.5, (0.5, 1.0), 0.999) == math.inf
    assert steps_epsilon(math.inf, 0.5, 60, 1e-4) == 0.0


def test_little_noise_that_no_accountant_follows_still_has_a_bound() -> None:
    assert steps_epsilon(1e-9, 0.5, 10, 1e-4) > steps_epsilon(1.0, 0.5, 10, 1e-4) > 1
