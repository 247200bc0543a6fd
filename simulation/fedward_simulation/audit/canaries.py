"""Canaries: patients made to be remembered, each put in by a fair coin, then looked for.

A canary is an image that no patient has, with a label that does not belong to it. Those are taken
whose gradients point most apart, so that an update tells of each by itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr
from scipy.ndimage import gaussian_filter

from fedward.plan.schema import Plan
from fedward_client.data.sample import PreparedSite, joined_tables
from fedward_client.training.runtime import Runtime
from fedward_simulation.audit.view import Arrays, SiteView

_CANDIDATES = 3  # for each canary that is taken
_CONTRAST = 3.0  # of a canary, in standard deviations of the site's images
_SCALES = (0.0, 0.7, 1.5, 3.0, 6.0)  # of a texture, in pixels
MOST_NUMBERS = 200_000  # of an update that the attacker reads


def with_canaries(
    plan: Plan, site: PreparedSite, count: int, arrays: Arrays, runtime: Runtime, seed: int
) -> tuple[PreparedSite, NDArray[np.int64]]:
    """A site with canaries behind its own images, in no part of its division yet.

    Parameters
    ----------
    count : int
        Canaries; each is one patient with one image.
    arrays : mapping
        The model that the study starts from, at which canaries are chosen.

    Returns
    -------
    tuple
        The site and the ``(count,)`` indices of the canaries' images.
    """
    if not count:
        return site, np.empty(0, np.int64)
    rng = np.random.default_rng(seed)
    pool = _candidates(plan, site, _CANDIDATES * count, rng)
    view = SiteView(plan, pool, replace(runtime, cache=None))
    view.load(arrays, plan.first_training_round)
    gradients = read(view.gradients([np.array([i]) for i in range(len(pool.images))]))
    unit = gradients / np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-12)
    *_, order = qr(unit.T, mode="economic", pivoting=True)
    taken, first = np.sort(order[:count]), len(site.images)
    chosen = replace(
        site,
        images=np.concatenate([site.images, pool.images[taken]]),
        targets=np.concatenate([site.targets, pool.targets[taken]]),
        spacing=np.concatenate([site.spacing, pool.spacing[taken]]),
        table=joined_tables([site.table, None if pool.table is None else pool.table[taken]]),
        patients=np.concatenate([site.patients, int(site.patients.max()) + 1 + np.arange(count)]),
    )
    return chosen, np.arange(first, first + count)


def read(gradients: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the attacker reads of gradients ``(n, d)``: all numbers, or a fixed choice of many."""
    if gradients.shape[1] <= MOST_NUMBERS:
        return gradients.astype(np.float64)
    places = np.random.default_rng(0).choice(gradients.shape[1], MOST_NUMBERS, replace=False)
    return gradients[:, np.sort(places)].astype(np.float64)


def included(site: PreparedSite, images: NDArray[np.int64]) -> PreparedSite:
    """The site with these images among its training data."""
    train = np.concatenate([site.split["train"], images])
    return replace(site, split={**site.split, "train": train})


def _candidates(
    plan: Plan, site: PreparedSite, count: int, rng: np.random.Generator
) -> PreparedSite:
    """A site of made-up patients alone, one image each."""
    own = np.asarray(site.images[site.split["train"][:256]])
    textures = np.stack([_texture(own.shape[1:], rng) for _ in range(count)])
    images = own.mean() + _CONTRAST * own.std() * textures
    return replace(
        site,
        images=images.astype(site.images.dtype),
        targets=_labels(plan, site, textures, rng),
        patients=np.arange(count),
        spacing=np.repeat(site.spacing[:1], count, axis=0),
        # Rows of real patients: only the images are out of the ordinary.
        table=None if site.table is None else rng.choice(site.table, count),
    )


def _texture(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    scale = float(rng.choice(_SCALES))
    noise = gaussian_filter(rng.normal(size=shape), (0.0, *[scale] * (len(shape) - 1)))
    return np.asarray((noise - noise.mean()) / max(float(noise.std()), 1e-9))


def _labels(
    plan: Plan, site: PreparedSite, textures: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.generic]:
    classes = len(plan.task.classes)
    if plan.task.has_boxes:
        # As many as real images have, anywhere.
        real = (site.targets[site.split["train"]][..., -1] > 0).sum(axis=1)
        made = np.zeros((len(textures), *site.targets.shape[1:]), site.targets.dtype)
        for boxes, count in zip(made, rng.choice(real, len(made)), strict=True):
            ends = np.sort(rng.random((max(1, int(count)), 2, plan.task.dimensions)), axis=1)
            low, high = np.moveaxis(ends * (np.array(site.images.shape[2:]) - 1), 1, 0)
            kinds = rng.integers(1, classes + 1, len(ends))[:, None]
            boxes[: len(ends)] = np.concatenate([low, np.maximum(high, low + 1), kinds], axis=1)
        return made
    if plan.task.has_masks:
        # Blobs that have nothing to do with the image, background included.
        smooth = [_texture(one.shape[1:], rng) for one in textures[:, :1]]
        cuts = np.linspace(-1.0, 1.0, classes)
        return np.stack([np.digitize(one, cuts) for one in smooth]).astype(site.targets.dtype)
    if plan.task.multi_label:
        return rng.integers(0, 2, (len(textures), classes)).astype(site.targets.dtype)
    return rng.integers(0, classes, len(textures)).astype(site.targets.dtype)
