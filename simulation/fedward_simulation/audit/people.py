"""All hospitals' patients in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward_client.data.sample import PreparedSite
from fedward_simulation.audit.membership import Scores, by_patient

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class People:
    """All hospitals' patients in one row, site after site.

    Attributes
    ----------
    numbers : list of NDArray
        Per site ``(N,)``: the place of each image's patient in that site.
    counts : list of int
        Patients of each site.
    trained, held_out, canaries : NDArray
        ``(people,)`` who is a training patient, a validation or test patient, a canary.
    site : NDArray
        ``(people,)`` number of the site.
    """

    numbers: list[NDArray[np.int64]]
    counts: list[int]
    trained: Mask
    held_out: Mask
    canaries: Mask
    site: NDArray[np.int64]

    @classmethod
    def of(cls, sites: Sequence[PreparedSite], canaries: Sequence[NDArray[np.int64]]) -> People:
        """From the sites and the images that are canaries at each."""
        numbers = [np.unique(site.patients, return_inverse=True)[1] for site in sites]
        counts = [int(one.max()) + 1 for one in numbers]

        def mask(images: Sequence[NDArray[np.int64]]) -> Mask:
            parts = [np.zeros(count, bool) for count in counts]
            for part, number, chosen in zip(parts, numbers, images, strict=True):
                part[number[chosen]] = True
            return np.concatenate(parts)

        rest = [np.concatenate([s.split["validation"], s.split["test"]]) for s in sites]
        return cls(
            numbers,
            counts,
            mask([s.split["train"] for s in sites]),
            mask(rest),
            mask(canaries),
            np.repeat(np.arange(len(sites)), counts),
        )

    def scores(self, images: Sequence[NDArray[Any]]) -> Scores:
        """``(people,)`` mean over each patient's images, of values given per site and image."""
        rows = zip(images, self.numbers, self.counts, strict=True)
        return np.concatenate([by_patient(values, who, n) for values, who, n in rows])

    def images_of(self, place: int, chosen: Mask) -> NDArray[np.int64]:
        """Indices of the images at a site of the chosen people (a mask over all of them)."""
        start = sum(self.counts[:place])
        own = chosen[start : start + self.counts[place]]
        return np.flatnonzero(own[self.numbers[place]])
