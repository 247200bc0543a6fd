"""Surface distances between two masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


def hd95(prediction: Mask, truth: Mask, spacing: Sequence[float]) -> float | None:
    """95th percentile Hausdorff distance: the larger one of the two directions.

    Parameters
    ----------
    prediction, truth : NDArray
        Masks of one shape, ``(H, W)`` or ``(H, W, D)``.
    spacing : sequence of float
        mm per axis.

    Returns
    -------
    float or None
        In mm; None unless both masks have a pixel.

    Notes
    -----
    A surface pixel is one of the mask with a neighbour across a face that is outside it, or
    outside the image (as in MONAI).
    """
    if not prediction.any() or not truth.any():
        return None
    box = _box(prediction | truth)
    a, b = _surface(prediction[box]), _surface(truth[box])
    return max(_directed(a, b, spacing), _directed(b, a, spacing))


def _box(mask: Mask) -> tuple[slice, ...]:
    # Beyond the box that holds both masks there is nothing to measure.
    found: tuple[slice, ...] = ndimage.find_objects(mask.astype(np.uint8))[0]
    return found


def _surface(mask: Mask) -> Mask:
    surface: Mask = mask & ~ndimage.binary_erosion(mask)
    return surface


def _directed(of: Mask, to: Mask, spacing: Sequence[float]) -> float:
    distance = ndimage.distance_transform_edt(~to, sampling=tuple(spacing))
    return float(np.percentile(distance[of], 95))
