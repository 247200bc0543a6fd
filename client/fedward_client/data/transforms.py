"""Preprocessing of one decoded image and its mask into a model's input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedward import rule_codes
from fedward.plan.schema import Preprocessing, Task
from fedward_client.data.boxes import around, checked, in_region, on_grid
from fedward_client.data.channels import lacks_too_much
from fedward_client.data.quiet import quiet
from fedward_client.data.sample import BoxRows, Image, Sample
from fedward_client.data.volumes import marked_pixels

# Resampling, cropping and padding to the plan's size; smoothed where it shrinks.


@dataclass(frozen=True)
class Grid:
    """How the spatial axes change.

    Attributes
    ----------
    shape : tuple of int
        Sides after resampling, before cropping and padding.
    scale : tuple of float or None
        Exact factor per axis, when the new spacing matters more than the ends of the image.
    spacing : tuple of float
        mm per axis after resampling.
    """

    shape: tuple[int, ...]
    scale: tuple[float, ...] | None
    spacing: tuple[float, ...]


def grid_for(shape: tuple[int, ...], spacing: tuple[float, ...], prep: Preprocessing) -> Grid:
    """The resampling that the plan asks for an image of `shape` and `spacing` (mm)."""
    if prep.spacing is not None:
        scale = tuple(s / t for s, t in zip(spacing, prep.spacing, strict=True))
        # The tiny surplus keeps 10 * 0.3 / 0.1 from becoming 29.
        scale = tuple(f * (1 + 1e-9) for f in scale)
        new = tuple(math.floor(n * f) for n, f in zip(shape, scale, strict=True))
        if min(new) >= 1:
            return Grid(new, scale, prep.spacing)
        new = tuple(max(n, 1) for n in new)
    elif prep.patch is not None:
        return Grid(shape, None, spacing)
    elif prep.resize == "fit":
        factor = min(t / n for t, n in zip(prep.size, shape, strict=True))
        new = tuple(
            min(max(round(n * factor), 1), t) for n, t in zip(shape, prep.size, strict=True)
        )
    else:
        new = prep.size
    after = tuple(s * n / m for s, n, m in zip(spacing, shape, new, strict=True))
    return Grid(new, None, after)


def resample(array: NDArray[Any], grid: Grid, nearest: bool = False) -> NDArray[Any]:
    """Resample ``(C, *S)`` to ``(C, *grid.shape)``.

    Linear, and widened to the new pixel where an axis shrinks, so that nothing aliases; nearest
    (the pixel whose centre is closest) for label maps.
    """
    if grid.shape == array.shape[1:] and (grid.scale is None or np.allclose(grid.scale, 1)):
        return array
    layers = torch.from_numpy(np.ascontiguousarray(array))
    if nearest:
        mode = "nearest-exact"
        return _interpolate(layers[None], grid.shape, grid.scale, mode)[0].numpy()
    if len(grid.shape) == 2:
        return _smooth(layers[None], grid.shape, grid.scale)[0].numpy()
    # torch smooths in two axes only; the filter is separable, so the third can go by itself.
    c, *_, depth = layers.shape
    plane = grid.scale and grid.scale[:2]
    layers = _smooth(layers.movedim(-1, 1), grid.shape[:2], plane).movedim(1, -1)
    lines = layers.reshape(1, c, -1, depth)
    line = grid.scale and (1.0, grid.scale[2])
    lines = _smooth(lines, (lines.shape[2], grid.shape[2]), line)
    return lines.reshape(c, *grid.shape).numpy()


def restored(layers: NDArray[Any], grid: Grid, shape: tuple[int, ...]) -> NDArray[Any]:
    """What was found on `grid`, ``(C, *grid.shape)``, on the grid of `shape` that it was made of.

    Linear, as :func:`resample`; a pixel of both has one place, to a fraction of a pixel.
    """
    if grid.scale is None:
        return resample(layers, Grid(shape, None, grid.spacing))
    # Resampling let the end of the image go that fills no pixel; the last one stands for it.
    wider = np.pad(layers, ((0, 0), *((0, 2) for _ in shape)), mode="edge")
    back = tuple(1 / factor for factor in grid.scale)
    sides = tuple(math.floor(n * f) for n, f in zip(wider.shape[1:], back, strict=True))
    out = resample(wider, Grid(sides, back, grid.spacing))
    return out[(slice(None), *(slice(n) for n in shape))]


def _smooth(layers: Tensor, shape: tuple[int, ...], scale: tuple[float, ...] | None) -> Tensor:
    return _interpolate(layers, shape, scale, "bilinear", antialias=True)


def _interpolate(
    layers: Tensor,
    shape: tuple[int, ...],
    scale: tuple[float, ...] | None,
    mode: str,
    antialias: bool = False,
) -> Tensor:
    if scale is None:
        return F.interpolate(layers, size=list(shape), mode=mode, antialias=antialias)
    return F.interpolate(
        layers,
        scale_factor=list(scale),
        mode=mode,
        recompute_scale_factor=False,
        antialias=antialias,
    )


def crop(array: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
    """The middle of ``(C, *S)``, each axis at most as long as in `size`."""
    middle = [
        slice((n - t) // 2, (n - t) // 2 + t) if n > t else slice(None)
        for n, t in zip(array.shape[1:], size, strict=True)
    ]
    return array[(slice(None), *middle)]


def pad(array: NDArray[Any], size: tuple[int, ...], values: NDArray[Any]) -> NDArray[Any]:
    """``(C, *S)`` in the middle of ``(C, *size)``, filled with one of `values` per channel."""
    if array.shape[1:] == size:
        return array
    out = np.empty((len(array), *size), array.dtype)
    out[...] = values.reshape((-1,) + (1,) * len(size))
    starts = [(t - n) // 2 for n, t in zip(array.shape[1:], size, strict=True)]
    inner = [slice(a, a + n) for a, n in zip(starts, array.shape[1:], strict=True)]
    out[(slice(None), *inner)] = array
    return out


# From the modality's values to the numbers that a model takes.

Array = NDArray[np.float32]

# ITU-R BT.601 luma; ImageNet's mean and deviation per channel, as public weights expect them.
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)
_MEAN: Final = np.array([0.485, 0.456, 0.406], np.float32)
_EPSILON: Final = float(np.finfo(np.float32).eps)
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
        raise rule_codes.unusable(rule_codes.NOT_READABLE)
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
        # A constant image has a rounding error for its deviation; values may be of any unit.
        spread, rounding = pixels.std(dtype=np.float64), _EPSILON * float(np.abs(pixels).max())
        deviation = np.full(len(pixels), spread if spread > rounding else 1.0, np.float32)
    each = (len(pixels),) + (1,) * (pixels.ndim - 1)
    return (pixels - mean.reshape(each)) / deviation.reshape(each), (black - mean) / deviation


def _lowest(pixels: Array) -> Array:
    return np.full(len(pixels), pixels.min(), np.float32)


@dataclass(frozen=True)
class Prepared:
    """One image as the model takes it.

    Attributes
    ----------
    pixels : NDArray
        ``(C, *size)`` float32; for patches no side is shorter than in `size`.
    mask : NDArray or None
        ``(*size)`` uint8.
    boxes : NDArray or None
        See :func:`fedward_client.data.boxes.on_grid`.
    spacing : tuple of float
        mm per axis, of the grid on which figures are measured.
    lost : float
        Share of the mask's foreground, or of the boxes, that lies outside the middle, and was cut
        off with it.
    whole : Whole or None
        For patches.
    """

    pixels: NDArray[np.float32]
    mask: NDArray[np.uint8] | None
    spacing: tuple[float, ...]
    lost: float = 0.0
    whole: Whole | None = None
    boxes: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Whole:
    """What is kept of an image that patches are cut from.

    Attributes
    ----------
    truth : NDArray
        The mask before it was resampled.
    sides : tuple of int
        Of the image after resampling, without the border that pads it to a patch.
    marked : NDArray
        See :func:`fedward_client.data.volumes.marked_pixels`.
    """

    truth: NDArray[np.uint8]
    sides: tuple[int, ...]
    marked: NDArray[np.int32]


def prepare_image(
    image: Image,
    mask: NDArray[np.uint8] | None,
    task: Task,
    prep: Preprocessing,
    boxes: BoxRows | None = None,
) -> Prepared:
    """Preprocess one decoded image and its mask or its boxes.

    Raises
    ------
    DataError
        The image is left out; the rule is one of :data:`fedward.rule_codes.REASONS`.
    """
    shape = image.pixels.shape[1:]
    planes = range(1, 17) if prep.channel else (1, 3)
    if len(shape) != task.dimensions or len(image.pixels) not in planes or 0 in shape:
        raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
    if mask is not None and mask.shape != shape:
        raise rule_codes.unusable(rule_codes.MASK_SHAPE)
    if image.tilt and prep.gantry_tilt == "refuse":
        raise rule_codes.unusable(rule_codes.TILTED)
    marked_boxes = None if boxes is None else checked(boxes, shape)
    if image.region is not None:
        mask = None if mask is None else mask[image.region]
        marked_boxes = None if marked_boxes is None else in_region(marked_boxes, image.region)
        image = replace(image, pixels=image.pixels[(slice(None), *image.region)], region=None)
        shape = image.pixels.shape[1:]
    labels = None if mask is None else _labels(mask, task)[None]
    if task.has_boxes and labels is not None:
        marked_boxes, labels = checked(around(labels[0]), shape), None
    image = replace(image, pixels=finite(image.pixels))
    grid = grid_for(shape, image.spacing, prep)
    size = prep.size if prep.patch is None else tuple(map(max, grid.shape, prep.size))
    out = (_named if prep.channel else _on_grid)(image, grid, size, prep)
    lost = 0.0
    if marked_boxes is not None:
        new = on_grid(marked_boxes, factors(shape, grid), grid.shape, size)
        left = int(np.count_nonzero(new[:, -1]))
        lost = 1 - left / len(marked_boxes) if len(marked_boxes) else 0.0
        return Prepared(out, None, grid.spacing, lost, boxes=new)
    if labels is not None:
        truth, whole = labels[0], resample(labels, grid, nearest=True)
        labels = crop(whole, size)
        marked = int(np.count_nonzero(whole))
        lost = 1 - int(np.count_nonzero(labels)) / marked if marked else 0.0
        labels = pad(labels, size, np.zeros(1, np.uint8))[0]
        if prep.patch is not None:
            kept = Whole(truth, grid.shape, marked_pixels(labels, len(task.classes)))
            return Prepared(out, labels, image.spacing, lost, kept)
    return Prepared(out, labels, grid.spacing, lost)


def factors(shape: tuple[int, ...], grid: Grid) -> tuple[float, ...]:
    """By which each axis of an image of `shape` grows."""
    return grid.scale or tuple(m / n for n, m in zip(shape, grid.shape, strict=True))


def _on_grid(image: Image, grid: Grid, size: tuple[int, ...], prep: Preprocessing) -> Array:
    pixels, mapped = to_unit(image, prep)
    pixels = to_channels(pixels, prep.channels)
    content = crop(resample(pixels, grid), size)
    content, black = finish(content, mapped, prep)
    return pad(content, size, black).astype(np.float32, copy=False)


def _named(image: Image, grid: Grid, size: tuple[int, ...], prep: Preprocessing) -> Array:
    """The plan's channels, each by itself; zeros for one that the image lacks."""
    names = image.names
    if not names:
        if len(image.pixels) != len(prep.channel):
            raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
        names = tuple(one.name for one in prep.channel)
    if lacks_too_much(names, prep):
        raise rule_codes.unusable(rule_codes.CHANNEL_MISSING)
    out = np.zeros((len(prep.channel), *size), np.float32)
    for plane, channel in zip(out, prep.channel, strict=True):
        if channel.name not in names:
            continue
        changes: dict[str, Any] = {"channels": 1, "channel": ()}
        if channel.window is not None:
            changes |= {"window": channel.window, "percentiles": None}
        own = image.pixels[names.index(channel.name)][None]
        alone = replace(image, pixels=own, names=())
        plane[...] = _on_grid(alone, grid, size, prep.model_copy(update=changes))[0]
    return out


