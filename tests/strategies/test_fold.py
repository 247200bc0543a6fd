"""The running mean, against exact fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward_strategies.fold import Fold

VALUES = st.floats(-1e6, 1e6, width=32)


def folded(updates: list[tuple[list[float], int]]) -> np.ndarray:
    fold = Fold()
    for values, weight in updates:
        fold.add({"w": np.array(values, np.float32)}, weight)
    return fold.mean()["w"]


@given(
    st.lists(
        st.tuples(st.lists(VALUES, min_size=3, max_size=3), st.integers(1, 100_000)),
        min_size=1,
        max_size=4,
    )
)
def test_the_mean_is_exact_and_has_no_order(updates: list[tuple[list[float], int]]) -> None:
    total = sum(weight for _, weight in updates)
    exact = [
        np.float32(float(sum(Fraction(values[i]) * weight for values, weight in updates) / total))
        for i in range(3)
    ]
    for order in itertools.permutations(updates):
        np.testing.assert_array_equal(folded(list(order)), np.array(exact, np.float32))


def test_dtypes_shapes_and_cancellation() -> None:
    fold = Fold()
    fold.add({"a": np.float32([[1e8]]), "b": np.array(3.0)}, 3)
    fold.add({"a": np.float32([[-1e8]]), "b": np.array(5.0)}, 3)
    fold.add({"a": np.float32([[0.5]]), "b": np.array(4.0)}, 1)
    mean = fold.mean()
    assert mean["a"].dtype == np.float32
    assert mean["a"].shape == (1, 1)
    assert mean["a"].item() == pytest.approx(0.5 / 7, rel=1e-7)
    assert mean["b"].item() == pytest.approx(4.0)
    assert fold.weight == 7


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="update"):
        Fold().mean()
