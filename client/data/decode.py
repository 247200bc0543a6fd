"""DICOM pixels as the modality means them: HU for CT; grey with bright high; colour as RGB.

PS3.3 sections: pixel module C.7.6.3, modality LUT C.11.1, VOI LUT C.11.2, functional groups
C.7.6.16. Only one frame is decoded at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

from client.data import reasons, voi
from client.data.padding import padding
from client.data.quiet import quiet
from client.data.stored import open_dicom, stored_values
from client.data.types import Image, Lookup

_GROUPS: Final = (
    "PixelValueTransformationSequence",
    "FrameVOILUTSequence",
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
)
_LARGEST: Final = 2 << 30  # bytes of one decoded frame: a square of 16,000 pixels
_MEASURED: Final = ("PT",)  # modalities
_SPACINGS: Final = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")


@dataclass(frozen=True)
class Frame:
    """A decoded frame and where it lies.

    Attributes
    ----------
    image : Image
        ``(C, H, W)``; spacing between rows, then between columns.
    position : NDArray or None
        Centre of the first pixel, ``(3,)`` mm, DICOM patient axes (left, posterior, superior).
    orientation : NDArray or None
        ``(2, 3)`` unit vectors along a row (to the next column) and down a column.
    """

    image: Image
    position: NDArray[np.float64] | None
    orientation: NDArray[np.float64] | None


@dataclass(frozen=True)
class Place:
    """Size and place of a frame; `position` and `orientation` as in :class:`Frame`.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns.
    spacing : tuple of float
        mm between rows, then between columns.
    instance : str
        The file's SOPInstanceUID; stays in memory.
    space : str
        UID of the frame of reference, in which positions are comparable; "" where unknown.
    """

    shape: tuple[int, int]
    spacing: tuple[float, float]
    position: NDArray[np.float64] | None
    orientation: NDArray[np.float64] | None
    instance: str
    space: str = ""


def read_frame(path: Path, frame: int = 0) -> Frame:
    """Decode one frame of a DICOM file.

    Raises
    ------
    DataError
        "no pixel data" or "not readable".
    """
    with quiet():
        try:
            opened = open_dicom(path)
            header = opened.header
            if "Rows" not in header or "Columns" not in header:
                raise reasons.unusable(reasons.NO_PIXELS)
            if frame_bytes(header) > _LARGEST:
                raise reasons.unusable(reasons.TOO_LARGE)
            return decode(header, stored_values(opened, frame), frame)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # Decoders raise nearly anything, a Rust one its panics, which are no Exception; and
            # their texts quote the file.
            missing = isinstance(error, AttributeError) and "no pixel data" in str(error).lower()
            reason = reasons.NO_PIXELS if missing else reasons.reason_of(error)
            raise reasons.unusable(reason) from None


def frame_bytes(header: Dataset) -> int:
    """Bytes that one decoded frame takes, by what the file declares of itself."""
    sides = int(header.get("Rows") or 0) * int(header.get("Columns") or 0)
    # Values are worked on as 8 bytes each, whatever they are stored in.
    return sides * int(header.get("SamplesPerPixel") or 1) * 8


def read_place(path: Path, frame: int = 0) -> Place:
    """Where a frame lies, without decoding it.

    Raises
    ------
    DataError
        "no pixel data" or "not readable".
    """
    with quiet():
        try:
            header = open_dicom(path).header
            if "Rows" not in header or "Columns" not in header:
                raise reasons.unusable(reasons.NO_PIXELS)
            return place_of(header, frame)
        except Exception as error:
            raise reasons.unusable(reasons.reason_of(error)) from None


def place_of(header: Dataset, frame: int) -> Place:
    """Where a frame of a file with these attributes lies."""
    flat = _flat(header, frame)
    return Place(
        (int(header.Rows), int(header.Columns)),
        _spacing(flat),
        _vector(flat, "ImagePositionPatient", (3,)),
        _vector(flat, "ImageOrientationPatient", (2, 3)),
        str(header.get("SOPInstanceUID") or ""),
        str(header.get("FrameOfReferenceUID") or ""),
    )


def decode(header: Dataset, pixels: NDArray[np.generic], frame: int = 0) -> Frame:
    """From a frame's stored values to a :class:`Frame`.

    Parameters
    ----------
    header : Dataset
        The file's attributes, functional groups included.
    pixels : NDArray
        ``(H, W)`` or ``(H, W, 3)``, as pydicom decodes them (colour already RGB).
    frame : int
        Which frame of a multi-frame file this is, from 0.
    """
    flat = _flat(header, frame)
    lookup: Lookup | None = None
    if pixels.ndim != (2 if _is_grey(flat) or _is_palette(flat) else 3):
        raise reasons.unusable(reasons.NOT_READABLE)  # samples and photometric disagree
    if _is_grey(flat):
        values, window, lookup = _grey(flat, pixels)
    else:
        values, window = _colour(flat, pixels)
    values = np.ascontiguousarray(values, np.float32)
    return Frame(
        Image(values, _spacing(flat), window, lookup=lookup),
        _vector(flat, "ImagePositionPatient", (3,)),
        _vector(flat, "ImageOrientationPatient", (2, 3)),
    )


def _flat(header: Dataset, frame: int) -> Dataset:
    """The header with this frame's functional groups laid over it."""
    shared = header.get("SharedFunctionalGroupsSequence") or []
    each = header.get("PerFrameFunctionalGroupsSequence") or []
    if not (shared or each):
        return header
    flat = Dataset()
    flat.update(header)
    if None not in header.original_encoding:  # palettes are stored in the file's byte order
        flat.set_original_encoding(*header.original_encoding)
    for groups in [*shared[:1], *each[frame : frame + 1]]:
        for name in _GROUPS:
            for item in (groups.get(name) or [])[:1]:
                flat.update(item)
    return flat


