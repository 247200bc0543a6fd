"""RTSTRUCT contours as masks (PS3.3, A.19 and C.8.8.6)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedward import rule_codes
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.mask_references import MaskFile, contours_of
from fedward_client.data.readers.dicom.pixels import Place
from fedward_client.data.readers.dicom.series import Slices
from fedward_client.data.readers.dicom.sniff import check_mask

# Polygons to masks: a pixel is inside when its centre is, by the even-odd rule.

_AT_ONCE: Final = 1 << 20  # crossings of rows and edges that are in memory
_MOST: Final = 1 << 26  # in all


def fill(polygons: Sequence[Points], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Rasterise closed polygons together: what two of them cover is outside again (XOR).

    Parameters
    ----------
    polygons : sequence
        Of corners ``(N, 2)``: row and column, the centre of the first pixel being (0, 0). The last
        corner is joined with the first. An edge that is walked forth and back (a keyhole) encloses
        nothing.
    shape : tuple of int
        Rows and columns.

    Returns
    -------
    NDArray
        ``shape``. A centre that lies on an edge belongs to the polygon below or right of it, so
        that polygons with a common edge neither overlap nor leave a gap.

    Raises
    ------
    DataError
        "too large": more crossings of rows and edges than any drawing has.

    Notes
    -----
    Every edge turns over all pixels right of it in the rows that it crosses; what is turned over
    an odd number of times is inside.
    """
    rows, columns = shape
    turned = np.zeros((rows, columns + 1), np.int64)
    total = 0
    for low, high in _edges(polygons):
        first = np.clip(np.ceil(low[:, 0]), 0, rows).astype(np.int64)
        last = np.clip(np.ceil(high[:, 0]), 0, rows).astype(np.int64)  # not crossed itself
        counts = last - first
        total += int(counts.sum())
        if total > _MOST:
            raise rule_codes.unusable(rule_codes.TOO_LARGE)
        for part in _portions(counts):
            _turn(turned, low[part], high[part], first[part], counts[part])
    return np.asarray(np.cumsum(turned[:, :columns], axis=1) % 2 == 1)


def _edges(polygons: Sequence[Points]) -> Iterator[tuple[Points, Points]]:
    """Upper and lower ends of each polygon's edges."""
    for polygon in polygons:
        other = np.roll(polygon, -1, axis=0)
        # By one order of the ends, an edge walked back gives the very same numbers as forth.
        swap = (polygon[:, 0] > other[:, 0])[:, None]
        yield np.where(swap, other, polygon), np.where(swap, polygon, other)


def _portions(counts: NDArray[np.int64]) -> Iterator[slice]:
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _AT_ONCE, "right")))
        yield slice(start, stop)
        start = stop


