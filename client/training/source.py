"""Where a step's inputs come from: the images, or what frozen layers made of them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.data.augment import augment
from client.data.types import PreparedSite
from client.training.batches import FILLER
from client.training.device import place_batch
from client.training.runtime import Runtime
from fedward.plan.schema import Augmentation


class Source:
    """Batches of one site's inputs on the device.

    Parameters
    ----------
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
        self, site: PreparedSite, runtime: Runtime, prefix: nn.Module | None, prefix_digest: str
    ) -> None:
        self.site, self.runtime, self.prefix = site, runtime, prefix
        self.device = runtime.torch_device
        self._digest = prefix_digest
        self._features: NDArray[Any] | None = None

    def plain(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs ``(n, ...)`` and targets ``(n, ...)``, without augmentation.

        An index of :data:`~client.training.batches.FILLER` stands for zeros.
        """
        if self.prefix is None:
            return self._images(indices), self._targets(indices)
        features = torch.from_numpy(_take(self._all_features(), indices))
        return place_batch(features, self.device), self._targets(indices)

    def augmented(
        self, indices: NDArray[np.int64], how: Augmentation, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a training step."""
        if not how.active:
            return self.plain(indices)
        images, targets = self._images(indices), self._targets(indices)
        masks = targets if targets.ndim == images.ndim - 1 and images.ndim > 3 else None
        masks = masks if self.site.targets.dtype == np.uint8 else None
        images, changed = augment(images, masks, how, generator)
        return self._through(images), targets if changed is None else changed

    def _images(self, indices: NDArray[np.int64]) -> Tensor:
        return place_batch(torch.from_numpy(_take(self.site.images, indices)), self.device)

    def _targets(self, indices: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(_take(self.site.targets, indices)).to(self.device)

    @torch.no_grad()
    def _through(self, images: Tensor) -> Tensor:
        return images if self.prefix is None else self.prefix(images)

    def _all_features(self) -> NDArray[Any]:
        if self._features is None:
            path = self._path()
            if path is not None and path.exists():
                self._features = np.load(path, mmap_mode="c")
            else:
                self._features = self._compute()
                if path is not None:
                    _save(path, self._features)
        return self._features

    def _compute(self) -> NDArray[Any]:
        # All batches have one size: an image's features must not depend on how many others follow.
        batch, count = self.runtime.physical_batch, len(self.site.images)
        indices = np.full(-(-count // batch) * batch, FILLER)
        indices[:count] = np.arange(count)
        parts = [
            self._through(self._images(part)).float().cpu().numpy()
            for part in np.split(indices, len(indices) // batch)
        ]
        return np.concatenate(parts)[:count]

    def _path(self) -> Path | None:
        if self.runtime.cache is None:
            return None
        images = hashlib.sha256(np.ascontiguousarray(self.site.images).tobytes()).hexdigest()
        key = hashlib.sha256(f"{self._digest}:{images}".encode()).hexdigest()[:32]
        return self.runtime.cache / f"features-{key}.npy"


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


def _save(path: Path, array: NDArray[Any]) -> None:
    # Written aside and renamed, so that a kill in the middle leaves no half file behind.
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "wb") as file:
        np.save(file, array)
    Path(name).replace(path)
