"""DICOM pixels in modality units: HU for CT; greyscale with bright high; colour as RGB.

PS3.3 sections: pixel module C.7.6.3, modality LUT C.11.1, VOI LUT C.11.2, functional groups
C.7.6.16. Only one frame is decoded at a time.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame, parse_basic_offsets, parse_fragments
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import as_pixel_options, pixel_array
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from fedward import rule_codes
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.codestreams import (
    LOSSY,
    RETIRED,
    WAVELETS,
    as_rgb,
    is_doubtful,
    mended,
)
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


# Palettes (C.7.6.3.1.5, C.7.6.3.1.6).

_COLOURS: Final = ("Red", "Green", "Blue")


def palette(flat: Dataset, pixels: NDArray[np.generic]) -> tuple[NDArray[np.generic], float]:
    """Stored values ``(H, W)`` as colour ``(H, W, 3)``, and what white is.

    pydicom takes tables of the machine's byte order, and at most 256 entries of 8 bits.

    Raises
    ------
    DataError
        "not readable": a table is shorter than it says.
    """
    names = [f"{colour}PaletteColorLookupTable" for colour in _COLOURS]
    if f"{names[0]}Data" not in flat:  # in segments
        colours = apply_color_lut(pixels, flat)
        return colours, 2.0 ** (8 * colours.dtype.itemsize) - 1
    first = int(flat[f"{names[0]}Descriptor"].value[1])
    if flat.get("PixelRepresentation", 0) and first >= _HALF:
        first -= 2 * _HALF
    tables = [_entries(flat, name) for name in names]
    deep = [bits > 8 and table.max(initial=0) > _BYTE for table, bits in tables]
    wide = any(deep)
    least = min(len(table) for table, _ in tables)
    places = np.clip(pixels.astype(np.int64) - first, 0, least - 1)
    colours = np.stack([table[places] for table, _ in tables], axis=-1)
    return colours, 2.0 ** (16 if wide else 8) - 1


_BYTE: Final = 255


def _entries(flat: Dataset, name: str) -> tuple[NDArray[np.uint16], int]:
    """A table's entries, and the bits of each: tables of 8 bits come in bytes and in words."""
    count, _, bits = (int(v) for v in flat[f"{name}Descriptor"].value)
    count = count % _ALL or _ALL
    raw, order = bytes(flat[f"{name}Data"].value), "<" if _is_little(flat) else ">"
    if len(raw) >= 2 * count:
        words = np.frombuffer(raw, f"{order}u2", count).astype(np.uint16)
        if bits == 8 and words.max() > _BYTE:
            return (words >> 8).astype(np.uint16), 8
        return words, bits
    if len(raw) < count:
        raise rule_codes.unusable(rule_codes.NOT_READABLE)
    raw += b"\0" * (len(raw) % 2)
    packed = flat[f"{name}Data"].VR == "OW" and order == ">"  # two entries in a word, the first low
    octets = np.frombuffer(raw, ">u2" if packed else "<u2").astype("<u2").view(np.uint8)
    return octets[:count].astype(np.uint16), 8


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
    known = RETIRED.get(syntax, syntax)
    options: dict[str, Any] = as_pixel_options(header, transfer_syntax_uid=known)
    options |= _element(file, syntax)[0]
    if syntax.is_compressed and (table := _table(file, options["number_of_frames"])):
        options.setdefault("extended_offsets", table)
    shifted = _shifted(header)
    if shifted:  # all bits, as pydicom would cut off the upper ones
        options |= {"bits_stored": options["bits_allocated"], "pixel_representation": 0}
    stream = b""
    if syntax in LOSSY or (syntax in WAVELETS and options["samples_per_pixel"] > 1):
        stream = _stream(file, options, frame)
        better = mended(stream) if syntax in LOSSY else stream
        if better != stream or known != syntax:
            file, frame = BytesIO(encapsulate([better], has_bot=False)), 0
            options = {k: v for k, v in options.items() if k != "extended_offsets"}
            options["number_of_frames"] = 1
    colours = str(options["photometric_interpretation"])
    if syntax in WAVELETS and stream:  # its decoder gives RGB, whatever the file says
        options["photometric_interpretation"] = "RGB"
    decoder = get_decoder(known)
    pixels = np.asarray(decoder.as_array(file, index=frame, validate=True, **options)[0])
    if stream and pixels.dtype == np.uint8 and is_doubtful(stream, colours):
        return as_rgb(pixels, stream)
    return _within(header, pixels, shifted)


