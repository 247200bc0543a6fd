"""Caps of weights and bounds of norms, against a computation of another kind."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward_strategies.robust import NormBound, capped_weights, dominates, most_capped

WEIGHTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 10**7), min_size=1, max_size=9
)
SHARES = st.floats(0.05, 1.0)


def by_bisection(weights: dict[str, int], share: float) -> dict[str, float]:
    """The largest level that is at most a share of the sum of what lies below it."""
    low, high = 0.0, float(max(weights.values()))
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(min(weight, middle) for weight in weights.values())
        low, high = (middle, high) if middle <= share * total else (low, middle)
    return {site: min(weight, high) for site, weight in weights.items()}


@given(WEIGHTS, SHARES)
def test_no_site_has_more_than_its_share(weights: dict[str, int], share: float) -> None:
    capped = capped_weights(weights, share)
    assert list(capped) == list(weights)
    total = sum(capped.values())
    assert all(0 < capped[site] <= weights[site] for site in weights)
    assert max(capped.values()) / total <= max(share, 1 / len(weights)) * (1 + 1e-9)
    if len(weights) * share > 1 + 1e-6:
        expected = by_bisection(weights, share)
        for site, weight in capped.items():
            assert weight == pytest.approx(expected[site], rel=1e-6)
    elif len(weights) * share < 1 - 1e-6:
        assert len(set(capped.values())) == 1
    assert sum(capped[site] < weights[site] for site in weights) <= most_capped(share) or (
        len(weights) * share <= 1 + 1e-6
    )


def test_a_site_dominates_beyond_the_middle_between_an_even_share_and_all() -> None:
    assert not dominates(1.0, 1) and not dominates(0.75, 2) and not dominates(0.55, 10)
    assert dominates(0.76, 2) and dominates(0.56, 10)


def test_no_cap_and_exact_caps() -> None:
    weights = {"a": 3.0, "b": 97.0}
    assert capped_weights(weights, 1.0) == weights
    assert capped_weights(weights, 0.5) == {"a": 3.0, "b": 3.0}
    assert capped_weights(weights, 0.8) == pytest.approx({"a": 3.0, "b": 12.0})
    assert capped_weights({"a": 7.0}, 0.5) == {"a": 7.0}
    assert capped_weights({}, 0.5) == {}
    assert [most_capped(share) for share in (1.0, 0.8, 0.5, 0.4, 0.2)] == [0, 1, 1, 2, 4]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), st.floats(2, 100))
def test_of_two_updates_neither_is_beyond_the_bound(norms: list[float], ratio: float) -> None:
    bound = NormBound.of(norms, [5.0] * len(norms), ratio)
    assert bound.limit(5.0) == pytest.approx(ratio * statistics.median(norms))
    pair = norms[:2]
    of_two = NormBound.of(pair, [5.0] * len(pair), ratio)
    assert all(norm <= of_two.limit(5.0) * (1 + 1e-12) for norm in pair)


def test_the_bound_grows_with_the_distance_from_the_median_size() -> None:
    bound = NormBound.of([1.0, 2.0, 90.0], [10, 100, 1000], 10.0)
    assert [bound.limit(size) for size in (10, 100, 1000)] == [200.0, 20.0, 80.0]
    assert NormBound.of([0.0, 0.0, 9.0], [1, 1, 1], 10.0).limit(1) == math.inf
