"""Privacy arithmetic against an independent accountant (Google's privacy loss distributions)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.dp.accounting import (
    Mechanism,
    calibrate,
    default_delta,
    epsilon_composed,
    epsilon_filtered,
    epsilon_spent,
    noise_for,
    private_steps_in,
    private_steps_until,
    sampling_rate,
    steps_per_round,
)
from fedward.errors import PrivacyError
from fedward.plan import Plan
from fedward.plan.schema import CENTERING_STEPS

PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
MakePlan = Callable[..., Plan]


@cache
def independent(noise: float, rate: float, steps: int, delta: float) -> float:
    accountant = PLDAccountant()
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(delta))


def full_batch(noise: float, steps: int, delta: float) -> float:
    """ε of the Gaussian mechanism by its closed form (Balle and Wang, 2018, theorem 8)."""
    mu = math.sqrt(steps) / noise

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        reached = normal(mu / 2 - middle / mu) - math.exp(middle) * normal(-mu / 2 - middle / mu)
        low, high = (middle, high) if reached > delta else (low, middle)
    return high


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [
        (0.8, 0.1, 100, 1e-4),
        (1.1, 0.05, 500, 1e-5),
        (2.0, 0.3, 350, 1e-4),
        (4.0, 0.3, 350, 1e-4),
        (1.0, 0.01, 2000, 1e-6),
        (10.0, 0.5, 60, 1e-3),
    ],
)
def test_epsilon_agrees_with_an_independent_accountant(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    ours, theirs = epsilon_spent(noise, rate, steps, delta), independent(noise, rate, steps, delta)
    # Both are upper bounds; Opacus allows itself an absolute error of 0.01 in epsilon.
    assert ours >= theirs - 0.001
    assert ours <= theirs * 1.01 + 0.02


@pytest.mark.parametrize(("noise", "steps"), [(2.0, 1), (5.0, 20), (10.0, 300)])
def test_without_sampling_it_is_the_gaussian_mechanism(noise: float, steps: int) -> None:
    exact = full_batch(noise, steps, 1e-5)
    assert exact - 1e-6 <= epsilon_spent(noise, 1.0, steps, 1e-5) <= exact * 1.005 + 0.02


def test_no_step_costs_nothing() -> None:
    assert epsilon_spent(1.0, 0.1, 0, 1e-5) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
@pytest.mark.parametrize(
    ("delta", "rate", "steps"), [(1e-4, 0.3, 350), (1e-5, 0.02, 1000), (1e-3, 1.0, 30)]
)
def test_noise_meets_the_target_and_hardly_more(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    noise = noise_for(epsilon, delta, rate, steps)
    assert 0.98 * epsilon <= epsilon_spent(noise, rate, steps, delta) <= epsilon
    # The other accountant allows a little less for what only one of them rounds up.
    assert independent(noise, rate, steps, delta) <= epsilon * 1.001


def test_noise_of_a_lax_target_is_small_and_enough() -> None:
    noise = noise_for(20.0, 1e-3, 0.1, 10)
    assert noise < 0.6
    assert independent(noise, 0.1, 10, 1e-3) <= 20.0


@given(
    noise=st.floats(0.9, 4.0),
    rate=st.floats(0.01, 0.5),
    steps=st.integers(1, 300),
)
@settings(max_examples=3, deadline=None)
def test_cost_rises_with_steps_and_rate_and_falls_with_noise(
    noise: float, rate: float, steps: int
) -> None:
    cost, slack = epsilon_spent(noise, rate, steps, 1e-4), 0.015
    assert epsilon_spent(noise, rate, 2 * steps, 1e-4) >= cost - slack
    assert epsilon_spent(noise, min(1.0, 2 * rate), steps, 1e-4) >= cost - slack
    assert epsilon_spent(2 * noise, rate, steps, 1e-4) <= cost + slack
    assert epsilon_spent(noise, rate, steps, 1e-3) <= cost + slack


@pytest.mark.parametrize(
    ("batch", "patients", "rate"), [(8, 40, 0.2), (8, 8, 1.0), (64, 10, 1.0), (1, 1000, 0.001)]
)
def test_sampling_rate_is_batch_over_patients(
    make_plan: MakePlan, batch: int, patients: int, rate: float
) -> None:
    plan = make_plan(privacy=PRIVATE, training={"batch_size": batch})
    assert sampling_rate(plan, patients) == pytest.approx(rate)


def test_sampling_rate_of_the_plan_holds_everywhere(make_plan: MakePlan) -> None:
    plan = make_plan(privacy={**PRIVATE, "sampling_rate": 0.3})
    assert {sampling_rate(plan, patients) for patients in (1, 10, 10_000)} == {0.3}


def test_nobody_has_no_sampling_rate(make_plan: MakePlan) -> None:
    for privacy in (PRIVATE, {**PRIVATE, "sampling_rate": 0.3}):
        with pytest.raises(PrivacyError, match="needs patients"):
            calibrate(make_plan(privacy=privacy), 0)


@pytest.mark.parametrize(
    ("amount", "rate", "steps"),
    [
        ({"local_epochs": 1}, 0.25, 4),
        ({"local_epochs": 3}, 0.25, 12),
        ({"local_epochs": 1}, 0.3, 4),
        ({"local_epochs": 1}, 1.0, 1),
        ({"local_epochs": None, "local_steps": 7}, 0.25, 7),
    ],
)
def test_steps_per_round(
    make_plan: MakePlan, amount: dict[str, int | None], rate: float, steps: int
) -> None:
    plan = make_plan(privacy={**PRIVATE, "sampling_rate": rate}, training=amount)
    assert steps_per_round(plan, rate) == steps


@pytest.mark.parametrize(("epsilon", "given"), [(8.0, 12), (3.0, None), (1.0, 40)])
def test_the_mean_of_the_features_shares_the_studys_epsilon(
    make_plan: MakePlan, epsilon: float, given: int | None
) -> None:
    """Against an accountant that composes the release of the mean and the training steps itself."""
    plan = make_plan(
        model={"feature_centering": True},
        training={"rounds": 30, "local_epochs": None, "local_steps": 2},
        privacy={**PRIVATE, "epsilon": epsilon, "sampling_rate": 0.4, "centering_steps": given},
    )
    whole, centering = calibrate(plan, 100), given or CENTERING_STEPS
    step = PoissonSampledDpEvent(0.4, GaussianDpEvent(whole.noise_multiplier))
    accountant = PLDAccountant()
    accountant.compose(step, centering)
    alone = float(accountant.get_epsilon(1e-3))
    accountant.compose(step, 30 * 2)
    assert 0.98 * epsilon <= float(accountant.get_epsilon(1e-3)) <= epsilon
    assert [private_steps_in(plan, 0.4, n) for n in (1, 2, 31)] == [centering, 2, 2]
    assert [private_steps_until(plan, 0.4, n) for n in (1, 2, 31)] == [
        centering,
        centering + 2,
        whole.steps,
    ]
    spent = epsilon_spent(whole.noise_multiplier, 0.4, private_steps_until(plan, 0.4, 1), 1e-3)
    assert alone - 0.001 <= spent <= alone * 1.01 + 0.02


def test_each_site_gets_noise_for_its_own_size(make_plan: MakePlan) -> None:
    plan = make_plan(privacy=PRIVATE, training={"rounds": 5, "local_epochs": 2})
    small, large = calibrate(plan, 16), calibrate(plan, 400)
    assert (small.sampling_rate, large.sampling_rate) == (0.5, 0.02)
    assert (small.steps, large.steps) == (20, 500)
    assert small.noise_multiplier > large.noise_multiplier
    for one in (small, large):
        spent = epsilon_spent(one.noise_multiplier, one.sampling_rate, one.steps, 1e-3)
        assert 7.84 <= spent <= 8.0


def test_stages_count_as_rounds(make_plan: MakePlan) -> None:
    plan = make_plan(
        privacy=PRIVATE,
        training={"rounds": None, "learning_rate": None},
        stages=[
            {"name": "head", "rounds": 3, "learning_rate": 0.1, "train": ["fc.*"]},
            {"name": "all", "rounds": 4, "learning_rate": 0.1},
        ],
    )
    assert calibrate(plan, 16).steps == 7 * 2


def test_a_plan_without_privacy_has_no_noise(make_plan: MakePlan) -> None:
    with pytest.raises(PrivacyError, match="no noise to calibrate"):
        calibrate(make_plan(), 100)


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [
        (1e-3, 1e-6, 1.0, 1000),
        (1e-6, 1e-12, 1.0, 10_000),
        (1e-9, 1e-300, 1.0, 10**9),
        (0.01, 1e-10, 0.9, 10_000),
        (100.0, 0.99, 1.0, 1),
    ],
)
def test_an_extreme_target_is_met_or_refused(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    try:
        noise = noise_for(epsilon, delta, rate, steps)
    except PrivacyError as error:
        assert "privacy" in str(error)
        return
    assert noise > 0
    assert epsilon_spent(noise, rate, steps, delta) <= epsilon


@pytest.mark.parametrize(
    ("kinds", "delta"),
    [
        ([(1.0, 0.1, 50), (2.0, 0.3, 100)], 1e-5),
        ([(0.5, 0.05, 10), (50.0, 1.0, 1000)], 1e-3),
        ([(4.0, 0.3, 350)] * 3, 1e-5),
        ([(4.0, 0.3, 350), (1.1, 0.05, 500), (2.0, 0.5, 20), (1.1, 0.051, 500)], 1e-3),
    ],
)
def test_different_mechanisms_compose_as_an_independent_accountant_says(
    kinds: list[tuple[float, float, int]], delta: float
) -> None:
    accountant = PLDAccountant()
    for noise, rate, steps in kinds:
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    theirs = float(accountant.get_epsilon(delta))
    ours = epsilon_composed([Mechanism(*kind) for kind in kinds], delta)
    assert theirs - 0.001 <= ours <= theirs * 1.005
    assert ours == epsilon_composed([Mechanism(*kind) for kind in reversed(kinds)], delta)


@pytest.mark.parametrize(("epsilon", "rounds"), [(1.0, 7), (8.0, 20)])
def test_the_rounds_of_a_study_cost_together_what_it_was_calibrated_to(
    make_plan: MakePlan, epsilon: float, rounds: int
) -> None:
    plan = make_plan(
        privacy={**PRIVATE, "epsilon": epsilon, "delta": 1e-4}, training={"rounds": rounds}
    )
    whole = calibrate(plan, 100)
    steps = steps_per_round(plan, whole.sampling_rate)
    one = Mechanism(whole.noise_multiplier, whole.sampling_rate, steps)
    spent = [epsilon_composed([one] * n, 1e-4) for n in (0, 1, rounds - 1, rounds)]
    assert spent == sorted(spent)
    assert 0.98 * epsilon <= spent[-1] <= epsilon


def test_where_the_tight_accountant_cannot_follow_a_looser_one_bounds() -> None:
    kinds = [Mechanism(0.31, 1.0, 4000), Mechanism(5.0, 0.1, 10)]
    mean = 4000 / (2 * 0.31**2)  # of the privacy loss of the first alone
    assert mean <= epsilon_composed(kinds, 1e-5) <= 1.15 * mean
    with pytest.raises(PrivacyError):
        epsilon_composed([Mechanism(1e-200, 1.0, 1), *kinds], 1e-5)


@pytest.mark.parametrize("cap", [0.5, 1.0, 3.0, 8.0, 10.0, 50.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_the_filter_is_one_order_of_an_independent_renyi_accountant(
    cap: float, delta: float
) -> None:
    mechanisms = [Mechanism(3.4, 0.5, 150), Mechanism(1.1, 0.05, 200), Mechanism(20.0, 1.0, 3)]
    reached = {}
    for order in (*range(2, 64), 64, 80, 96, 128, 192, 256, 384, 512):
        accountant = RdpAccountant([order])
        for one in mechanisms:
            step = PoissonSampledDpEvent(one.sampling_rate, GaussianDpEvent(one.noise_multiplier))
            accountant.compose(step, one.steps)
        reached[order] = float(accountant.get_epsilon(delta))
    ours = epsilon_filtered(mechanisms, delta, cap)
    assert min(abs(ours - one) / one for one in reached.values()) < 1e-6
    # Only the cap and δ choose the order, so it is not the best one for these mechanisms.
    assert ours >= min(reached.values()) - 1e-6
    assert ours >= epsilon_composed(mechanisms, delta) - 0.02


def test_the_filter_of_nothing_costs_nothing_and_of_no_noise_everything() -> None:
    assert epsilon_filtered([], 1e-4, 8.0) == 0.0
    assert epsilon_filtered([Mechanism(1.0, 0.1, 0)], 1e-4, 8.0) == 0.0
    assert epsilon_filtered([Mechanism(0.0, 0.1, 1)], 1e-4, 8.0) == math.inf
    assert epsilon_filtered([Mechanism(1e-3, 0.1, 1)], 1e-4, 8.0) > 1e5


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0])
def test_what_the_filter_costs_more_where_it_fills_the_cap(epsilon: float) -> None:
    noise = noise_for(epsilon, 1e-4, 0.5, 254)  # as studies/pneumonia-transfer.toml
    filtered = epsilon_filtered([Mechanism(noise, 0.5, 254)], 1e-4, epsilon)
    assert 1.05 * epsilon < filtered < 1.12 * epsilon


@given(patients=st.integers(0, 10**9))
def test_the_default_delta_is_a_power_of_ten_well_below_one_patient(patients: int) -> None:
    delta = default_delta(patients)
    assert delta <= 1e-3
    assert delta * 10 * patients <= 1 + 1e-9
    assert delta == 1e-3 or delta * 100 * patients > 1
    assert float(f"1e{round(math.log10(delta))}") == delta
