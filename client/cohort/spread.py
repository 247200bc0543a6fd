"""A few samples that stand for all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from client.data.types import Sample


def spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many samples, in turn from each label, and evenly from the samples of a label.

    The choice depends on the order of the samples alone, so that a page can be made again.
    """
    groups: dict[tuple[int, ...] | None, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        groups[sample.label].append(number)
    chosen: list[int] = []
    for share, group in zip(
        _shares([len(g) for g in groups.values()], most), groups.values(), strict=True
    ):
        chosen += [group[k * len(group) // share] for k in range(share)]
    return [samples[number] for number in sorted(chosen)]


def _shares(sizes: Sequence[int], most: int) -> list[int]:
    """How many to take of each: in turn, until there are enough or nothing is left."""
    shares, left = [0] * len(sizes), min(most, sum(sizes))
    while left:
        for place, size in enumerate(sizes):
            if left and shares[place] < size:
                shares[place], left = shares[place] + 1, left - 1
    return shares
