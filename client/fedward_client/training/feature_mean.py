"""The mean of a site's features, which the first round of a centring plan measures.

With privacy it is a sum over patients like that of a training step: the same sampling, the same
noise multiplier, a bound on what one patient adds. So it costs what so many training steps cost.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedward.dp.accounting import Mechanism
from fedward.dp.gaussian import GaussianNoise
from fedward.dp.keystream import Keystream
from fedward.models.centering import FEATURE_LENGTH, of_one_length
from fedward.models.clipping import block_norms, factors
from fedward_client.training.batches import PatientDraw, PatientSampler

Features = Callable[[NDArray[np.int64]], Tensor]
"""From indices of images to their features ``(n, d)``."""


def exact_mean(features: Features, draw: PatientDraw) -> Tensor:
    """Mean over patients of each one's mean feature vector ``(d,)``, as it is."""
    return _patient_means(features, draw).mean(0)


def private_mean(
    features: Features,
    sampler: PatientSampler,
    mechanism: Mechanism,
    steps: int,
    stream: Keystream,
    noise: GaussianNoise,
    watch: Callable[[int, int], object] | None = None,
) -> Tensor:
    """The same ``(d,)`` with noise: the mean of so many private steps.

    Each step draws patients as a training step does, bounds the vector of each at
    :data:`~fedward.models.centering.FEATURE_LENGTH`, adds noise to their sum and divides by the
    number of patients that it expects.

    Parameters
    ----------
    features : callable
        From indices of images to features.
    sampler : PatientSampler
        Of the site's training patients.
    mechanism : Mechanism
        Noise and sampling rate.
    steps : int
        Private steps.
    stream, noise : Keystream, GaussianNoise
        Who is drawn, and the noise.
    watch : callable, optional
        Told of each step.
    """
    expected = mechanism.sampling_rate * len(sampler.groups)
    width = features(np.zeros(1, np.int64)).shape[1]
    total = torch.zeros(width, dtype=torch.float64)
    for step in range(steps):
        draw = sampler.draw(stream)
        sums = clipped_sum(_patient_means(features, draw)) if draw.patients else 0 * total
        noise.add_([sums], mechanism.noise_multiplier, FEATURE_LENGTH, expected)
        total += sums
        if watch is not None:
            watch(step + 1, steps)
    return total / steps


def clipped_sum(vectors: Tensor) -> Tensor:
    """Sum ``(d,)`` of vectors ``(n, d)``, none of which adds more than the length of features.

    One that is not finite adds nothing.
    """
    finite = torch.isfinite(vectors).all(1)
    norms = [block_norms(vectors)]
    weights, broken = factors(norms, [], finite, FEATURE_LENGTH, vectors.dtype)
    return weights @ vectors.masked_fill(broken.unsqueeze(1), 0)


def _patient_means(features: Features, draw: PatientDraw) -> Tensor:
    """``(patients, d)``, float64."""
    vectors = of_one_length(features(draw.images).double()).cpu()
    owners = torch.from_numpy(draw.owners)
    sums = vectors.new_zeros((draw.patients, vectors.shape[1])).index_add_(0, owners, vectors)
    return sums / torch.bincount(owners, minlength=draw.patients).unsqueeze(1)