def _turn(
    turned: NDArray[np.int64],
    low: Points,
    high: Points,
    first: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> None:
    edge = np.repeat(np.arange(len(counts)), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    row = first[edge] + np.arange(len(edge)) - starts
    low, high = low[edge], high[edge]
    share = (row - low[:, 0]) / (high[:, 0] - low[:, 0])
    crossing = low[:, 1] + share * (high[:, 1] - low[:, 1])
    column = np.clip(np.ceil(crossing), 0, turned.shape[1] - 1).astype(np.int64)
    np.add.at(turned, (row, column), 1)


Points = NDArray[np.float64]
_FURTHEST: Final = 1e5  # mm; nobody is larger
_POINTS: Final = 4_000_000  # of a file
_DIGITS: Final = 3  # of mm, to which a contour that occurs twice is the same


@dataclass(frozen=True)
class Contour:
    """A closed line.

    Attributes
    ----------
    region : int
        The number of its region.
    points : NDArray
        ``(N, 3)`` mm, DICOM patient axes.
    source : tuple or None
        SOPInstanceUID and frame (from 0; None: not told) of the image that it was drawn on.
    space : str
        UID of the region's frame of reference.
    """

    region: int
    points: Points
    source: tuple[str, int | None] | None
    space: str


@dataclass(frozen=True)
class Outlines:
    """The contours of one region on one slice; an inner one is a hole, as is one by a keyhole."""

    polygons: tuple[Points, ...]
    label: int

    def labels(self, place: Place) -> NDArray[np.uint8]:
        """The slice's label map ``(H, W)``."""
        return np.where(fill(self.polygons, place.shape), self.label, 0).astype(np.uint8)


def contour_parts(
    file: MaskFile, slices: Slices, instances: Collection[str]
) -> Iterator[tuple[int, Outlines]]:
    """The outlines of each slice.

    Raises
    ------
    DataError
        "position of mask differs": a contour lies between slices, aslant, beside its image, or in
        another frame of reference; "not readable", "too large".
    """
    contours = read_contours(file, file.path.stat().st_mtime_ns)
    # A file whose every image is somewhere else names them by other UIDs than they have here.
    trusted = any(c.source is not None and c.source[0] in instances for c in contours)
    drawn: dict[tuple[int, int], dict[bytes, Points]] = {}
    for contour in contours:
        for number in _slices_of(contour, slices, instances, trusted):
            if not slices.lies(number) or slices.away(number, contour.points) > 1:
                raise rule_codes.unusable(rule_codes.MASK_POSITION)
            polygon = _in_pixels(contour.points, slices.places[number])
            # Twice the same would take itself away again.
            key = np.round(contour.points, _DIGITS).tobytes()
            drawn.setdefault((number, contour.region), {})[key] = polygon
    of_class = dict(file.labels)
    for (number, region), polygons in drawn.items():
        yield number, Outlines(tuple(polygons.values()), of_class[region])


def _slices_of(
    contour: Contour, slices: Slices, instances: Collection[str], trusted: bool
) -> tuple[int, ...]:
    source = contour.source
    if source is not None and source[0] in instances:
        named = slices.named(*source)
        if named is not None:
            return named
    found = slices.at(contour.points[0])
    spaces = {slices.places[number].space for number in found.numbers} - {""}
    if contour.space and spaces - {contour.space}:
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    if found.beside and not (trusted and source is not None):
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    return found.numbers


def _in_pixels(points: Points, place: Place) -> Points:
    """Rows and columns ``(N, 2)`` of points; (0, 0) is the centre of the first pixel."""
    along = place.orientation
    if along is None or place.position is None:
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    flat = (points - place.position) @ np.stack([along[1], along[0]]).T / np.array(place.spacing)
    low, high = flat.min(axis=0), flat.max(axis=0)
    if (high < -0.5).any() or (low > np.array(place.shape) - 0.5).any():
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    return np.asarray(flat)


@lru_cache(maxsize=2)
def read_contours(file: MaskFile, changed: int) -> tuple[Contour, ...]:
    """The closed contours of the regions that are of a class.

    Parameters
    ----------
    file : MaskFile
        The structure set.
    changed : int
        When it was last changed.

    Raises
    ------
    DataError
        "not readable": among others a point without or with too many coordinates, or more or
        fewer points than the file says; "position of mask differs": nobody is that large;
        "too large".
    """
    with quiet():
        try:
            check_mask(file.path)
            header = pydicom.dcmread(file.path, force=True)
            spaces = {
                int(one.ROINumber): str(one.get("ReferencedFrameOfReferenceUID") or "")
                for one in header.StructureSetROISequence
            }
            made, total = [], 0
            for region, item in contours_of(header, dict(file.labels)):
                points = _points(item)
                total += len(points)
                if total > _POINTS:
                    raise rule_codes.unusable(rule_codes.TOO_LARGE)
                if len(points) > 2:  # fewer enclose nothing
                    made.append(Contour(region, points, _source(item), spaces.get(region, "")))
            return tuple(made)
        except Exception as error:
            raise rule_codes.unusable(rule_codes.reason_of(error)) from None


def _points(item: Dataset) -> Points:
    """Straight from the text: a contour may have more points than pydicom has time for."""
    raw = item.get_item("ContourData")
    value = raw.value if raw is not None else b""
    if not isinstance(value, bytes):
        value = "\\".join(map(str, value or ())).encode()
    parts = value.strip(b" \0").split(b"\\") if value else []
    if len(parts) > 3 * _POINTS:
        raise rule_codes.unusable(rule_codes.TOO_LARGE)
    points = np.fromiter(map(float, parts), np.float64, len(parts)).reshape(-1, 3)
    said = item.get("NumberOfContourPoints")
    if not np.isfinite(points).all() or (said is not None and int(said) != len(points)):
        raise rule_codes.unusable(rule_codes.NOT_READABLE)
    if len(points) and np.abs(points).max() > _FURTHEST:
        raise rule_codes.unusable(rule_codes.MASK_POSITION)
    return points


def _source(item: Dataset) -> tuple[str, int | None] | None:
    images = item.get("ContourImageSequence") or []
    if len(images) != 1:
        return None
    number = images[0].get("ReferencedFrameNumber")
    first = number if isinstance(number, int) or not number else number[0]
    uid = str(images[0].get("ReferencedSOPInstanceUID") or "")
    return (uid, int(first) - 1 if first else None) if uid else None