def _labels(mask: NDArray[np.uint8], task: Task) -> NDArray[np.uint8]:
    # With one class, 255 is as good a foreground as 1: that is how editors store masks.
    if len(task.classes) == 1:
        return np.asarray(mask != 0, np.uint8)
    if mask.max() > len(task.classes):
        raise rule_codes.unusable(rule_codes.MASK_CLASS)
    return mask


# One sample from its files to what a model takes, in this process or in another.

Outcome = Prepared | str


@dataclass(frozen=True)
class Job:
    """A sample to prepare."""

    sample: Sample
    task: Task
    prep: Preprocessing


def prepare_sample(job: Job) -> Outcome:
    """The prepared image, or the reason for which it is left out; never raises for a file."""
    sample = job.sample
    try:
        if job.task.has_masks and sample.mask is None:
            return rule_codes.NO_MASK
        if job.task.has_labels and sample.label is None:
            return rule_codes.NO_LABEL
        if job.task.has_boxes and sample.boxes is None and sample.mask is None:
            return rule_codes.NO_LABEL
        with quiet():
            image = sample.load()
            mask = sample.mask() if sample.mask is not None else None
            return prepare_image(image, mask, job.task, job.prep, sample.boxes)
    except Exception as error:
        # One bad file must not stop a site, whatever its decoder raises.
        return rule_codes.reason_of(error)


def prepare_in_worker(job: Job) -> Outcome:
    """The same in a process of its own."""
    with one_torch_thread():
        return prepare_sample(job)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """One thread for each image.

    Images are small: handing a part of each to other threads cost 25 times the work itself on
    two busy cores. Workers are the way to use more of them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