def _table(file: BinaryIO, frames: int) -> tuple[list[int], list[int]] | None:
    """Where the streams of a file's frames lie and how long they are, if each is one fragment."""
    path = Path(file.name)
    return _fragments(path, path.stat().st_mtime_ns, file.tell(), frames) if frames > 1 else None


@lru_cache(maxsize=4)
def _fragments(
    path: Path, changed: int, start: int, frames: int
) -> tuple[list[int], list[int]] | None:
    # Without it each frame is looked for from the first one on; there may be 100,000 of them.
    with path.open("rb") as file, suppress(ValueError, EOFError, struct.error):
        file.seek(start)
        parse_basic_offsets(file)
        count, places = parse_fragments(file)
        if count == frames:
            lengths = []
            for place in places:
                file.seek(place + 4)
                lengths.append(int.from_bytes(file.read(4), "little"))
            return [place - places[0] for place in places], lengths
    return None


def _stream(file: BinaryIO, options: dict[str, Any], frame: int) -> bytes:
    """The code stream of one frame; the file stays where it is."""
    return get_frame(
        file,
        frame,
        number_of_frames=options["number_of_frames"],
        extended_offsets=options.get("extended_offsets"),
    )


def _shifted(header: Dataset) -> int:
    """Bits below the values, where they do not begin with the lowest (legal until PS3.5-2014)."""
    allocated, stored = int(header.BitsAllocated), int(header.get("BitsStored") or 0)
    high = int(header.get("HighBit") or 0)
    return high + 1 - stored if 0 < stored <= high < allocated else 0


