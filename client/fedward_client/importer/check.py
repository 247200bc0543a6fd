"""What an object must be before it leaves the quarantine."""

from __future__ import annotations

import io
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
    EnhancedUSVolumeStorage,
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
    ParametricMapStorage,
    RLELossless,
)

from fedward.errors import DataError
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.sniff import SEGMENTATIONS, Watched, check_inflated, is_dicom

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
# Images by their name: those that have none of "Image" in it.
_IMAGES: Final = SEGMENTATIONS | {EnhancedUSVolumeStorage, ParametricMapStorage}
_UNKNOWN: Final = 0xFFFFFFFF
_LONG: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # VRs
_DEEP: Final = 32
_ELEMENTS: Final = 2_000_000  # of one object; a few seconds


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
    start = _after_meta(path)
    if syntax is None or start is None:
        return uid, CUT
    if syntax not in SYNTAXES:
        return uid, SYNTAX
    if not uid or not _is_whole(path, start, tags, syntax):
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


def _after_meta(path: Path) -> int | None:
    """Where the file meta group ends (PS3.10, 7.1); None when the file ends before."""
    with path.open("rb") as file:
        walk = _Walk(file, ExplicitVRLittleEndian)
        file.seek(132)
        return file.tell() if walk.group(2) else None


def _is_whole(path: Path, start: int, tags: pydicom.FileDataset, syntax: UID) -> bool:
    """Whether every element ends within the file, and an image has its pixels."""
    with path.open("rb") as file:
        file.seek(start)
        data: BinaryIO = file
        if syntax == DeflatedExplicitVRLittleEndian:  # of a size that was checked before
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data = io.BytesIO(inflate.decompress(file.read()))
            if not inflate.eof:
                return False
        walk = _Walk(data, syntax)
        if not walk.dataset():
            return False
    if not _is_image(tags):
        return "StudyInstanceUID" in tags and "SeriesInstanceUID" in tags
    return walk.pixels is not None and walk.pixels >= _least(tags, syntax)


def _is_image(tags: pydicom.FileDataset) -> bool:
    """By its class too: an image that was cut may have lost its Rows."""
    named = tags.get("SOPClassUID") or tags.file_meta.get("MediaStorageSOPClassUID") or ""
    return bool(tags.get("Rows")) or named in _IMAGES or "Image" in UID(named).name


def _least(tags: pydicom.FileDataset, syntax: UID) -> int:
    """Bytes of the pixels; fragments of compressed ones, of which each frame has its own."""
    if syntax in COMPRESSED:
        return int(tags.get("NumberOfFrames") or 1)
    names = ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "BitsAllocated")
    bits = 1
    for name in names:
        bits *= int(tags.get(name) or 1)
    # Two pixels share their colours (PS3.3, C.7.6.3.1.2): four samples instead of six.
    halved = tags.get("PhotometricInterpretation") == "YBR_FULL_422"
    return bits // 8 * 2 // 3 if halved else (bits + 7) // 8


class _Walk:
    """Steps from element to element (PS3.5, 7.1) without reading a value.

    It is as lenient as pydicom, which reads what is taken: where the VRs are not those of the
    transfer syntax (implicit ones in a file that says explicit, or in single items and elements),
    their bytes say so.
    """

    def __init__(self, file: BinaryIO, syntax: UID) -> None:
        self._file, self._implicit = file, syntax.is_implicit_VR
        self._little, self._left = syntax.is_little_endian, _ELEMENTS
        start = file.tell()
        self._size = file.seek(0, 2)
        file.seek(start)
        self.pixels: int | None = None

    def group(self, number: int) -> bool:
        """Past the elements of a group; False when the file ends within them."""
        while (start := self._file.tell()) < self._size:
            found = self._next()
            if found is not None and found[0] >> 16 != number:
                self._file.seek(start)
                return True
            if found is None or not self._value(*found, deep=_DEEP):
                return False
        return True

    def dataset(self) -> bool:
        """Past all elements; False when the file ends within one."""
        self._implicit = self._looks_implicit()
        while self._file.tell() < self._size:
            start = self._file.tell()
            found = self._next()
            if found is None:
                self._file.seek(start)
                rest = self._file.read(8)
                # Some writers fill the file up after the pixels.
                return self.pixels is not None and len(rest) < 8 and not any(rest)
            if not self._value(*found, deep=0):
                return False
        return True

    def _item(self, deep: int) -> bool:
        """Past the end of an item without a length."""
        outside = self._implicit
        self._implicit = outside or self._looks_implicit()  # PS3.5, 6.2.2
        whole = False
        while (found := self._next()) is not None:
            if found[0] == _ITEM_END:
                whole = True
                break
            if not self._value(*found, deep=deep):
                break
        self._implicit = outside
        return whole

    def _looks_implicit(self) -> bool:
        """Whether the first element has no VR where an explicit one would be."""
        start = self._file.tell()
        head = self._file.read(6)
        self._file.seek(start)
        return not _is_vr(head[4:]) if len(head) == 6 else self._implicit

    def _value(self, tag: int, length: int, deep: int) -> bool:
        start = self._file.tell()
        count = length
        if length != _UNKNOWN:
            if start + length > self._size:
                return False
            self._file.seek(length, 1)
        elif deep >= _DEEP or (count := self._items(deep + 1)) < 0:
            return False
        if tag in _PIXELS and not deep:
            self.pixels = count
        return True

    def _items(self, deep: int) -> int:
        """Past a value without a length: how many items or fragments it has; -1 when broken.

        The table of offsets before the fragments of pixels (PS3.5, A.4) is not one of them.
        """
        count = -1
        while (found := self._next()) is not None:
            tag, length = found
            if tag == _END:
                return max(0, count)
            if tag != _ITEM:
                return -1
            count += 1
            if length == _UNKNOWN:
                if not self._item(deep):
                    return -1
            elif self._file.tell() + length > self._size:
                return -1
            else:
                self._file.seek(length, 1)
        return -1

    def _next(self) -> tuple[int, int] | None:
        head = self._file.read(8)
        self._left -= 1
        if len(head) < 8 or self._left < 0:
            return None
        tag = self._number(head[:2]) << 16 | self._number(head[2:4])
        if self._implicit or tag >> 16 == 0xFFFE or not _is_vr(head[4:6]):
            return tag, self._number(head[4:])
        if head[4:6] not in _LONG:
            return tag, self._number(head[6:])
        more = self._file.read(4)
        return (tag, self._number(more)) if len(more) == 4 else None

    def _number(self, data: bytes) -> int:
        return int.from_bytes(data, "little" if self._little else "big")


def _is_vr(two: bytes) -> bool:
    return all(0x41 <= one <= 0x5A for one in two)
