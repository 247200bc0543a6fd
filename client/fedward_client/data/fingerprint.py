"""What a site's images are like, in counts that add up over sites: nnU-Net's dataset fingerprint.

Sizes and spacings fall into bins of a sixteenth of an octave, intensities of marked pixels into
bins of 8: no single image's value is in it. What few images have is merged with its neighbours or
left out before it leaves a site (:meth:`Fingerprint.released`). Source: Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.data.quiet import quiet
from fedward_client.data.sample import Sample

Bins = dict[int, int]
_PER_OCTAVE: Final = 16
_AIR: Final = -500.0  # HU; below it an image shows air, and its values mean something by themselves
_STEP: Final = 8.0  # of intensities in a bin
_DIGITS: Final = 3


@dataclass(frozen=True)
class Fingerprint:
    """Counts of images; those of several sites add up.

    Attributes
    ----------
    patients, images : int
        Those that could be read.
    sides : tuple of dict
        For each axis, images by the bin of their side in pixels (see :func:`value_of`).
    spacings : tuple of dict
        The same of the spacing in mm, of images whose files state it.
    classes : tuple of int
        Images that show each class; of a task with masks, of those that mark it.
    planes : dict
        Images by their number of channels.
    absolute : int
        Images with values below -500, as CT has them: their intensities mean something by
        themselves.
    intensities : dict
        Of these, for each bin of 8 of the intensity of marked pixels the sum of the images' shares.
    """

    patients: int
    images: int
    sides: tuple[Bins, ...]
    spacings: tuple[Bins, ...]
    classes: tuple[int, ...]
    planes: Bins
    absolute: int
    intensities: dict[int, float]

    def __add__(self, other: Fingerprint) -> Fingerprint:
        def axes(one: Sequence[Bins], two: Sequence[Bins]) -> tuple[Bins, ...]:
            return tuple(_sum(a, b) for a, b in zip(one, two, strict=True))

        keys = self.intensities.keys() | other.intensities.keys()
        return Fingerprint(
            self.patients + other.patients,
            self.images + other.images,
            axes(self.sides, other.sides),
            axes(self.spacings, other.spacings),
            tuple(a + b for a, b in zip(self.classes, other.classes, strict=True)),
            _sum(self.planes, other.planes),
            self.absolute + other.absolute,
            {k: self.intensities.get(k, 0.0) + other.intensities.get(k, 0.0) for k in sorted(keys)},
        )

    def released(self, least: int) -> Fingerprint | None:
        """What of it may leave a site that counts nothing of fewer patients; None: nothing.

        Neighbouring bins are merged until each holds so many images; a class or a kind of images
        that fewer show counts as none. An image is taken for a patient here: a site whose patients
        have many images holds to `least` times as many images as patients on average.
        """
        if self.patients < least:
            return None
        least = math.ceil(least * self.images / self.patients)
        few = self.absolute < least
        return Fingerprint(
            self.patients,
            self.images,
            tuple(_merged(one, least) for one in self.sides),
            tuple(_merged(one, least) for one in self.spacings),
            tuple(n if n >= least else 0 for n in self.classes),
            {planes: n for planes, n in self.planes.items() if n >= least},
            0 if few else self.absolute,
            {} if few else {k: round(v, _DIGITS) for k, v in self.intensities.items()},
        )


def bin_of(value: float) -> int:
    """The bin of a side or a spacing."""
    return round(_PER_OCTAVE * math.log2(value))


def value_of(place: int) -> float:
    """The middle of a bin; 1 is in the middle of its own."""
    return float(2.0 ** (place / _PER_OCTAVE))


def quantile(bins: Bins, share: float) -> float:
    """A quantile of a side or a spacing: the middle of the bin in which it lies."""
    total, seen = sum(bins.values()), 0
    for place in sorted(bins):
        seen += bins[place]
        if seen >= share * total:
            return value_of(place)
    raise ValueError("a quantile needs values")


def intensity(fingerprint: Fingerprint, percent: float) -> float:
    """A percentile of the intensities of marked pixels."""
    bins = fingerprint.intensities
    places = sorted(bins)
    seen = np.cumsum([bins[place] for place in places])
    place = places[int(np.searchsorted(seen, percent / 100 * seen[-1]))]
    return (place + 0.5) * _STEP


def fingerprint(samples: Sequence[Sample], task: Task) -> Fingerprint:
    """Read every image and its mask, and count; what cannot be read is passed over."""
    dims, classes = task.dimensions, len(task.classes)
    sides: tuple[Bins, ...] = tuple({} for _ in range(dims))
    spacings: tuple[Bins, ...] = tuple({} for _ in range(dims))
    shown, planes, absolute = np.zeros(classes, np.int64), Bins(), 0
    intensities: dict[int, float] = {}
    patients: set[str] = set()
    images = 0
    for sample in samples:
        try:
            with quiet():
                image = sample.load()
                mask = sample.mask() if sample.mask is not None else None
        except DataError:
            continue
        shape = image.pixels.shape[1:]
        if len(shape) != dims or (mask is not None and mask.shape != shape):
            continue
        images += 1
        patients.add(sample.patient)
        for axis, side in enumerate(shape):
            _count(sides[axis], bin_of(side))
            if image.measured:
                _count(spacings[axis], bin_of(image.spacing[axis]))
        _count(planes, len(image.pixels))
        shown += _shown(sample, mask, task)
        if image.pixels.min() < _AIR:
            absolute += 1
            marked = image.pixels[0][mask > 0] if mask is not None else image.pixels[0].ravel()
            bins, counts = np.unique(np.floor(marked / _STEP).astype(np.int64), return_counts=True)
            for place, n in zip(bins.tolist(), counts.tolist(), strict=True):
                intensities[place] = intensities.get(place, 0.0) + n / len(marked)
    return Fingerprint(
        len(patients),
        images,
        sides,
        spacings,
        tuple(shown.tolist()),
        planes,
        absolute,
        dict(sorted(intensities.items())),
    )


def _shown(sample: Sample, mask: NDArray[np.uint8] | None, task: Task) -> NDArray[np.int64]:
    """Which classes an image shows, ``(K,)`` of 0 and 1."""
    found = np.zeros(len(task.classes), np.int64)
    if mask is not None:
        present = np.unique(mask[mask > 0]).astype(np.int64) - 1
        found[present[present < len(found)]] = 1
    elif sample.label is not None and task.multi_label:
        found += np.asarray(sample.label, np.int64)
    elif sample.label is not None:
        found[sample.label[0]] = 1
    return found


def _count(bins: Bins, place: int) -> None:
    bins[place] = bins.get(place, 0) + 1


def _sum(one: Bins, two: Bins) -> Bins:
    return {k: one.get(k, 0) + two.get(k, 0) for k in sorted(one.keys() | two.keys())}


def _merged(bins: Bins, least: int) -> Bins:
    """Neighbours put together in the middle one of them, until each holds enough; {}: too few."""
    groups: list[list[int]] = []
    size = least
    for place in sorted(bins):
        if size >= least:
            groups.append([])
            size = 0
        groups[-1].append(place)
        size += bins[place]
    if len(groups) > 1 and size < least:
        groups[-2] += groups.pop()
    made = {_middle(group, bins): sum(bins[place] for place in group) for group in groups}
    return made if sum(made.values()) >= least else {}


def _middle(group: Sequence[int], bins: Bins) -> int:
    half, seen = sum(bins[place] for place in group) / 2, 0
    for place in group:
        seen += bins[place]
        if seen >= half:
            return place
    return group[-1]