def _within(header: Dataset, pixels: NDArray[Any], shifted: int) -> NDArray[np.generic]:
    """Values of the bits that are stored, without what lies above them (overlays) or below."""
    stored = int(header.get("BitsStored") or 0)
    spare = 8 * pixels.dtype.itemsize - stored
    if pixels.dtype.kind not in "iu" or stored <= 0 or spare <= 0:
        return pixels
    if shifted and not (pixels & ((1 << shifted) - 1)).any():  # else the header is wrong
        pixels = pixels >> shifted
    signed = bool(header.get("PixelRepresentation", 0))
    low, high = (-(1 << stored - 1), (1 << stored - 1) - 1) if signed else (0, (1 << stored) - 1)
    if low <= pixels.min() and pixels.max() <= high:
        return pixels
    kind = np.dtype(f"{'i' if signed else 'u'}{pixels.dtype.itemsize}")
    return np.asarray((pixels.view(kind) << spare) >> spare)


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
    padded : NDArray or None
        ``(H, W)``, where there is no image, and its darkest value stands; None: nowhere.
    """

    image: Image
    position: NDArray[np.float64] | None
    orientation: NDArray[np.float64] | None
    padded: NDArray[np.bool_] | None = None


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
        _spacing(flat)[0],
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
    outside: NDArray[np.bool_] | None = None
    if pixels.ndim != (2 if _is_grey(flat) or _is_palette(flat) else 3):
        raise rule_codes.unusable(rule_codes.NOT_READABLE)  # samples and photometric disagree
    if _is_grey(flat):
        values, window, lookup = _grey(flat, pixels)
        outside = padding(flat, pixels)
        if outside.any() and not outside.all():
            values[0, outside] = values[0, ~outside].min()
    else:
        values, window = _colour(flat, pixels)
    values = np.ascontiguousarray(values, np.float32)
    spacing, measured = _spacing(flat)
    region = _region(flat, values.shape[1:])
    return Frame(
        Image(values, spacing, window, lookup=lookup, measured=measured, region=region),
        _vector(flat, "ImagePositionPatient", (3,)),
        _vector(flat, "ImageOrientationPatient", (2, 3)),
        outside if outside is not None and outside.any() else None,
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
        pixels, top = palette(flat, pixels)
    else:
        top = 2.0 ** int(flat.get("BitsStored", 8)) - 1
    return np.moveaxis(pixels[..., :3], -1, 0).astype(np.float32), (0.0, top)


def _grey(
    flat: Dataset, pixels: NDArray[np.generic]
) -> tuple[NDArray[np.float32], tuple[float, float] | None, Lookup | None]:
    values = _in_unit(flat, pixels)
    window, lookup = _shown(flat)
    if flat.get("PhotometricInterpretation") == "MONOCHROME1":
        # The stored range turned over: what the modality LUT makes of its two ends, summed.
        ends = float(np.sum(_in_unit(flat, _stored_range(flat, pixels))))
        values = ends - values
        window = (ends - window[1], ends - window[0]) if window else None
        lookup = turned(lookup, ends)
    return values[None].astype(np.float32), window, lookup


def _in_unit(flat: Dataset, stored: NDArray[np.generic]) -> NDArray[np.float64]:
    """Stored values as the modality means them (C.11.1); what is empty, or 0, says nothing."""
    if flat.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, flat), np.float64)
    slope, intercept = _first(flat.get("RescaleSlope")), _first(flat.get("RescaleIntercept"))
    values = stored.astype(np.float64)
    return values if slope in (None, 0.0) or intercept is None else values * slope + intercept


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


def _spacing(flat: Dataset) -> tuple[tuple[float, float], bool]:
    """mm between rows and between columns, and whether the file states them."""
    for name in _SPACINGS:
        pair = _vector(flat, name, (2,))
        if pair is not None and (pair > 0).all():
            if name == "ImagerPixelSpacing":  # at the detector; the patient is nearer to the tube
                pair = pair / _magnification(flat)
            return (float(pair[0]), float(pair[1])), True
    steps = {_steps(item) for item in _regions(flat)}
    if len(steps) == 1 and (only := steps.pop()) is not None:
        return only, True
    ratio = _vector(flat, "PixelAspectRatio", (2,))
    if ratio is not None and (ratio > 0).all():
        return (float(ratio[0] / ratio[1]), 1.0), False
    return (1.0, 1.0), False


def _magnification(flat: Dataset) -> float:
    factor = _first(flat.get("EstimatedRadiographicMagnificationFactor"))
    return factor if factor is not None and 1 <= factor <= _LARGEST_FACTOR else 1.0


# Ultrasound regions (C.8.5.5): where in the frame the picture of the patient is.

_LARGEST_FACTOR: Final = 10.0
_FLAT_REGION: Final = 1  # RegionSpatialFormat: a 2D picture, not a trace or text
_CENTIMETRES: Final = 3  # PhysicalUnitsXDirection
_SMALLEST: Final = 8  # pixels of a side that is a picture


def _regions(flat: Dataset) -> list[Dataset]:
    """The regions that are pictures, or all where none is."""
    items = list(flat.get("SequenceOfUltrasoundRegions") or [])
    pictures = [item for item in items if item.get("RegionSpatialFormat") == _FLAT_REGION]
    return pictures or items


def _steps(region: Dataset) -> tuple[float, float] | None:
    """mm between rows and columns of a region that is measured in length."""
    pair = []
    for axis in "YX":
        step = _first(region.get(f"PhysicalDelta{axis}"))
        if region.get(f"PhysicalUnits{axis}Direction") != _CENTIMETRES or not step:
            return None
        pair.append(round(10 * abs(step), 9))
    return pair[0], pair[1]


def _region(flat: Dataset, shape: tuple[int, ...]) -> tuple[slice, slice] | None:
    """The smallest box around all regions that are pictures; None for the whole frame."""
    boxes = []
    for item in _regions(flat):
        names = ("MinY0", "MaxY1", "MinX0", "MaxX1")
        ends = [_first(item.get(f"RegionLocation{name}")) for name in names]
        if None in ends:
            return None
        boxes.append([int(end) for end in ends if end is not None])
    if not boxes:
        return None
    top, bottom, left, right = np.array(boxes).T
    rows = slice(max(0, int(top.min())), min(shape[0], int(bottom.max()) + 1))
    columns = slice(max(0, int(left.min())), min(shape[1], int(right.max()) + 1))
    if min(rows.stop - rows.start, columns.stop - columns.start) < _SMALLEST:
        return None
    whole = (slice(0, shape[0]), slice(0, shape[1]))
    return None if (rows, columns) == whole else (rows, columns)


def _vector(flat: Dataset, name: str, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    values = flat.get(name)
    if values is None or len(values) != int(np.prod(shape)):
        return None
    vector = np.array([float(v) for v in values]).reshape(shape)
    return vector if np.isfinite(vector).all() else None
