"""Which frames of a segmentation belong to which slice of the images that it is of."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from client.data import reasons
from client.data.decode import Place
from client.data.readers.dicom_mask_files import MaskFile
from client.data.readers.dicom_planes import Slices, normal_of
from client.data.readers.dicom_regrid import resampled
from client.data.readers.dicom_segments import Layer, SegmentFrame, read_layers

_NEAR: Final = 0.25  # of a pixel that a frame may be away from its image's place
Fit = Literal["same", "moved", "other", "shape"]


class Part(Protocol):
    """What adds to the label map of a slice."""

    def labels(self, place: Place) -> NDArray[np.uint8]:
        """Its own label map ``(H, W)``, 0 where it has nothing."""


def segment_parts(
    file: MaskFile, slices: Slices, instances: Collection[str]
) -> Iterator[tuple[int, Part]]:
    """The frames of each slice; a file on another grid is brought to that of the slices.

    Parameters
    ----------
    file : MaskFile
        The segmentation.
    slices : Slices
        Of the images.
    instances : collection of str
        SOPInstanceUIDs of the whole series: a frame made from one of these is of no other.

    Raises
    ------
    DataError
        "position of mask differs": a frame lies elsewhere than the image that it names, or on
        another grid without a common frame of reference; "shape of mask differs": the same, where
        only the size differs.
    """
    layers = read_layers(file)
    trusted = any(one.source is not None and one.source[0] in instances for one in layers)
    fits: set[Fit] = set()
    parts: list[tuple[int, Part]] = []
    for layer in layers:
        named = layer.source is not None and layer.source[0] in instances
        numbers, beside = _slices_of(layer, slices, named=named)
        if beside and not (trusted and layer.source is not None):
            fits.add("other")
        for number in numbers:
            fit = _fit(layer.place, slices.places[number], named=named)
            if fit == "moved" and named:  # its place and its image contradict each other
                raise reasons.unusable(reasons.MASK_POSITION)
            fits.add(fit)
            parts.append((number, SegmentFrame(file, layer.index, layer.segment)))
    if fits <= {"same"}:
        yield from parts
    else:
        reason = reasons.MASK_SHAPE if fits <= {"same", "shape"} else reasons.MASK_POSITION
        yield from resampled(file, layers, slices, reason)


def _slices_of(layer: Layer, slices: Slices, *, named: bool) -> tuple[tuple[int, ...], bool]:
    if named and layer.source is not None:
        return slices.named(*layer.source) or (), False
    normal = normal_of(layer.place)
    if layer.place.position is None or normal is None:
        return (), False
    found = slices.at(layer.place.position, normal)
    return found.numbers, found.beside


def _fit(one: Place, other: Place, *, named: bool) -> Fit:
    """How the grids of two frames compare; a frame that names its image need not tell its place."""
    if (
        one.position is None
        or other.position is None
        or (one.orientation is None or other.orientation is None)
    ):
        return "same" if named and one.shape == other.shape else "shape" if named else "other"
    near = _NEAR * min(other.spacing)
    turned = np.allclose(one.orientation, other.orientation, atol=1e-2)
    if not (turned and np.allclose(one.spacing, other.spacing, rtol=1e-2)):
        return "other"
    corner = np.allclose(one.position, other.position, atol=near)
    if one.shape != other.shape:
        return "shape" if corner else "other"
    return "same" if corner else "moved"
