"""Prepared images as pictures for a page: grey levels, planes of a volume, masks in colour."""

from __future__ import annotations

import base64
import io
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

# Told apart by people who see no red or no green (Okabe and Ito, 2008); cycled when they run out.
COLOURS: Final = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
PLANES: Final = ("sagittal", "coronal", "axial")
_TINT: Final = 0.45  # share of the mask's colour in a pixel that it covers


def upright(plane: NDArray[Any]) -> NDArray[Any]:
    """A plane of a volume as it is shown."""
    # Volumes run to the right, to the front and upwards; pictures run down.
    return np.flip(np.swapaxes(plane, -1, -2), -2)


def as_bytes(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Darkest to brightest as 0 to 255."""
    low, high = float(pixels.min()), float(pixels.max())
    scaled = (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)
    return np.asarray(np.round(scaled * 255), np.uint8)


def tinted(grey: NDArray[np.uint8], mask: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """``(C, H, W)`` to ``(H, W, 3)``, with the classes of a mask in their colours."""
    picture = np.moveaxis(np.broadcast_to(grey, (3, *grey.shape[1:])), 0, -1).astype(np.float32)
    if mask is not None:
        for label in np.unique(mask[mask > 0]):
            colour = np.array(COLOURS[(int(label) - 1) % len(COLOURS)], np.float32)
            where = mask == label
            picture[where] = (1 - _TINT) * picture[where] + _TINT * colour
    return np.asarray(np.round(picture), np.uint8)


def png(picture: NDArray[np.uint8]) -> str:
    """A picture as a PNG file, in base64."""
    stream = io.BytesIO()
    Pillow.fromarray(picture).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
