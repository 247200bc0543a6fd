"""Which images are in a step: shuffled epochs, or Poisson-sampled patients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from fedward.dp.keystream import Keystream, derive_key

FILLER: Final = -1
"""Stands for an image of zeros that only fills a batch up."""

_CHUNK_COST: Final = 4  # what a chunk costs by itself, in images (benchmarks/dp.md)
Indices = NDArray[np.int64]


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else; for what needs no secrecy."""
    return int.from_bytes(derive_key(*parts)[:8], "big") >> 1


def shuffled(
    indices: Indices, batch: int, rng: np.random.Generator, *, epochs: int | None, steps: int | None
) -> Iterator[Indices]:
    """Batches of images for so many epochs, or for so many steps.

    A last batch that is smaller than half of the others joins the one before: its gradient would
    weigh as much as a full one's.
    """
    done = 0
    for _ in range(epochs if epochs is not None else 1_000_000_000):
        order = rng.permutation(indices)
        for part in _parts(order, batch):
            yield part
            done += 1
            if steps is not None and done == steps:
                return


def _parts(order: Indices, batch: int) -> list[Indices]:
    count = max(1, round(len(order) / batch))
    return np.array_split(order, count)


@dataclass(frozen=True)
class PatientDraw:
    """One private step's images.

    Attributes
    ----------
    images : NDArray
        ``(n,)`` indices of images; empty when no patient was drawn.
    owners : NDArray
        ``(n,)`` position of each image's patient among the drawn ones, from 0, ascending.
    """

    images: Indices
    owners: Indices

    @property
    def patients(self) -> int:
        """Patients drawn."""
        return int(self.owners[-1]) + 1 if len(self.owners) else 0


class PatientSampler:
    """Poisson sampling of patients: each is in a step with the same chance, independently.

    Parameters
    ----------
    indices : NDArray
        ``(n,)`` training images.
    patients : NDArray
        ``(n,)`` patient number of each of these images.
    rate : float
        Chance of a patient to be drawn.
    images_per_patient : int
        Images drawn from each drawn patient, without repetition; all of them where there are fewer.
    """

    def __init__(
        self, indices: Indices, patients: Indices, rate: float, images_per_patient: int
    ) -> None:
        self.rate, self.per_patient = rate, images_per_patient
        order = np.argsort(patients, kind="stable")
        cuts = np.flatnonzero(np.diff(patients[order])) + 1
        self.groups: list[Indices] = np.split(indices[order], cuts) if len(indices) else []

    def everyone(self) -> PatientDraw:
        """All images of all patients."""
        owners = np.repeat(np.arange(len(self.groups)), [len(group) for group in self.groups])
        return PatientDraw(np.concatenate(self.groups), owners)

    def draw(self, stream: Keystream) -> PatientDraw:
        """Draw one step's patients and their images."""
        chosen = np.flatnonzero(stream.happens(self.rate, len(self.groups)))
        if not len(chosen):
            return PatientDraw(np.empty(0, np.int64), np.empty(0, np.int64))
        groups = [self.groups[patient] for patient in chosen]
        # In the order of random words: the first so many are as likely as any others.
        words = np.split(
            stream.words(sum(map(len, groups))), np.cumsum([len(group) for group in groups])[:-1]
        )
        parts = [
            group[np.argsort(own, kind="stable")[: self.per_patient]]
            if len(group) > self.per_patient
            else group
            for group, own in zip(groups, words, strict=True)
        ]
        owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return PatientDraw(np.concatenate(parts), owners)


def patients_at_once(count: int, rate: float, images_per_patient: int, most: int) -> int:
    """How many patients each chunk of a private step has room for, drawn or not.

    It minimises the expected work of a step, which is one pass over full chunks. It depends on what
    is known of a site and on the machine, never on who was drawn.

    Parameters
    ----------
    count : int
        Training patients.
    rate : float
        Chance of a patient to be drawn.
    images_per_patient : int
        Room for each.
    most : int
        Images that fit in memory.
    """
    usual = math.ceil(count * rate + 4 * math.sqrt(count * rate * (1 - rate)))
    largest = max(1, min(most // images_per_patient, usual, count))

    def work(patients: int) -> float:
        # E[⌈X / patients⌉] is the sum of P(X > j · patients), as of any number from 0 upwards.
        expected: float = binom.sf(np.arange(0, count, patients), count, rate).sum()
        return expected * (patients * images_per_patient + _CHUNK_COST)

    return min(range(max(1, largest // 8), largest + 1), key=work)


def chunks(draw: PatientDraw, patients: int, images_per_patient: int) -> list[Indices]:
    """Cut a step into chunks of one shape, in which each patient has a row.

    Kernels round differently for batches of other sizes. In batches of one size an image's
    activations do not depend, in any bit, on who else was drawn.

    Returns
    -------
    list of NDArray
        ``(patients, images_per_patient)`` indices of images; -1 where there is room left.
    """
    count = -(-draw.patients // patients)
    table = np.full((count * patients, images_per_patient), FILLER, np.int64)
    starts = np.searchsorted(draw.owners, draw.owners)
    table[draw.owners, np.arange(len(draw.owners)) - starts] = draw.images
    return np.split(table, count)
