"""From the modality's values to the numbers that a model takes."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.data import reasons
from client.data.types import Image
from fedward.plan.schema import Preprocessing

Array = NDArray[np.float32]

# ITU-R BT.601 luma; ImageNet's mean and deviation per channel, as public weights expect them.
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)
_MEAN: Final = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION: Final = np.array([0.229, 0.224, 0.225], np.float32)


def finite(pixels: Array) -> Array:
    """The pixels with NaN and infinity replaced by the lowest finite value.

    Raises
    ------
    DataError
        "not readable": no pixel is finite.
    """
    good = np.isfinite(pixels)
    if good.all():
        return pixels
    if not good.any():
        raise reasons.unusable(reasons.NOT_READABLE)
    return np.where(good, pixels, pixels[good].min()).astype(np.float32)


def to_channels(pixels: Array, channels: int) -> Array:
    """Colour to grey by luma, or grey repeated to colour; ``(C, *S)`` to ``(channels, *S)``."""
    if len(pixels) == channels:
        return pixels
    if channels == 1:
        return np.tensordot(_LUMA, pixels, axes=1)[None].astype(np.float32)
    return np.repeat(pixels, channels, axis=0)


def to_unit(image: Image, prep: Preprocessing) -> tuple[Array, bool]:
    """Map a window to 0 and 1 and clip; whether that was done.

    The plan's window leads, then its percentiles, then the table of the file, then its window. With
    none of them `zscore` leaves the values alone and the others map the image's own range.
    """
    pixels, window = image.pixels, prep.window or image.window
    if prep.window is None and prep.percentiles is None and image.lookup is not None:
        return image.lookup(pixels), True
    if prep.window is None and prep.percentiles is not None:
        low, high = np.percentile(pixels, prep.percentiles)
    elif window is not None:
        low, high = window
    elif prep.intensity == "zscore":
        return pixels, False
    else:
        low, high = float(pixels.min()), float(pixels.max())
    if not high > low:
        return np.zeros_like(pixels), True
    scaled = (pixels - np.float32(low)) / np.float32(high - low)
    return np.clip(scaled, 0, 1, out=scaled), True


def finish(pixels: Array, mapped: bool, prep: Preprocessing) -> tuple[Array, Array]:
    """The last step, and per channel the value that stands for black in a padded border.

    Parameters
    ----------
    pixels : NDArray
        ``(C, *S)``: the content, without any border, so that a border does not shift the mean.
    mapped : bool
        Whether 0 is black already (see :func:`to_unit`).
    """
    black = np.zeros(len(pixels), np.float32) if mapped else _lowest(pixels)
    if prep.intensity == "unit":
        return pixels, black
    if prep.intensity == "imagenet":
        mean, deviation = _MEAN, _DEVIATION
    else:
        mean = np.full(len(pixels), pixels.mean(dtype=np.float64), np.float32)
        spread = pixels.std(dtype=np.float64)
        deviation = np.full(len(pixels), spread if spread > 1e-6 else 1.0, np.float32)
    each = (len(pixels),) + (1,) * (pixels.ndim - 1)
    return (pixels - mean.reshape(each)) / deviation.reshape(each), (black - mean) / deviation


def _lowest(pixels: Array) -> Array:
    return np.full(len(pixels), pixels.min(), np.float32)
