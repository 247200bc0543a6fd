"""The moving average of models, against its closed form."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedward_strategies.averaging import blend, decay_at

VALUES = arrays(np.float32, (3, 2), elements=st.floats(-1e3, 1e3, width=32))


@given(VALUES, VALUES, st.floats(0.0, 0.999))
def test_blend_is_the_weighted_mean(before: np.ndarray, new: np.ndarray, decay: float) -> None:
    mixed = blend({"w": before}, {"w": new}, decay)["w"]
    assert mixed.dtype == np.float32
    expected = decay * before.astype(np.float64) + (1 - decay) * new.astype(np.float64)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-3)
    assert (np.minimum(before, new) - 1e-3 <= mixed).all()
    assert (mixed <= np.maximum(before, new) + 1e-3).all()


@given(VALUES, st.floats(0.0, 0.999))
def test_what_does_not_change_stays_bit_identical(value: np.ndarray, decay: float) -> None:
    assert blend({"w": value}, {"w": value.copy()}, decay)["w"].tobytes() == value.tobytes()


def test_counts_and_no_decay_take_the_newest() -> None:
    before, new = {"n": np.array([1, 2])}, {"n": np.array([3, 5])}
    np.testing.assert_array_equal(blend(before, new, 0.9)["n"], [3, 5])
    halves = {"w": np.array([1.0, 2.0])}, {"w": np.array([0.0, 7.0])}
    np.testing.assert_array_equal(blend(*halves, 0.0)["w"], [0, 7])


@given(st.integers(1, 10_000), st.floats(0.0, 0.999))
def test_decay_rises_to_what_was_asked_and_never_above(step: int, decay: float) -> None:
    assert 0.0 <= decay_at(step, decay) <= decay
    assert decay_at(step, decay) <= decay_at(step + 1, decay)
    assert decay_at(1, decay) == 0.0


def test_the_start_is_forgotten() -> None:
    models = [np.array([100.0])] + [np.array([1.0])] * 60
    average = {"w": models[0]}
    for step, model in enumerate(models, start=1):
        average = blend(average, {"w": model}, decay_at(step, 0.9))
    assert abs(average["w"][0] - 1.0) < 0.05
