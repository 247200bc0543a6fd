"""The steps of Fedward's preprocessing that MONAI has no equal of, as MONAI transforms.

A bundle carries this file as ``scripts/preprocessing.py``; it needs MONAI, torch and numpy.
Images are channel first, ``(C, H, W)`` or ``(C, H, W, D)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, PydicomReader
from monai.inferers import SlidingWindowInferer
from monai.transforms import InvertibleTransform, MapTransform
from torch import Tensor
from torch.nn import functional as F

Data = Mapping[Hashable, Any]
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_MAPPED = "black_is_zero"


class DicomReader(PydicomReader):  # type: ignore[misc]
    """MONAI's reader of DICOM; it refuses what training took apart and it would take whole.

    Training cuts ultrasound to the regions that the file names: text, scales and traces lie outside
    of them, and the spacing is that of the region.
    """

    def get_data(self, data: Any) -> Any:
        """Pixels and facts; ValueError for an ultrasound image with regions.

        Not in ``read``: where that fails, MONAI tries its own readers, which take the whole image.
        """
        for one in data if isinstance(data, list | tuple) else [data]:
            if "SequenceOfUltrasoundRegions" in one:
                raise ValueError(
                    "an ultrasound image must be cut to its regions (SequenceOfUltrasoundRegions) "
                    "as in training; save the region alone as a picture, and give that"
                )
        return super().get_data(data)


class Finited(MapTransform):  # type: ignore[misc]
    """NaN and infinity become the lowest finite value; the result is float32."""

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Change the images of the keys."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key].to(torch.float32)
            good = torch.isfinite(image)
            result[key] = image if bool(good.all()) else torch.where(good, image, image[good].min())
        return result


class OwnRanged(MapTransform):  # type: ignore[misc]
    """For plans without a window: 8-bit pictures from 0 and 255 to 0 and 1; others as told.

    Parameters
    ----------
    keys : str or sequence of str
        Images, of the type that they are stored in.
    bytes_are_mapped : bool
        Whether 8-bit images are pictures; those of a volume are values like others.
    stretch : bool
        Whether others are mapped from their own range, or keep their values.
    """

    def __init__(self, keys: KeysCollection, bytes_are_mapped: bool, stretch: bool) -> None:
        super().__init__(keys)
        self.bytes_are_mapped, self.stretch = bytes_are_mapped, stretch

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Change the images of the keys."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._one(result[key])
        return result

    def _one(self, image: MetaTensor) -> MetaTensor:
        picture = self.bytes_are_mapped and image.dtype == torch.uint8
        made = Finited("image")({"image": image})["image"]
        if not picture and not self.stretch:
            return made
        low, high = (0.0, 255.0) if picture else (float(made.min()), float(made.max()))
        made = ((made - low) / (high - low)).clip(0, 1) if high > low else made * 0
        made.meta[_MAPPED] = True
        return made


class Channelsd(MapTransform):  # type: ignore[misc]
    """Colour to grey by luma, or grey repeated to colour; an alpha channel is dropped."""

    def __init__(self, keys: KeysCollection, channels: int) -> None:
        super().__init__(keys)
        self.channels = channels

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Change the images of the keys."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._one(result[key])
        return result

    def _one(self, image: Tensor) -> Tensor:
        image = image[:-1] if len(image) in (2, 4) else image
        if len(image) == self.channels:
            return image
        if self.channels == 1:
            weights = image.new_tensor(_LUMA).reshape(3, *[1] * (image.ndim - 1))
            return (image * weights).sum(0, keepdim=True)
        return image.repeat(self.channels, *[1] * (image.ndim - 1))


class Resampled(MapTransform, InvertibleTransform):  # type: ignore[misc]
    """To a spacing or a size, smoothed where it shrinks; then the middle is cropped out.

    Without a size every image keeps its own, at the spacing if there is one.

    Parameters
    ----------
    keys : str or sequence of str
        Images.
    size : sequence of int, optional
        Sides that the model takes.
    spacing : sequence of float, optional
        mm per axis; without it the image is resized.
    resize : str
        Without spacing: ``stretch`` to the size, or ``fit`` into it.
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: Sequence[int] | None,
        spacing: Sequence[float] | None = None,
        resize: str = "stretch",
    ) -> None:
        super().__init__(keys)
        self.size = None if size is None else tuple(size)
        self.spacing, self.resize = spacing, resize

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Change the images of the keys."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._one(result[key])
        return result

    def inverse(self, data: Data) -> dict[Hashable, Any]:
        """Back to the grid that the image had; what was cropped away is 0."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._back(result[key])
        return result

    def _one(self, image: MetaTensor) -> MetaTensor:
        before = tuple(image.shape[1:])
        after, scale = self._grid(before, image)
        out = _resample(image.as_tensor(), after, scale)
        size = after if self.size is None else self.size
        starts = [max((n - t) // 2, 0) for n, t in zip(after, size, strict=True)]
        for axis, (start, side) in enumerate(zip(starts, size, strict=True), 1):
            out = out.narrow(axis, start, min(side, out.shape[axis]))
        ratio = [n / m for n, m in zip(before, after, strict=True)]
        ratio = ratio if scale is None else [1 / f for f in scale]
        made = MetaTensor(out, meta=dict(image.meta), applied_operations=image.applied_operations)
        made.affine = _moved(image.affine, ratio, starts)
        extra = {"after": after, "starts": starts, "affine": image.affine.tolist()}
        extra["scale"] = scale
        self.push_transform(made, orig_size=before, extra_info=extra)
        return made

    def _back(self, image: MetaTensor) -> MetaTensor:
        told = self.pop_transform(image)
        extra = told["extra_info"]
        whole = image.new_zeros((len(image), *extra["after"]))
        places = [slice(s, s + n) for s, n in zip(extra["starts"], image.shape[1:], strict=True)]
        whole[(slice(None), *places)] = image
        out = _restored(whole.as_tensor(), tuple(told["orig_size"]), extra["scale"])
        made = MetaTensor(out, meta=dict(image.meta), applied_operations=image.applied_operations)
        made.affine = torch.tensor(extra["affine"], dtype=torch.float64)
        return made

    def _grid(
        self, shape: tuple[int, ...], image: MetaTensor
    ) -> tuple[tuple[int, ...], list[float] | None]:
        """Sides after resampling, and the factors where those matter more than the ends."""
        if self.spacing is not None:
            # MONAI gives 2D images three sizes of a pixel.
            have = [float(v) for v in image.pixdim[: len(shape)]]
            scale = [a / b * (1 + 1e-9) for a, b in zip(have, self.spacing, strict=True)]
            new = tuple(math.floor(n * f) for n, f in zip(shape, scale, strict=True))
            return (new, scale) if min(new) >= 1 else (tuple(max(n, 1) for n in new), None)
        if self.size is None:
            return shape, None
        if self.resize == "stretch":
            return self.size, None
        factor = min(t / n for t, n in zip(self.size, shape, strict=True))
        sides = zip(shape, self.size, strict=True)
        return tuple(min(max(round(n * factor), 1), t) for n, t in sides), None


class Finishd(MapTransform, InvertibleTransform):  # type: ignore[misc]
    """Mean 0 and deviation 1, or ImageNet's; then a black border up to the size.

    Parameters
    ----------
    keys : str or sequence of str
        Images.
    size : sequence of int
        Sides that the model takes; a longer side stays.
    mapped : bool
        Whether 0 is black for certain; else what :class:`OwnRanged` found, or the lowest value is.
    mean, deviation : sequence of float, optional
        Per channel; without them the image's own.
    normalise : bool
        Whether to do it at all.
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: Sequence[int],
        mapped: bool,
        normalise: bool = True,
        mean: Sequence[float] | None = None,
        deviation: Sequence[float] | None = None,
    ) -> None:
        super().__init__(keys)
        self.size, self.mapped, self.normalise = tuple(size), mapped, normalise
        self.mean, self.deviation = mean, deviation

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Change the images of the keys."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._one(result[key])
        return result

    def inverse(self, data: Data) -> dict[Hashable, Any]:
        """Take the border off again."""
        result = dict(data)
        for key in self.key_iterator(result):
            extra = self.pop_transform(result[key])["extra_info"]
            inner = [slice(s, s + n) for s, n in zip(extra["starts"], extra["sides"], strict=True)]
            result[key] = result[key][(slice(None), *inner)]
        return result

    def _one(self, image: MetaTensor) -> MetaTensor:
        pixels = image.as_tensor()
        mapped = self.mapped or image.meta.get(_MAPPED, False)
        black = 0.0 if mapped else float(pixels.min())
        filled = pixels.new_full((len(pixels),), black)
        if self.normalise:
            mean, deviation = self._numbers(pixels)
            each = (-1, *[1] * (pixels.ndim - 1))
            pixels = (pixels - mean.reshape(each)) / deviation.reshape(each)
            filled = (filled - mean) / deviation
        sides = tuple(pixels.shape[1:])
        size = [max(t, n) for t, n in zip(self.size, sides, strict=True)]
        starts = [(t - n) // 2 for t, n in zip(size, sides, strict=True)]
        out = filled.reshape(-1, *[1] * len(sides)).repeat(1, *size)
        inner = [slice(s, s + n) for s, n in zip(starts, sides, strict=True)]
        out[(slice(None), *inner)] = pixels
        made = MetaTensor(out, meta=dict(image.meta), applied_operations=image.applied_operations)
        made.affine = _moved(image.affine, [1.0] * len(sides), [-s for s in starts])
        self.push_transform(made, extra_info={"starts": starts, "sides": sides})
        return made

    def _numbers(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.mean is not None and self.deviation is not None:
            return pixels.new_tensor(self.mean), pixels.new_tensor(self.deviation)
        exact = pixels.to(torch.float64)
        spread = float(exact.std(unbiased=False))
        rounding = torch.finfo(torch.float32).eps * float(exact.abs().max())
        count = len(pixels)
        return (
            pixels.new_full((count,), float(exact.mean())),
            pixels.new_full((count,), spread if spread > rounding else 1.0),
        )


class MirroredWindowInferer(SlidingWindowInferer):  # type: ignore[misc]
    """MONAI's sliding window; each window also mirrored along all combinations of some axes.

    Parameters
    ----------
    axes : sequence of int
        Spatial axes, from 0.
    **settings
        As MONAI's inferer takes them.
    """

    def __init__(self, axes: Sequence[int], **settings: Any) -> None:
        super().__init__(**settings)
        found = [2 + axis for axis in axes]
        self.ways = [list(way) for k in range(len(found) + 1) for way in combinations(found, k)]

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any) -> Any:
        """The network's answer for whole images ``(N, C, *S)``."""

        def mean(part: Tensor) -> Tensor:
            seen = [network(part.flip(way)).float().flip(way) for way in self.ways]
            return torch.stack(seen).mean(dim=0)

        return super().__call__(inputs, mean)


def _restored(image: Tensor, shape: tuple[int, ...], scale: list[float] | None) -> Tensor:
    """A resampled image on the grid of `shape` that it was made of."""
    if scale is None:
        return _resample(image, shape, None)
    # Resampling let the end of the image go that fills no pixel; the last one stands for it.
    wider = F.pad(image[None], (0, 2) * len(shape), mode="replicate")[0]
    back = [1 / factor for factor in scale]
    sides = tuple(math.floor(n * f) for n, f in zip(wider.shape[1:], back, strict=True))
    out = _resample(wider, sides, back)
    return out[(slice(None), *(slice(n) for n in shape))]


def _resample(image: Tensor, shape: tuple[int, ...], scale: list[float] | None) -> Tensor:
    if tuple(image.shape[1:]) == shape and (scale is None or all(abs(f - 1) < 1e-5 for f in scale)):
        return image
    if len(shape) == 2:
        return _smooth(image[None], shape, scale)[0]
    # torch smooths in two axes only; the third goes by itself.
    channels, depth = len(image), image.shape[-1]
    image = _smooth(image.movedim(-1, 1), shape[:2], scale and scale[:2]).movedim(1, -1)
    lines = image.reshape(1, channels, -1, depth)
    lines = _smooth(lines, (lines.shape[2], shape[2]), scale and [1.0, scale[2]])
    return lines.reshape(channels, *shape)


def _smooth(layers: Tensor, shape: tuple[int, ...], scale: list[float] | None) -> Tensor:
    if scale is None:
        return F.interpolate(layers, size=list(shape), mode="bilinear", antialias=True)
    return F.interpolate(
        layers, scale_factor=scale, mode="bilinear", recompute_scale_factor=False, antialias=True
    )


def _moved(affine: Tensor, ratio: Sequence[float], starts: Sequence[int]) -> Tensor:
    """The affine of a grid whose pixels are `ratio` as large and that begins at `starts`."""
    change = torch.eye(len(affine), dtype=affine.dtype)
    for axis, (size, start) in enumerate(zip(ratio, starts, strict=True)):
        change[axis, axis] = size
        change[axis, -1] = (start + 0.5) * size - 0.5
    return affine @ change
