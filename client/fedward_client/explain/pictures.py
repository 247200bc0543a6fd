"""An image with its map over it: for the page, and as one picture for DICOM."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedward_client.data.pictures import PLANES, as_bytes, png, tinted, upright

# Weak to strong, told apart by people who see no red or no green, and from grey.
_WEAK: Final = np.array([213, 94, 0], np.float32)
_STRONG: Final = np.array([240, 228, 66], np.float32)
_OPAQUE: Final = 0.8  # of the strongest


def pictures(
    pixels: NDArray[np.float32],
    found: NDArray[np.float32],
    mask: NDArray[np.uint8] | None,
) -> tuple[tuple[str, str, str], ...]:
    """What a page shows of a prepared image; of a volume the planes through the map's peak.

    Parameters
    ----------
    pixels : NDArray
        ``(C, *S)``, whose first three channels are shown, or the first.
    found : NDArray
        The map ``(*S)``, 0 to 1.
    mask : NDArray or None
        What the model marked.

    Returns
    -------
    tuple
        For each picture the name of its plane, the image, and the map to lay over it; both PNG
        files in base64.
    """
    grey = as_bytes(pixels[: 3 if len(pixels) == 3 else 1])
    if grey.ndim == 3:
        return (("", png(tinted(grey, mask)), png(heat(found))),)
    place = np.unravel_index(int(np.argmax(found)), found.shape)
    made = []
    for axis, plane in enumerate(PLANES):
        cut = (slice(None),) * axis + (int(place[axis]),)
        image = upright(grey[(slice(None), *cut)])
        marked = None if mask is None else upright(mask[cut])
        laid = heat(upright(found[cut]))
        made.append((plane, png(tinted(image, marked)), png(laid)))
    return tuple(made)


def heat(found: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A map ``(H, W)``, 0 to 1, as ``(H, W, 4)`` RGBA: the stronger, the less transparent."""
    part = found[..., None]
    colour = (1 - part) * _WEAK + part * _STRONG
    return np.asarray(np.rint(np.concatenate([colour, 255 * _OPAQUE * part], axis=-1)), np.uint8)


def overlaid(grey: NDArray[np.uint8], found: NDArray[np.float32]) -> NDArray[np.uint8]:
    """An image ``(C, H, W)`` with its map ``(H, W)`` over it, ``(H, W, 3)``."""
    laid = heat(found).astype(np.float32)
    alpha = laid[..., 3:] / 255
    return np.asarray(np.rint((1 - alpha) * tinted(grey, None) + alpha * laid[..., :3]), np.uint8)
