"""Frames of DICOM segmentations: binary, fractional, and label maps (PS3.3, A.51 and C.8.20)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from client.data import reasons
from client.data.decode import Place, frame_bytes, place_of
from client.data.quiet import quiet
from client.data.readers.dicom_files import check_mask
from client.data.readers.dicom_mask_files import MaskFile
from client.data.stored import check_length, open_dicom, stored_values

_LARGEST: Final = 1 << 30  # bytes of a decoded frame


@dataclass(frozen=True)
class Layer:
    """One frame of a segmentation.

    Attributes
    ----------
    index : int
        The frame, from 0.
    segment : int or None
        The number of its segment; None in a label map, whose pixels tell.
    place : Place
        Where it lies.
    depth : float
        mm from plane to plane where the file tells; 0 where it does not.
    thickness : float
        mm, or 0.
    source : tuple or None
        SOPInstanceUID and frame of the one image that it was made from, where it says so.
    """

    index: int
    segment: int | None
    place: Place
    depth: float
    thickness: float
    source: tuple[str, int] | None


@dataclass(frozen=True)
class SegmentFrame:
    """One frame of a segmentation that lies on the grid of a slice."""

    file: MaskFile
    index: int
    segment: int | None

    def labels(self, place: Place) -> NDArray[np.uint8]:
        """The slice's label map ``(H, W)``.

        Raises
        ------
        DataError
            "shape of mask differs", "unknown class in mask", "not readable".
        """
        found = decode_layer(self.file, self.index, self.segment)
        if found.shape != place.shape:
            raise reasons.unusable(reasons.MASK_SHAPE)
        return found


def read_layers(file: MaskFile) -> tuple[Layer, ...]:
    """The frames of a file that hold a class.

    Raises
    ------
    DataError
        "not readable" or "too large".
    """
    numbers = {number for number, _ in file.labels}
    layers = _layers(file.path, file.path.stat().st_mtime_ns)
    return tuple(one for one in layers if one.segment is None or one.segment in numbers)


@lru_cache(maxsize=4)
def _layers(path: Path, changed: int) -> tuple[Layer, ...]:
    with quiet():
        try:
            check_mask(path)
            whole = pydicom.dcmread(path, force=True)
            if frame_bytes(whole) > _LARGEST:
                raise reasons.unusable(reasons.TOO_LARGE)
            check_length(whole)
            groups = whole.PerFrameFunctionalGroupsSequence
            return tuple(_layer(whole, group, k) for k, group in enumerate(groups))
        except Exception as error:
            raise reasons.unusable(reasons.reason_of(error)) from None


def decode_layer(file: MaskFile, index: int, segment: int | None) -> NDArray[np.uint8]:
    """A frame as a label map of the task's classes, ``(H, W)``.

    Raises
    ------
    DataError
        "unknown class in mask": a label map has a value that the file does not describe;
        "not readable".
    """
    with quiet():
        try:
            opened = open_dicom(file.path)
            header, values = opened.header, stored_values(opened, index)
            if values.ndim != 2:
                raise reasons.unusable(reasons.MASK_SHAPE)
            if segment is None:
                return _mapped(header, values, file)
            inside = _inside(header, values, file.threshold)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a decoder's panic is no Exception
            raise reasons.unusable(reasons.reason_of(error)) from None
    return np.where(inside, dict(file.labels)[segment], 0).astype(np.uint8)


def _mapped(header: Dataset, values: NDArray[Any], file: MaskFile) -> NDArray[np.uint8]:
    described = {0, *(int(one.SegmentNumber) for one in header.SegmentSequence)}
    if (padding := header.get("PixelPaddingValue")) is not None:
        described.add(int(padding))
    present = np.unique(values)
    if not described.issuperset(int(v) for v in present):
        raise reasons.unusable(reasons.MASK_CLASS)
    of_class = dict(file.labels)
    labels = np.array([of_class.get(int(v), 0) for v in present], np.uint8)
    return labels[np.searchsorted(present, values)]


def _inside(header: Dataset, values: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    if str(header.get("SegmentationType", "")).upper() != "FRACTIONAL":
        return np.asarray(values > 0)
    most = int(header.get("MaximumFractionalValue", 255))
    # What is nothing at all is no foreground, however low the threshold.
    return np.asarray((values >= threshold * most) & (values > 0))


def _layer(header: Dataset, group: Dataset, index: int) -> Layer:
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    number = None
    if str(header.get("SegmentationType", "")).upper() != "LABELMAP":
        owner = group if "SegmentIdentificationSequence" in group else shared
        number = int(owner.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
    measures = _first(group, "PixelMeasuresSequence") or _first(shared, "PixelMeasuresSequence")
    source = _source(group) or _source(shared)
    return Layer(
        index,
        number,
        place_of(header, index),
        _length(measures, "SpacingBetweenSlices"),
        _length(measures, "SliceThickness"),
        source,
    )


def _first(group: Dataset, name: str) -> Dataset | None:
    items = group.get(name) or []
    return items[0] if len(items) else None


def _length(measures: Dataset | None, name: str) -> float:
    value = float((measures.get(name) if measures is not None else 0) or 0)
    return abs(value) if np.isfinite(value) else 0.0


def _source(group: Dataset) -> tuple[str, int] | None:
    """The one image that a frame was made from, where it says so (C.7.6.16.2.6)."""
    images = [
        image
        for derivation in group.get("DerivationImageSequence") or []
        for image in derivation.get("SourceImageSequence") or []
    ]
    if len(images) != 1:
        return None
    number = images[0].get("ReferencedFrameNumber")
    first = number if isinstance(number, int) else (number[0] if number else 1)
    return str(images[0].ReferencedSOPInstanceUID), int(first) - 1
