"""JPEG and JPEG 2000 code streams as scanners write them: colour, and faults that can be mended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import UID, JPEG2000TransferSyntaxes, JPEGBaseline8Bit, JPEGExtended12Bit

# Retired processes (PS3.5, 10.2 of 1998): spectral selection and full progression. Their streams
# say so themselves, and decoders of the extended process take them.
RETIRED: Final = {
    UID(f"1.2.840.10008.1.2.4.{number}"): JPEGExtended12Bit for number in (52, 53, 54, 55)
}
LOSSY: Final = frozenset({JPEGBaseline8Bit, JPEGExtended12Bit, *RETIRED})
WAVELETS: Final = frozenset(JPEG2000TransferSyntaxes)

_START: Final = b"\xff\xd8"
_WAVELET: Final = b"\xff\x4f"
_SEQUENTIAL: Final = (0xC0, 0xC1)  # SOF0 and SOF1
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN: Final = 0xDA
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
_CODING: Final = 0x52  # COD
_TILE: Final = 0x90  # SOT
_BOUNDS: Final = (-12.0, 267.0)  # of a channel after lossy coding
_WITHIN: Final = 0.99  # of the pixels of a picture lie within its colour space


@dataclass(frozen=True)
class Jpeg:
    """What the header of a JPEG stream says (ISO 10918-1, B.2).

    Attributes
    ----------
    process : int
        The marker of its frame header; -1 when there is none.
    marked : bool
        Whether a JFIF or Adobe marker tells the colour space.
    components : bytes
        The components' identifiers.
    subsampled : bool
        Whether some components have fewer pixels than others.
    scan : int
        Where the first scan's spectral selection stands; -1 when there is none.
    """

    process: int = -1
    marked: bool = False
    components: bytes = b""
    subsampled: bool = False
    scan: int = -1


def read_jpeg(stream: bytes) -> Jpeg:
    """The header of a stream, as far as it can be read."""
    process, marked, components, sides = -1, False, b"", b""
    place = len(_START) if stream.startswith(_START) else len(stream)
    while place + 4 <= len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xFF or marker in _ALONE:  # filled up, or nothing follows
            place += 1 if marker == 0xFF else 2
            continue
        body = stream[place + 4 : place + 2 + int.from_bytes(stream[place + 2 : place + 4])]
        if marker == _SCAN:
            end = place + 4 + len(body) - 3
            return Jpeg(process, marked, components, len(set(sides)) > 1, end)
        if marker in _FRAMES and len(body) > 5:
            process, components, sides = marker, body[6::3], body[7::3]
        marked |= (marker, body[:5]) in ((0xE0, b"JFIF\0"), (0xEE, b"Adobe"))
        place += 4 + len(body)
    return Jpeg(process, marked, components, len(set(sides)) > 1)


def mended(stream: bytes) -> bytes:
    """A stream whose sequential scan says that it has all coefficients, as it must have.

    Some writers of 12-bit JPEG leave the end of the spectral selection at 0.
    """
    found = read_jpeg(stream)
    if found.process not in _SEQUENTIAL or found.scan < 0:
        return stream
    return stream[: found.scan] + b"\x00\x3f\x00" + stream[found.scan + 3 :]


def is_doubtful(stream: bytes, said: str) -> bool:
    """Whether a colour stream may hold another colour space than the file says (C.7.6.3.1.2).

    A JPEG stream without a marker is YCbCr by custom, where a file may say RGB; one of JPEG 2000
    that turns no colours is RGB, where a file may say YBR.
    """
    if stream.startswith(_WAVELET):
        return said.startswith("YBR_FULL") and not _is_transformed(stream)
    found = read_jpeg(stream)
    numbered = found.components in (b"\x01\x02\x03", b"\x00\x01\x02")
    return said == "RGB" and not found.marked and numbered


def as_rgb(pixels: NDArray[np.generic], stream: bytes) -> NDArray[np.generic]:
    """Decoded colour ``(H, W, 3)`` that may be RGB or YCbCr, as RGB.

    Components with fewer pixels are chroma; else the values decide: of a picture in RGB, hardly a
    pixel lies within YCbCr, since black, white and grey do not.
    """
    turned = convert_color_space(np.asarray(pixels, np.uint8), "YBR_FULL", "RGB")
    if read_jpeg(stream).subsampled:
        return turned
    y, cb, cr = (np.asarray(pixels[..., k], np.float32) - 128 * (k > 0) for k in range(3))
    channels = (y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb)
    inside = np.all([(one > _BOUNDS[0]) & (one < _BOUNDS[1]) for one in channels], axis=0)
    return turned if inside.mean() >= _WITHIN else pixels


def _is_transformed(stream: bytes) -> bool:
    """Whether a JPEG 2000 stream turns colours to RGB itself (ISO 15444-1, A.6.1)."""
    place = len(_START)
    while place <= len(stream) - 10 and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == _CODING:
            return stream[place + 8] == 1
        if marker == _TILE:
            return False
        place += 2 + int.from_bytes(stream[place + 2 : place + 4])
    return False
