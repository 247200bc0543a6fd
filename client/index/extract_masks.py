"""How much each segment of a mask marks: the class balance of a segmentation task."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray

from client.data import reasons
from client.data.decode import frame_bytes
from client.data.readers.dicom_files import STRUCTURES, check_mask
from client.data.readers.dicom_mask_files import contours_of
from client.data.stored import open_dicom, stored_values
from client.index.extract_images import LARGEST

MASK_FOLDERS: Final = ("masks", "labels", "labelsTr")


def segments_of(path: Path) -> str:
    """Pixels that each segment marks (closed contours of each region), by number, as JSON.

    Raises
    ------
    DataError
        "too large".
    Exception
        Whatever pydicom and decoders raise.
    """
    check_mask(path)
    opened = open_dicom(path)
    header = opened.header
    if str(header.SOPClassUID) == STRUCTURES:
        every = {int(one.ROINumber): 1 for one in header.StructureSetROISequence}
        return _text(Counter(number for number, _ in contours_of(header, every)))
    frames = int(header.get("NumberOfFrames") or 1)
    if frame_bytes(header) * frames > LARGEST:
        raise reasons.unusable(reasons.TOO_LARGE)
    marked: Counter[int] = Counter()
    for number in range(frames):
        values = stored_values(opened, number)
        if str(header.get("SegmentationType", "")).upper() == "LABELMAP":
            marked += _values(values)
        else:
            marked[_segment(header, number)] += int(np.count_nonzero(values))
    return _text(marked)


def values_of(pixels: NDArray[Any]) -> str:
    """Pixels of each value above 0 in a label map, as JSON."""
    return _text(_values(pixels))


def _values(pixels: NDArray[Any]) -> Counter[int]:
    values, counts = np.unique(pixels, return_counts=True)
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return Counter({int(value): int(n) for value, n in pairs if value > 0})


def _segment(header: pydicom.Dataset, frame: int) -> int:
    shared = (header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    group = header.PerFrameFunctionalGroupsSequence[frame]
    owner = group if "SegmentIdentificationSequence" in group else shared
    return int(owner.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def _text(counts: Counter[int]) -> str:
    return json.dumps({str(number): counts[number] for number in sorted(counts)})
