"""The noise is Gaussian, exactly rounded, and the same however it is computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from scipy import stats

from fedward.dp import gaussian
from fedward.dp.gaussian import SLACK, GaussianNoise, Grid
from fedward.dp.keystream import derive_key

LARGE = Grid.over(1.3, 0.7, 7_000_000)


def noise(key: int, count: int, grid: Grid = LARGE) -> np.ndarray[Any, Any]:
    return GaussianNoise(derive_key(key)).steps(grid, count).numpy()


def test_it_is_normal_with_the_stated_deviation() -> None:
    count = 1_000_000
    values = noise(0, count) * LARGE.step / (1.3 * 0.7 * (1 + SLACK))
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs(stats.skew(values)) < 4 * math.sqrt(6 / count)
    assert abs(stats.kurtosis(values)) < 4 * math.sqrt(24 / count)
    # The streams are fixed, so these either always pass or never.
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert stats.anderson(values[:100_000], "norm", method="interpolate").pvalue > 0.01


def test_its_tails_are_those_of_a_normal_variable() -> None:
    count = 4_000_000
    values = np.abs(noise(1, count)) / LARGE.ratio
    for beyond in (3.0, 4.0, 4.5):
        expected = count * 2 * stats.norm.sf(beyond)
        assert abs((values > beyond).sum() - expected) < 4 * math.sqrt(expected)
    assert values.max() > 4.8  # about six of four million


def test_numbers_and_steps_are_independent() -> None:
    source = GaussianNoise(derive_key(2))
    steps = [source.steps(LARGE, 200_000).numpy() / LARGE.ratio for _ in range(2)]
    pairs = {
        "next": (steps[0][:-1], steps[0][1:]),
        "cosine and sine": (steps[0][:2048], steps[0][2048:4096]),
        "unit": (steps[0][:-4096], steps[0][4096:]),
        "step": (steps[0], steps[1]),
    }
    for name, (one, other) in pairs.items():
        for power in (1, 2):
            left, right = one**power - (power == 2), other**power - (power == 2)
            correlation = (left * right).mean() / (left.std() * right.std())
            assert abs(correlation) < 4 / math.sqrt(len(left)), (name, power)


def test_a_patient_s_bound_and_the_grid_are_within_the_slack() -> None:
    for count in (1, 10, 1000, 25_000_000):
        for bound in (1e-3, 0.7, 1.0, 50.0):
            grid = Grid.over(1.0, bound, count)
            assert math.frexp(grid.step)[0] == 0.5  # a power of two
            assert grid.step * math.sqrt(count) <= bound * SLACK / 2
            assert grid.deviation == bound * (1 + SLACK)


def test_every_number_is_the_exact_one() -> None:
    """Computed again with many digits, all of them: the quick way must give the same."""
    count, source = 8192, derive_key(3)
    quick = GaussianNoise(source).steps(LARGE, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gaussian, "_NEAR", math.inf
        )  # no radius is far enough: all are computed again
        exact = GaussianNoise(source).steps(LARGE, count)
    assert torch.equal(quick, exact)


def test_what_is_too_close_to_call_is_computed_again() -> None:
    """With a margin a million times as wide, many numbers are; none may change."""
    calls, exactly = [], gaussian._exactly
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian, "_ERROR", gaussian._ERROR * 2**14)
        patch.setattr(gaussian, "_exactly", lambda *a: calls.append(a) or exactly(*a))
        wide = GaussianNoise(derive_key(4)).steps(LARGE, 100_000)
    assert torch.equal(wide, GaussianNoise(derive_key(4)).steps(LARGE, 100_000))
    share = 2 * gaussian._ERROR * 2**14 * LARGE.ratio
    assert len(calls) == pytest.approx(100_000 * share, rel=0.5)


@given(
    radius=st.integers(0, 2**63 - 1)
    | st.integers(1, 63).map(lambda bits: 2**bits - 1)
    | st.integers(1, 62).map(lambda bits: 2**63 - 2**bits),
    angle=st.integers(-(2**63), 2**63 - 1),
    rest=st.sampled_from([2.0**-100, 1.0]),
)
@settings(max_examples=300)
def test_the_error_is_within_its_bound(radius: int, angle: int, rest: float) -> None:
    """With this machine's functions, and the bits not yet drawn all 0 or all 1."""
    made = gaussian._BoxMuller(1, 2.0**20, torch.device("cpu"))
    made.words[:, 0], made.words[:, 1] = radius, angle
    unsure = made.run()
    value = made.steps[0, :, 0] + made._rest[0, :, 0] - float(made._half)  # before its rounding
    with mp.workprec(200):
        size = mp.sqrt(-2 * mp.log((radius + mp.mpf(rest)) / 2**63))
        turn = (angle + mp.mpf(rest)) / 2**63
        for part, exact in enumerate((size * mp.cospi(turn), size * mp.sinpi(turn))):
            if not gaussian._NEAR * (1 - 1e-6) < size < gaussian._FAR * (1 + 1e-6):
                assert (0, part, 0) in unsure
            elif gaussian._NEAR < size < gaussian._FAR:
                assert abs(mp.mpf(float(value[part])) / 2**20 - exact) < gaussian._ERROR


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_the_cut_into_tensors_change_nothing(threads: int) -> None:
    shapes = [(3, 70_000), (5,), (1,), (64, 64), (200_001,), (7, 7)]
    values = torch.randn(sum(math.prod(shape) for shape in shapes))
    flat, parts = (
        values.clone(),
        [
            part.clone().view(shape)
            for part, shape in zip(
                values.split([math.prod(shape) for shape in shapes]), shapes, strict=True
            )
        ],
    )
    GaussianNoise(derive_key(5)).add_([flat], 1.1, 0.9)
    torch.set_num_threads(threads)
    GaussianNoise(derive_key(5)).add_(parts, 1.1, 0.9)
    assert torch.equal(flat, torch.cat([part.flatten() for part in parts]))


def test_it_is_added_to_the_sum_on_the_grid() -> None:
    count = 5000
    sums = torch.randn(count)
    grid = Grid.over(1.5, 2.0, count)
    steps = GaussianNoise(derive_key(6)).steps(grid, count)
    noisy = sums.clone()
    GaussianNoise(derive_key(6)).add_([noisy], 1.5, 2.0)
    on_grid = torch.round(sums.double() / grid.step) + steps
    assert torch.equal(noisy, (on_grid * grid.step).float())
    assert float((noisy - sums).std()) == pytest.approx(3.0 * (1 + SLACK), rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_noise() -> None:
    count = 5_000_000
    gpu = GaussianNoise(derive_key(7)).steps(LARGE, count, "cuda").cpu()
    assert torch.equal(gpu, GaussianNoise(derive_key(7)).steps(LARGE, count))
