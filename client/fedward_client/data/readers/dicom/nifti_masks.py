"""NIfTI masks of DICOM images, checked against the images' positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedward.errors import DataError
from fedward_client.data.files import file_identity
from fedward_client.data.readers.dicom.pixels import Place, read_place
from fedward_client.data.readers.dicom.series import Frames, Geometry, apart, frame_affine, geometry
from fedward_client.data.readers.nifti import NiftiMask, Turned, oriented_volume


@dataclass(frozen=True)
class PlacedNiftiMask:
    """Reads a NIfTI label map of a DICOM frame or volume, turned to the image's axes.

    Attributes
    ----------
    path : Path
        The label map.
    frames : tuple
        File and frame of each slice of the image; one in a 2D task.
    dimensions : int
        Of the task.
    """

    path: Path
    frames: Frames
    dimensions: int

    def __call__(self) -> NDArray[np.uint8]:
        """``(H, W)`` like the frame, or ``(x, y, z)`` in the grid of the volume.

        Raises
        ------
        DataError
            "shape of mask differs"; "position of mask differs": the affine says that it lies
            elsewhere; what the image's own geometry raises.
        """
        places = [read_place(path, frame) for path, frame in self.frames]
        return self._slice(places[0]) if self.dimensions == 2 else self._volume(places)

    def identity(self) -> str:
        """A digest of place, size and time of change, and of how it is read."""
        return file_identity(self.path, "placed", self.dimensions)

    def _slice(self, place: Place) -> NDArray[np.uint8]:
        affine = frame_affine(place)
        if affine is None:  # a radiograph lies nowhere: all that it says is its shape
            return NiftiMask(self.path, 2)()
        mask = Turned.to(self.path, affine).within(affine, (*place.shape, 1))
        return np.ascontiguousarray(mask[..., 0])

    def _volume(self, places: Sequence[Place]) -> NDArray[np.uint8]:
        kept = apart(places)
        layout = geometry(kept, kept[0].spacing)
        shape = (*kept[0].shape, layout.depth)
        mask = Turned.to(self.path, layout.affine)
        if not layout.tilt or layout.gap:  # no affine tells where uneven slices were scanned
            return self._upright(mask, layout, shape)
        try:  # as it was scanned; or on the volume that was set upright already
            values = mask.within(layout.scanned, shape)
        except DataError:
            return self._upright(mask, layout, shape)
        slices = [values[..., layout.order.index(k)] for k in range(len(kept))]
        return np.ascontiguousarray(layout.volume(slices, labels=True)[0], np.uint8)

    def _upright(self, mask: Turned, layout: Geometry, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        values = mask.within(layout.affine, shape)
        return np.ascontiguousarray(oriented_volume(values, layout.affine)[0], np.uint8)
