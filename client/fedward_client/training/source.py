"""Where a step's inputs come from: the images, or what frozen layers made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.errors import OutputError
from fedward.plan.schema import Plan
from fedward_client.data.augment import augment, with_channels_as_in
from fedward_client.data.cache import Stored, building, load, publish
from fedward_client.data.sample import PreparedSite
from fedward_client.data.volumes import Volumes, corners, let_go
from fedward_client.training.batches import FILLER
from fedward_client.training.device import place_batch
from fedward_client.training.runtime import Runtime

Inputs = tuple[Tensor, ...]
"""What a network takes: images or features, and the rows of a table where the plan has one."""
_FEATURES: Final = "features"
_HEADER: Final = 4096  # of a .npy file and of the entry's description, at most


class Source:
    """Batches of one site's inputs on the device.

    Parameters
    ----------
    plan : Plan
        ``preprocessing`` is used.
    site : PreparedSite
        The images.
    runtime : Runtime
        Device and cache.
    prefix : nn.Module or None
        Leading layers that do not train; their output is computed once per image and kept, unless
        images are augmented.
    prefix_digest : str
        Tells one state of the prefix from another.
    """

    def __init__(
        self,
        plan: Plan,
        site: PreparedSite,
        runtime: Runtime,
        prefix: nn.Module | None,
        prefix_digest: str,
    ) -> None:
        self.plan = plan
        self.site, self.runtime, self.prefix = site, runtime, prefix
        self.device = runtime.torch_device
        self._digest = prefix_digest
        self._features: NDArray[Any] | None = None

    def plain(self, indices: NDArray[np.int64]) -> tuple[Inputs, Tensor]:
        """Inputs ``(n, ...)`` and targets ``(n, ...)``, without augmentation.

        An index of :data:`~fedward_client.training.batches.FILLER` stands for zeros.
        """
        if self.prefix is None:
            return self._beside(self._images(indices), indices), self._targets(indices)
        features = torch.from_numpy(_take(self._all_features(), indices))
        return self._beside(place_batch(features, self.device), indices), self._targets(indices)

    def augmented(
        self, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Inputs, Tensor]:
        """Inputs and targets of a training step; patches are drawn anew."""
        how = self.plan.preprocessing.augmentation
        if self.site.volumes is not None:
            images, targets = self._patches(self.site.volumes, indices, generator)
        elif how.active:
            images, targets = self._images(indices), self._targets(indices)
        else:
            return self.plain(indices)
        named = images if self.plan.preprocessing.channel else None
        images, changed = augment(images, targets, how, generator, self.plan.task.spec.target)
        if named is not None:
            images = with_channels_as_in(named, images, how.drop_channel, generator)
        inputs = self._beside(self.through(images), indices)
        return inputs, targets if changed is None else changed

    def volume(self, index: int) -> Tensor:
        """One whole image ``(1, C, *S)``, in this machine's memory."""
        image = torch.from_numpy(np.array(self.site.images[index]))[None]
        let_go(self.site.images)
        return image

    def _patches(
        self, volumes: Volumes, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        prep, site = self.plan.preprocessing, self.site
        count = len(indices)
        draws = torch.rand(count, 3 + len(prep.size), generator=generator, dtype=torch.float64)
        images = np.zeros((count, prep.channels, *prep.size), np.float32)
        masks = np.zeros((count, *prep.size), np.uint8)
        for row, (index, draw) in enumerate(zip(indices, draws.numpy(), strict=True)):
            if index == FILLER:
                continue
            mask = site.targets[index]
            box = corners(volumes, int(index), mask.shape, prep, draw)
            images[row] = site.images[index][(slice(None), *box)]
            masks[row] = mask[box]
        let_go(site.images, site.targets)
        return place_batch(torch.from_numpy(images), self.device), torch.from_numpy(masks).to(
            self.device
        )

    def _beside(self, images: Tensor, indices: NDArray[np.int64]) -> Inputs:
        if self.site.table is None:
            return (images,)
        return images, torch.from_numpy(_take(self.site.table, indices)).to(self.device)

    def _images(self, indices: NDArray[np.int64]) -> Tensor:
        return place_batch(torch.from_numpy(_take(self.site.images, indices)), self.device)

    def _targets(self, indices: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(_take(self.site.targets, indices)).to(self.device)

    @torch.no_grad()
    def through(self, images: Tensor) -> Tensor:
        """What the frozen leading layers make of images."""
        return images if self.prefix is None else self.prefix(images)

    def _all_features(self) -> NDArray[Any]:
        if self._features is None:
            place = self._place()
            kept = None if place is None else load(place, (_FEATURES,))
            self._features = self._keep(place, self._compute()) if kept is None else _of(kept)
        return self._features

    def _keep(self, place: Path | None, features: NDArray[Any]) -> NDArray[Any]:
        """Put them into the cache, whose bound they count towards; without room they stay here."""
        if place is None:
            return features
        try:
            size = features.nbytes + _HEADER
            with building(place, size, self.runtime.cache_bytes) as folder:
                made = publish(folder, place, {_FEATURES: features}, {}, (_FEATURES,))
        except OutputError:
            return features
        return features if made is None else _of(made)

    def _compute(self) -> NDArray[Any]:
        # All batches have one size: an image's features must not depend on how many others follow.
        batch, count = self.runtime.physical_batch, len(self.site.images)
        indices = np.full(-(-count // batch) * batch, FILLER)
        indices[:count] = np.arange(count)
        parts = [
            self.through(self._images(part)).float().cpu().numpy()
            for part in np.split(indices, len(indices) // batch)
        ]
        return np.concatenate(parts)[:count]

    def _place(self) -> Path | None:
        if self.runtime.cache is None:
            return None
        images = hashlib.sha256(np.ascontiguousarray(self.site.images).tobytes()).hexdigest()
        key = hashlib.sha256(f"features:{self._digest}:{images}".encode()).hexdigest()
        return self.runtime.cache / key


def _of(kept: Stored) -> NDArray[Any]:
    return kept.arrays[_FEATURES]


def _take(array: NDArray[Any], indices: NDArray[np.int64]) -> NDArray[Any]:
    taken = np.ascontiguousarray(array[indices])
    taken[indices == FILLER] = 0
    return taken


def digest_of(arrays: Mapping[str, NDArray[Any]], names: list[str]) -> str:
    """SHA-256 over the named arrays."""
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(name.encode())
        total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()