def _is_grey(flat: Dataset) -> bool:
    return str(flat.get("PhotometricInterpretation", "")).startswith("MONOCHROME") or (
        int(flat.get("SamplesPerPixel", 1)) == 1 and not _is_palette(flat)
    )


def _is_palette(flat: Dataset) -> bool:
    return bool(flat.get("PhotometricInterpretation") == "PALETTE COLOR")


def _colour(
    flat: Dataset, pixels: NDArray[np.generic]
) -> tuple[NDArray[np.float32], tuple[float, float]]:
    if _is_palette(flat):
        pixels = apply_color_lut(pixels, flat)
        top = 2.0 ** (8 * pixels.dtype.itemsize) - 1
    else:
        top = 2.0 ** int(flat.get("BitsStored", 8)) - 1
    return np.moveaxis(pixels[..., :3], -1, 0).astype(np.float32), (0.0, top)


def _grey(
    flat: Dataset, pixels: NDArray[np.generic]
) -> tuple[NDArray[np.float32], tuple[float, float] | None, Lookup | None]:
    values = np.asarray(apply_modality_lut(pixels, flat), np.float64)
    window, lookup = _shown(flat)
    if flat.get("PhotometricInterpretation") == "MONOCHROME1":
        # The stored range turned over: what the modality LUT makes of its two ends, summed.
        ends = float(np.sum(apply_modality_lut(_stored_range(flat, pixels), flat), dtype=float))
        values = ends - values
        window = (ends - window[1], ends - window[0]) if window else None
        lookup = voi.turned(lookup, ends)
    outside = padding(flat, pixels)
    if outside.any() and not outside.all():
        values[outside] = values[~outside].min()
    return values[None].astype(np.float32), window, lookup


def _shown(flat: Dataset) -> tuple[tuple[float, float] | None, Lookup | None]:
    """Window and table that the file proposes for display."""
    # What is measured in a unit (becquerel, SUV) must not be cut off at what one reader looked at.
    if flat.get("Modality") in _MEASURED:
        return None, None
    return voi.window(flat), voi.lookup(flat)


def _stored_range(flat: Dataset, pixels: NDArray[np.generic]) -> NDArray[np.generic]:
    if not np.issubdtype(pixels.dtype, np.integer):
        return np.array([pixels.min(), pixels.max()])
    bits = int(flat.get("BitsStored", 16))
    low = -(2 ** (bits - 1)) if flat.get("PixelRepresentation", 0) else 0
    return np.array([low, low + 2**bits - 1]).astype(pixels.dtype)


def _spacing(flat: Dataset) -> tuple[float, float]:
    for name in _SPACINGS:
        pair = _vector(flat, name, (2,))
        if pair is not None and (pair > 0).all():
            return float(pair[0]), float(pair[1])
    return 1.0, 1.0


def _vector(flat: Dataset, name: str, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    values = flat.get(name)
    if values is None or len(values) != int(np.prod(shape)):
        return None
    vector = np.array([float(v) for v in values]).reshape(shape)
    return vector if np.isfinite(vector).all() else None
