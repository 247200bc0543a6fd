"""PNG, JPEG, TIFF and BMP files: images and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps

from client.data import reasons
from client.data.files import file_identity
from client.data.masks import label_map
from client.data.quiet import quiet
from client.data.types import Image

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
_DEEP: Final = ("I", "F")  # 16 bits and more: I;16, I;16B, I, F


def is_picture(path: Path) -> bool:
    """Whether the suffix is that of a picture."""
    return path.suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class Picture:
    """Reads a picture; 8-bit ones propose the window 0 to 255."""

    path: Path

    def __call__(self) -> Image:
        values = _open(self.path, _colours)
        window = (0.0, 255.0) if values.dtype == np.uint8 else None
        planes = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
        return Image(np.ascontiguousarray(planes, np.float32), (1.0, 1.0), window)

    def identity(self) -> str:
        """A digest of place, size and time of change."""
        return file_identity(self.path)


@dataclass(frozen=True)
class PictureMask:
    """Reads a label map: grey levels, or the indices of a palette."""

    path: Path

    def __call__(self) -> NDArray[np.uint8]:
        return label_map(_open(self.path, _levels))

    def identity(self) -> str:
        """A digest of place, size and time of change."""
        return file_identity(self.path)


def _open(path: Path, read: Callable[[Pillow.Image, bool], NDArray[Any]]) -> NDArray[Any]:
    with quiet():
        try:
            with Pillow.open(path) as file:
                if getattr(file, "n_frames", 1) != 1:
                    raise reasons.unusable(reasons.WRONG_SHAPE)
                lossy = file.format == "JPEG"
                return read(ImageOps.exif_transpose(file), lossy)
        except Exception as error:
            # Pillow raises nearly anything on a broken file, and its texts quote the path.
            raise reasons.unusable(reasons.reason_of(error)) from None


def _colours(image: Pillow.Image, lossy: bool) -> NDArray[Any]:
    if image.mode.startswith(_DEEP):
        return np.asarray(image).astype(np.float32)
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("LA" if "A" in image.mode.upper() else "L").getchannel(0))
    if image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA":
        image = image.convert("RGBA")
    return np.asarray(_without_alpha(image).convert("RGB"))


def _without_alpha(image: Pillow.Image) -> Pillow.Image:
    # Dropped, not blended: what lies under a transparent pixel is still the image.
    if image.mode in ("RGBA", "RGBX"):
        return Pillow.merge("RGB", image.split()[:3])
    return image


def _levels(image: Pillow.Image, lossy: bool) -> NDArray[Any]:
    if lossy or image.mode == "1":
        # Lossy files blur the edge of a mask: only black and white can be told apart.
        return (np.asarray(image.convert("L")) >= 128).astype(np.uint8) * np.uint8(255)
    if image.mode in ("P", "L") or image.mode.startswith(_DEEP):
        return np.asarray(image)
    bands = np.asarray(image.convert("RGB") if image.mode != "LA" else image.getchannel("L"))
    if bands.ndim == 3 and not (bands == bands[..., :1]).all():
        raise reasons.unusable(reasons.MASK_CLASS)
    return bands if bands.ndim == 2 else bands[..., 0]
