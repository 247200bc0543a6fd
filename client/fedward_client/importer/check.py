"""What an object must be before it leaves the quarantine."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

import pydicom
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from fedward.errors import DataError
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.sniff import Watched, check_inflated, is_dicom

# What the dataset's readers decode, and therefore all that is asked for.
COMPRESSED: Final = (
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEG2000Lossless,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    HTJ2K,
    RLELossless,
)
SYNTAXES: Final = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    *COMPRESSED,
]
NOT_DICOM, CUT, SYNTAX = "not DICOM", "cut short", "transfer syntax that is not read here"
UNASKED, PATIENT, OTHER = "not asked for", "of another patient", "not what the PACS said it is"
CONFLICT, LARGE = "same UID, other bytes", "too large"
# A broken connection may have caused these; another try may be better.
PASSING: Final = frozenset({NOT_DICOM, CUT})
_TAGS: Final = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "PatientID",
    "Modality",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "BitsAllocated",
    "PhotometricInterpretation",
]
_ITEM, _ITEM_END, _END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS: Final = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_UNKNOWN: Final = 0xFFFFFFFF
_LONG: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # VRs
_DEEP: Final = 32
_ELEMENTS: Final = 2_000_000  # of one object; a few seconds
_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class Expected:
    """What the PACS said of an object when it was asked.

    Attributes
    ----------
    study, series : str
        UIDs.
    patient : str
        PatientID.
    modality : str
        Of the series.
    """

    study: str
    series: str
    patient: str
    modality: str


def examine(path: Path, wanted: Mapping[str, Expected]) -> tuple[str, str]:
    """Look at an object that was received.

    Parameters
    ----------
    path : Path
        The file.
    wanted : mapping
        SOPInstanceUIDs that were asked for.

    Returns
    -------
    tuple of str
        Its SOPInstanceUID ("" where it has none), and why it is not taken ("" if it is).
    """
    with quiet():
        try:
            return _examine(path, wanted)
        except DataError:
            return "", LARGE
        except Exception:  # pydicom raises nearly anything on a broken file
            return "", NOT_DICOM


def _examine(path: Path, wanted: Mapping[str, Expected]) -> tuple[str, str]:
    if not is_dicom(path):
        return "", NOT_DICOM
    check_inflated(path)
    with path.open("rb") as file:
        tags = pydicom.dcmread(
            cast(BinaryIO, Watched(file, path)),
            defer_size=1 << 16,
            stop_before_pixels=True,
            specific_tags=list(_TAGS),
        )
    uid = str(tags.get("SOPInstanceUID") or "")
    syntax = tags.file_meta.get("TransferSyntaxUID")
    if syntax not in SYNTAXES:
        return uid, SYNTAX
    named = "StudyInstanceUID" in tags and "SeriesInstanceUID" in tags
    if not uid or not named or not _is_whole(path, tags, syntax):
        return uid, CUT
    expected = wanted.get(uid)
    if expected is None:
        return uid, UNASKED
    if _plain(tags, "PatientID") != expected.patient:
        return uid, PATIENT
    said = tuple(_plain(tags, n) for n in ("StudyInstanceUID", "SeriesInstanceUID", "Modality"))
    if said != (expected.study, expected.series, expected.modality):
        return uid, OTHER
    return uid, ""


def _plain(tags: pydicom.Dataset, name: str) -> str:
    return str(tags.get(name) or "").strip()


def _is_whole(path: Path, tags: pydicom.FileDataset, syntax: UID) -> bool:
    """Whether every element ends within the file, and an image has its pixels."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(132)
        # The group's length is its first element (PS3.10, 7.1).
        meta = file.read(12)
        if meta[:8] != b"\x02\x00\x00\x00UL\x04\x00":
            return False
        file.seek(144 + int.from_bytes(meta[8:], "little"))
        if syntax == DeflatedExplicitVRLittleEndian:
            return _inflates(file)
        walk = _Walk(file, size, syntax)
        if not walk.elements(size, 0):
            return False
    if not tags.get("Rows"):
        return True
    return walk.pixels is not None and walk.pixels >= _least(tags, syntax)


def _least(tags: pydicom.FileDataset, syntax: UID) -> int:
    if syntax in COMPRESSED:
        return 0
    names = ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "BitsAllocated")
    bits = 1
    for name in names:
        bits *= int(tags.get(name) or 1)
    # Two pixels share their colours (PS3.3, C.7.6.3.1.2): four samples instead of six.
    halved = tags.get("PhotometricInterpretation") == "YBR_FULL_422"
    return bits // 8 * 2 // 3 if halved else bits // 8


def _inflates(file: BinaryIO) -> bool:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    while not inflate.eof and (data := file.read(_CHUNK)):
        while data and not inflate.eof:
            inflate.decompress(data, _CHUNK)
            data = inflate.unconsumed_tail
    return inflate.eof


class _Walk:
    """Steps from element to element (PS3.5, 7.1) without reading a value."""

    def __init__(self, file: BinaryIO, size: int, syntax: UID) -> None:
        self._file, self._size, self._implicit = file, size, syntax.is_implicit_VR
        self._little, self._unknown, self._left = syntax.is_little_endian, False, _ELEMENTS
        self.pixels: int | None = None

    def elements(self, end: int | None, deep: int) -> bool:
        """To a place, or past the end of an item without a length; False for a broken one."""
        while end is None or self._file.tell() < end:
            found = self._next()
            if found is None:
                return False
            tag, length = found
            if tag == _ITEM_END and end is None:
                return True
            if not self._value(tag, length, deep):
                return False
        return self._file.tell() == end

    def _value(self, tag: int, length: int, deep: int) -> bool:
        start = self._file.tell()
        if length != _UNKNOWN:
            if start + length > self._size:
                return False
            self._file.seek(length, 1)
        elif deep >= _DEEP or not self._inside(deep + 1):
            return False
        if tag in _PIXELS and not deep:
            self.pixels = self._file.tell() - start
        return True

    def _inside(self, deep: int) -> bool:
        # A sequence that somebody did not know has implicit VRs inside (PS3.5, 6.2.2).
        outside, self._implicit = self._implicit, self._implicit or self._unknown
        whole = self._items(deep)
        self._implicit = outside
        return whole

    def _items(self, deep: int) -> bool:
        """Past the items, or the fragments, of a value without a length."""
        while (found := self._next()) is not None:
            tag, length = found
            if tag == _END:
                return True
            if tag != _ITEM:
                return False
            if length == _UNKNOWN:
                if not self.elements(None, deep):
                    return False
            elif self._file.tell() + length > self._size:
                return False
            else:
                self._file.seek(length, 1)
        return False

    def _next(self) -> tuple[int, int] | None:
        head = self._file.read(8)
        self._left -= 1
        if len(head) < 8 or self._left < 0:
            return None
        tag = self._number(head[:2]) << 16 | self._number(head[2:4])
        if self._implicit or tag >> 16 == 0xFFFE:
            return tag, self._number(head[4:])
        self._unknown = head[4:6] == b"UN"
        if head[4:6] not in _LONG:
            return tag, self._number(head[6:])
        more = self._file.read(4)
        return (tag, self._number(more)) if len(more) == 4 else None

    def _number(self, data: bytes) -> int:
        return int.from_bytes(data, "little" if self._little else "big")
