"""DICOM pixels in modality units: HU for CT; greyscale with bright high; colour as RGB.

PS3.3 sections: pixel module C.7.6.3, modality LUT C.11.1, VOI LUT C.11.2, functional groups
C.7.6.16. Only one frame is decoded at a time.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import as_pixel_options, pixel_array
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from fedward import rule_codes
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.sniff import (
    Watched,
    check_inflated,
    check_items,
    is_deflated,
)
from fedward_client.data.sample import Image, Lookup

# Where a DICOM file says that there is no image (PS3.3, C.7.5.1.1.2).

_HALF: Final = 1 << 15  # of the numbers of US; those from here on are negative in SS


def padding(flat: Dataset, pixels: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Which of a frame's stored values are no image."""
    value = flat.get("PixelPaddingValue")
    if not isinstance(value, int):
        return np.zeros(pixels.shape, bool)
    limit = flat.get("PixelPaddingRangeLimit")
    ends = (value, limit if isinstance(limit, int) else value)
    low, high = sorted(_as_stored(flat, end) for end in ends)
    stored: NDArray[Any] = pixels
    return np.asarray((stored >= low) & (stored <= high))


def _as_stored(flat: Dataset, value: int) -> int:
    """A value of the sign of the pixels, in whichever VR (US or SS) it was written."""
    signed = bool(flat.get("PixelRepresentation", 0))
    if signed and value >= _HALF:
        return value - 2 * _HALF
    return value + 2 * _HALF if value < 0 and not signed else value


# How a DICOM file proposes to show its values: VOI window and VOI LUT (PS3.3, C.11.2).

_BITS: Final = (8, *range(10, 17))  # of an entry (C.11.2.1.1)
_ALL: Final = 1 << 16  # what 0 entries stand for


def window(flat: Dataset) -> tuple[float, float] | None:
    """Lowest and highest value of the first VOI window (C.11.2.1.2), or of the first VOI LUT."""
    centre, width = _first(flat.get("WindowCenter")), _first(flat.get("WindowWidth"))
    if centre is not None and width is not None:
        if str(flat.get("VOILUTFunction") or "LINEAR").upper() == "LINEAR":
            centre, width = centre - 0.5, width - 1
        return (centre - width / 2, centre + width / 2) if width > 0 else None
    for item in (flat.get("VOILUTSequence") or [])[:1]:
        entries, low, _ = (int(v) for v in item.LUTDescriptor)
        return float(low), float(low + (entries or _ALL) - 1)
    return None


def _first(value: object) -> float | None:
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if len(value) else None
    if value is None or value == "":
        return None
    number = float(str(value))
    return number if np.isfinite(number) else None


def lookup(flat: Dataset) -> Lookup | None:
    """The first VOI LUT (C.11.2.1.1), its entries scaled to 0 and 1; None where there is none.

    Raises
    ------
    DataError
        "not readable": the table is shorter than it says, or of an unknown depth.
    """
    items = flat.get("VOILUTSequence") or []
    if not items:
        return None
    entries, first, bits = (int(v) for v in items[0].LUTDescriptor)
    data = items[0]["LUTData"]
    if bits not in _BITS:
        raise rule_codes.unusable(rule_codes.NOT_READABLE)
    if isinstance(data.value, bytes):  # OW, against US
        table = np.frombuffer(data.value, "<u2" if _is_little(flat) else ">u2")
    else:
        table = np.atleast_1d(np.asarray(data.value, np.int64))
    count = entries or _ALL
    if len(table) < count:
        raise rule_codes.unusable(rule_codes.NOT_READABLE)
    top = 2.0**bits - 1
    return Lookup(float(first), np.clip(table[:count] / top, 0, 1).astype(np.float32))


def _is_little(flat: Dataset) -> bool:
    return flat.original_encoding[1] is not False


def turned(table: Lookup | None, ends: float) -> Lookup | None:
    """The same for values that were turned over (`ends` minus the value), bright being high."""
    if table is None:
        return None
    return replace(table, first=ends - table.first, table=1 - table.table, backwards=True)


