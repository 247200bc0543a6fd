"""One decoded image and its mask, as the model takes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from client.data import geometry, intensity, reasons
from client.data.types import Image
from fedward.plan.schema import Preprocessing, Task


@dataclass(frozen=True)
class Prepared:
    """One image as the model takes it.

    Attributes
    ----------
    pixels : NDArray
        ``(C, *size)`` float32.
    mask : NDArray or None
        ``(*size)`` uint8.
    spacing : tuple of float
        mm per axis.
    """

    pixels: NDArray[np.float32]
    mask: NDArray[np.uint8] | None
    spacing: tuple[float, ...]


def prepare_image(
    image: Image, mask: NDArray[np.uint8] | None, task: Task, prep: Preprocessing
) -> Prepared:
    """Preprocess one decoded image and its mask.

    Raises
    ------
    DataError
        The image is left out; the rule is one of :data:`client.data.reasons.REASONS`.
    """
    shape = image.pixels.shape[1:]
    if len(shape) != task.dimensions or len(image.pixels) not in (1, 3) or 0 in shape:
        raise reasons.unusable(reasons.WRONG_SHAPE)
    if mask is not None and mask.shape != shape:
        raise reasons.unusable(reasons.MASK_SHAPE)
    if image.tilt and prep.gantry_tilt == "refuse":
        raise reasons.unusable(reasons.TILTED)
    labels = None if mask is None else _labels(mask, task)[None]
    image = replace(image, pixels=intensity.finite(image.pixels))
    pixels, mapped = intensity.to_unit(image, prep)
    pixels = intensity.to_channels(pixels, prep.channels)
    grid = geometry.grid_for(shape, image.spacing, prep)
    content = geometry.crop(geometry.resample(pixels, grid), prep.size)
    content, black = intensity.finish(content, mapped, prep)
    out = geometry.pad(content, prep.size, black).astype(np.float32)
    if labels is not None:
        labels = geometry.crop(geometry.resample(labels, grid, nearest=True), prep.size)
        labels = geometry.pad(labels, prep.size, np.zeros(1, np.uint8))[0]
    return Prepared(out, labels, grid.spacing)


def _labels(mask: NDArray[np.uint8], task: Task) -> NDArray[np.uint8]:
    # With one class, 255 is as good a foreground as 1: that is how editors store masks.
    if len(task.classes) == 1:
        return np.asarray(mask != 0, np.uint8)
    if mask.max() > len(task.classes):
        raise reasons.unusable(reasons.MASK_CLASS)
    return mask
