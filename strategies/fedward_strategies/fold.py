"""The weighted mean of updates that come one by one, in any order, with the same result.

Sums are kept as pairs of doubles (TwoSum; Knuth, The Art of Computer Programming, volume 2,
section 4.2.2): a weight times a single-precision value is exact in a double, and what a sum rounds
away is kept beside it. So the mean does not depend on who answered first, and its memory is that
of a few models however many sites there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


class Fold:
    """A running weighted mean of models.

    Attributes
    ----------
    weight : float
        Sum of the weights so far.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._high: Arrays = {}
        self._low: Arrays = {}
        self._kinds: dict[str, np.dtype[Any]] = {}

    def add(self, arrays: Mapping[str, NDArray[Any]], weight: float) -> None:
        """Take an update in.

        Parameters
        ----------
        arrays : mapping
            Same names and shapes each time.
        weight : float
            Above 0.
        """
        if not self._high:
            self._kinds = {name: value.dtype for name, value in arrays.items()}
            self._high = {name: np.zeros(v.shape, np.float64) for name, v in arrays.items()}
            self._low = {name: np.zeros(v.shape, np.float64) for name, v in arrays.items()}
        for name, value in arrays.items():
            self._add_one(name, np.multiply(value, weight, dtype=np.float64))
        self.weight += weight

    def _add_one(self, name: str, term: NDArray[np.float64]) -> None:
        high = self._high[name]
        total = high + term
        back = total - high
        self._low[name] += (high - (total - back)) + (term - back)
        self._high[name] = np.asarray(total)

    def mean(self) -> Arrays:
        """The mean so far, in the arrays' own dtypes.

        Raises
        ------
        ValueError
            Nothing was added.
        """
        if not self._high:
            raise ValueError("a mean needs an update")
        return {
            name: np.asarray((self._high[name] + self._low[name]) / self.weight).astype(kind)
            for name, kind in self._kinds.items()
        }