# The header and the stored pixel values of a DICOM file, each read once.

_PIXELS: Final = {
    (0x7FE0, 0x0008): "FloatPixelData",
    (0x7FE0, 0x0009): "DoubleFloatPixelData",
    (0x7FE0, 0x0010): "PixelData",
}


@dataclass(frozen=True)
class Opened:
    """A file whose header was read.

    Attributes
    ----------
    path : Path
        The file.
    header : Dataset
        All before the pixels.
    place : int
        Where the element of the pixels begins, bytes; meaningless in a deflated file.
    """

    path: Path
    header: Dataset
    place: int


def open_dicom(path: Path) -> Opened:
    """Read the header; that of the last few files is kept.

    Raises
    ------
    DataError
        "too large", when the header would fill the memory.
    Exception
        Whatever pydicom raises on a broken header.
    """
    return _open(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _open(path: Path, changed: int) -> Opened:
    # The header of a multi-frame file is long, and every frame asks for it again.
    check_inflated(path)
    with path.open("rb") as file:
        header = pydicom.dcmread(
            cast(BinaryIO, Watched(file, path)), stop_before_pixels=True, force=True
        )
        place = file.tell()
    if not is_deflated(header):
        check_items(path, place)  # those of known length are parsed only when they are asked for
    return Opened(path, header, place)


def stored_values(opened: Opened, frame: int) -> NDArray[np.generic]:
    """One frame's stored values ``(H, W)`` or ``(H, W, 3)``, colour as RGB.

    Raises
    ------
    Exception
        Whatever decoders raise.
    """
    header, syntax = opened.header, _syntax(opened.header)
    if is_deflated(header):
        # pydicom looks for the pixels where they would lie, were nothing deflated.
        return _of_whole(opened.path, frame)
    single = header.get("BitsAllocated") == 1 and not syntax.is_compressed
    if single and not (syntax.is_little_endian and header.get("SamplesPerPixel", 1) == 1):
        return _of_whole(opened.path, frame)
    with opened.path.open("rb") as file:
        file.seek(opened.place)
        return (_bits if single else _decoded)(header, syntax, file, frame)


def _of_whole(path: Path, frame: int) -> NDArray[np.generic]:
    whole = pydicom.dcmread(path, force=True)
    check_length(whole)
    return np.asarray(pixel_array(whole, index=frame, **_old_syntax(whole)))


def _bits(header: Dataset, syntax: UID, file: BinaryIO, frame: int) -> NDArray[np.generic]:
    """A frame of one bit a pixel (PS3.5, 8.1.1); it may begin within a byte.

    pydicom fails on such frames, and of pixels that are cut off it makes the rest from memory as
    it finds it.
    """
    length = _element(file, syntax)[1]
    rows, columns = int(header.Rows), int(header.Columns)
    frames, pixels = int(header.get("NumberOfFrames") or 1), rows * columns
    if frame >= frames or 8 * length < frames * pixels:
        raise rule_codes.unusable(rule_codes.NOT_READABLE)
    start, skip = divmod(frame * pixels, 8)
    file.seek(start, os.SEEK_CUR)
    raw = np.frombuffer(file.read(-(-(skip + pixels) // 8)), np.uint8)
    bits = np.unpackbits(raw, bitorder="little")[skip : skip + pixels]
    return bits.reshape(rows, columns)


def _decoded(header: Dataset, syntax: UID, file: BinaryIO, frame: int) -> NDArray[np.generic]:
    """What ``pydicom.pixels.pixel_array`` does, without reading the header another time."""
    options: dict[str, Any] = as_pixel_options(header, transfer_syntax_uid=syntax)
    options |= _element(file, syntax)[0]
    decoded = get_decoder(syntax).as_array(file, index=frame, validate=True, **options)
    return np.asarray(decoded[0])


def _element(file: BinaryIO, syntax: UID) -> tuple[dict[str, str], int]:
    """Read tag, VR and length of the pixels' element (PS3.5, 7.1): which it is, and its length."""
    order = "<" if syntax.is_little_endian else ">"
    start = file.read(8 if syntax.is_implicit_VR else 12)
    if len(start) < (8 if syntax.is_implicit_VR else 12):
        raise rule_codes.unusable(rule_codes.NO_PIXELS)
    name = _PIXELS.get(struct.unpack(f"{order}HH", start[:4]))
    if name is None:
        raise rule_codes.unusable(rule_codes.NO_PIXELS)
    length = int(struct.unpack(f"{order}L", start[-4:])[0])
    if syntax.is_implicit_VR:
        return {"pixel_keyword": name}, length
    return {"pixel_keyword": name, "pixel_vr": start[4:6].decode("ascii")}, length


def _syntax(header: Dataset) -> UID:
    """The transfer syntax; of an old file without a file meta group, how it was parsed."""
    meta = getattr(header, "file_meta", Dataset())
    if (syntax := meta.get("TransferSyntaxUID")) is not None:
        return UID(syntax)
    return ImplicitVRLittleEndian if header.original_encoding[0] else ExplicitVRLittleEndian


def _old_syntax(header: Dataset) -> dict[str, Any]:
    if "TransferSyntaxUID" in getattr(header, "file_meta", ()):
        return {}
    return {"transfer_syntax_uid": _syntax(header)}


def check_length(whole: Dataset) -> None:
    """Refuse uncompressed pixels that are shorter than the header says.

    Raises
    ------
    DataError
        "not readable".
    """
    syntax = getattr(whole, "file_meta", Dataset()).get("TransferSyntaxUID")
    if syntax is not None and syntax.is_compressed and not is_deflated(whole):
        return
    bits = int(whole.Rows) * int(whole.Columns) * int(whole.get("SamplesPerPixel") or 1)
    bits *= int(whole.get("NumberOfFrames") or 1) * int(whole.BitsAllocated)
    if len(whole.get("PixelData") or b"") < -(-bits // 8):
        raise rule_codes.unusable(rule_codes.NOT_READABLE)


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
                raise rule_codes.unusable(rule_codes.NO_PIXELS)
            if frame_bytes(header) > _LARGEST:
                raise rule_codes.unusable(rule_codes.TOO_LARGE)
            return decode(header, stored_values(opened, frame), frame)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # Decoders raise nearly anything, a Rust one its panics, which are no Exception; and
            # their texts quote the file.
            missing = isinstance(error, AttributeError) and "no pixel data" in str(error).lower()
            reason = rule_codes.NO_PIXELS if missing else rule_codes.reason_of(error)
            raise rule_codes.unusable(reason) from None


def frame_values(header: Dataset) -> int:
    """Values of one frame, by what the file declares of itself."""
    sides = int(header.get("Rows") or 0) * int(header.get("Columns") or 0)
    return sides * int(header.get("SamplesPerPixel") or 1)


def frame_bytes(header: Dataset) -> int:
    """Bytes that one decoded frame takes: values are worked on as 8 bytes each."""
    return 8 * frame_values(header)


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
                raise rule_codes.unusable(rule_codes.NO_PIXELS)
            return place_of(header, frame)
        except Exception as error:
            raise rule_codes.unusable(rule_codes.reason_of(error)) from None


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
        raise rule_codes.unusable(rule_codes.NOT_READABLE)  # samples and photometric disagree
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
        lookup = turned(lookup, ends)
    outside = padding(flat, pixels)
    if outside.any() and not outside.all():
        values[outside] = values[~outside].min()
    return values[None].astype(np.float32), window, lookup


def _shown(flat: Dataset) -> tuple[tuple[float, float] | None, Lookup | None]:
    """Window and table that the file proposes for display."""
    # What is measured in a unit (becquerel, SUV) must not be cut off at what one reader looked at.
    if flat.get("Modality") in _MEASURED:
        return None, None
    return window(flat), lookup(flat)


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
