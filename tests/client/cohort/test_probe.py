"""A few samples that stand for all."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fedward_client.cohort.probe import spread
from fedward_client.data.sample import Sample


def samples(labels):
    return [Sample(str(k), lambda: None, (label,)) for k, label in enumerate(labels)]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 40))
def test_enough_in_order_without_repetition_and_every_class(labels, most):
    made = samples(labels)
    chosen = spread(made, most)
    places = [int(one.patient) for one in chosen]
    assert places == sorted(set(places))
    assert len(chosen) == min(most, len(made))
    counts, there = Counter(one.label[0] for one in chosen), Counter(labels)
    if counts and most >= len(there):
        assert set(counts) == set(there)
        # No class gives more than another that still had some to give.
        for one, n in counts.items():
            for other, m in counts.items():
                assert n <= m + 1 or m == there[other], (one, other)
