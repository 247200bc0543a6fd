"""The header and the stored pixel values of a DICOM file, each read once."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import as_pixel_options, pixel_array
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from client.data import reasons
from client.data.readers.dicom_files import Watched, check_inflated, check_items, is_deflated

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
        raise reasons.unusable(reasons.NOT_READABLE)
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
        raise reasons.unusable(reasons.NO_PIXELS)
    name = _PIXELS.get(struct.unpack(f"{order}HH", start[:4]))
    if name is None:
        raise reasons.unusable(reasons.NO_PIXELS)
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
        raise reasons.unusable(reasons.NOT_READABLE)
