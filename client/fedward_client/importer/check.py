"""What an object must be before it leaves the quarantine."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, cast

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
# What is compared, by its tag.
_TAGS: Final = {
    0x00080016: "SOPClassUID",
    0x00080018: "SOPInstanceUID",
    0x0020000E: "SeriesInstanceUID",
    0x0020000D: "StudyInstanceUID",
    0x00100020: "PatientID",
    0x00080060: "Modality",
    0x00280010: "Rows",
    0x00280011: "Columns",
    0x00280002: "SamplesPerPixel",
    0x00280008: "NumberOfFrames",
    0x00280100: "BitsAllocated",
    0x00280004: "PhotometricInterpretation",
    0x00020002: "MediaStorageSOPClassUID",
    0x00020003: "MediaStorageSOPInstanceUID",
    0x00020010: "TransferSyntaxUID",
}
_NUMBERS: Final = frozenset({"Rows", "Columns", "SamplesPerPixel", "BitsAllocated"})  # US
_ITEM, _ITEM_END, _END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS: Final = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
# Images by their name: those that have none of "Image" in it.
_IMAGES: Final = SEGMENTATIONS | {EnhancedUSVolumeStorage, ParametricMapStorage}
_UNKNOWN: Final = 0xFFFFFFFF
_LONG: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # VRs
_DEEP: Final = 32
_SHORT: Final = 1024  # bytes of a value that is compared
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
        meta = _Walk(file, ExplicitVRLittleEndian)
        file.seek(132)
        if not meta.group(2) or not (syntax := meta.values.get("TransferSyntaxUID")):
            return "", CUT
        uid = _text(meta.values.get("MediaStorageSOPInstanceUID", b""))
        known = UID(_text(syntax))
        if known not in SYNTAXES:
            return uid, SYNTAX
        data = _inflated(file) if known == DeflatedExplicitVRLittleEndian else file
        walk = None if data is None else _Walk(data, known)
        if walk is None or not walk.dataset():
            return uid, CUT
    tags = _read(path, meta.values | walk.values, known)
    uid = str(tags.get("SOPInstanceUID") or "")
    if not uid or not _has_all(tags, walk.pixels, known):
        return uid, CUT
    expected = wanted.get(uid)
    if expected is None:
        return uid, UNASKED
    if tags.get("PatientID", "") != expected.patient:
        return uid, PATIENT
    said = tuple(tags.get(n, "") for n in ("StudyInstanceUID", "SeriesInstanceUID", "Modality"))
    if said != (expected.study, expected.series, expected.modality):
        return uid, OTHER
    return uid, ""


def _inflated(file: BinaryIO) -> BinaryIO | None:
    """What is packed, of a size that was checked before; None where its end is missing."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    data = io.BytesIO(inflate.decompress(file.read()))
    return data if inflate.eof else None


def _text(raw: bytes) -> str:
    if b"\x1b" in raw:  # another character set begins (PS3.5, 6.1.2.5)
        raise ValueError(raw)
    return raw.decode("ascii").strip("\0").strip()


def _read(path: Path, values: Mapping[str, bytes], syntax: UID) -> dict[str, str]:
    """Values as text; by pydicom, at ten times the cost, where they are not plain ones."""
    order: Literal["little", "big"] = "little" if syntax.is_little_endian else "big"
    found = {}
    try:
        for name, raw in values.items():
            if name not in _NUMBERS:
                found[name] = _text(raw)
            elif len(raw) == 2:
                found[name] = str(int.from_bytes(raw, order))
            elif raw:
                raise ValueError(name)
    except ValueError:
        with path.open("rb") as file:
            tags = pydicom.dcmread(
                cast(BinaryIO, Watched(file, path)),
                defer_size=1 << 16,
                stop_before_pixels=True,
                specific_tags=[one for one in _TAGS.values() if one in values],
            )
        for name in values:
            if name in tags:
                found[name] = str(tags.get(name) or "").strip()
    return found


def _has_all(tags: Mapping[str, str], pixels: int | None, syntax: UID) -> bool:
    """Whether an image has its pixels, and anything else its study and series."""
    if not _is_image(tags):
        return "StudyInstanceUID" in tags and "SeriesInstanceUID" in tags
    return pixels is not None and pixels >= _least(tags, syntax)


def _is_image(tags: Mapping[str, str]) -> bool:
    """By its class too: an image that was cut may have lost its Rows."""
    named = tags.get("SOPClassUID") or tags.get("MediaStorageSOPClassUID") or ""
    return _number(tags, "Rows", 0) > 0 or named in _IMAGES or "Image" in UID(named).name


def _least(tags: Mapping[str, str], syntax: UID) -> int:
    """Bytes of the pixels; fragments of compressed ones, of which each frame has its own."""
    if syntax in COMPRESSED:
        return _number(tags, "NumberOfFrames", 1)
    names = ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "BitsAllocated")
    bits = 1
    for name in names:
        bits *= _number(tags, name, 1)
    # Two pixels share their colours (PS3.3, C.7.6.3.1.2): four samples instead of six.
    halved = tags.get("PhotometricInterpretation") == "YBR_FULL_422"
    return bits // 8 * 2 // 3 if halved else (bits + 7) // 8


def _number(tags: Mapping[str, str], name: str, other: int) -> int:
    return int(tags.get(name) or other) or other


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
        self.values: dict[str, bytes] = {}  # of what is compared, as it is stored

    def group(self, number: int) -> bool:
        """Past the elements of a group; False when the file ends within them."""
        while (start := self._file.tell()) < self._size:
            found = self._next()
            if found is not None and found[0] >> 16 != number:
                self._file.seek(start)
                return True
            if found is None or not self._value(*found, deep=_DEEP, keep=True):
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
            if not self._value(*found, deep=0, keep=True):
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

    def _value(self, tag: int, length: int, deep: int, *, keep: bool = False) -> bool:
        start = self._file.tell()
        count = length
        if length != _UNKNOWN:
            if start + length > self._size:
                return False
            if keep and tag in _TAGS and length <= _SHORT:
                self.values[_TAGS[tag]] = self._file.read(length)
            else:
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
