"""Detect the kind of a file from its first bytes or its SOP class."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import pydicom
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from fedward import rule_codes

# PS3.3, A.51: segmentations; with Supplement 243, label maps too.
SEGMENTATIONS: Final = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
STRUCTURES: Final = "1.2.840.10008.5.1.4.1.1.481.3"  # PS3.3, A.19
MASKS: Final = SEGMENTATIONS | {STRUCTURES}
# Pixels that are no picture of a patient: labels, and doses in space.
NO_PICTURES: Final = SEGMENTATIONS | {"1.2.840.10008.5.1.4.1.1.481.2"}
_INFLATED: Final = 512 << 20  # bytes that a deflated file may grow to
_CHUNK: Final = 1 << 20
_LARGEST: Final = 2 << 30  # bytes of a mask's file, which is read as a whole
_ITEMS: Final = 2_000_000  # of all sequences of a mask's file; each takes about a kilobyte
_FEWER: Final = 400_000  # of an image's: a dozen of each of 30,000 frames
_MANY: Final = 20_000  # items after which the rest is counted before it is parsed
_READS: Final = 8_000_000  # of one header: one or two for each element; 20 seconds
_EMPTY: Final = 8  # bytes of the smallest item
_ITEM: Final = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # in either byte order
_META: Final = 4096  # bytes in which the file meta group nearly always ends
_GROUP_LENGTH: Final = b"\x02\x00\x00\x00UL\x04\x00"  # tag, VR and length of the first element
_BEFORE_META: Final = 128 + 4 + 12  # preamble, "DICM" and the element of the group's length


def is_dicom(path: Path) -> bool:
    """Whether the file starts as DICOM does: after a preamble, or with group 2 or 8 at once."""
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or (
        start[:2] in (b"\x02\x00", b"\x08\x00") and start[3:4] == b"\x00" and len(start) == 132
    )


def is_mask(header: pydicom.Dataset) -> bool:
    """Whether the object is a DICOM segmentation (PS3.3, A.51) or a structure set (A.19)."""
    return str(header.get("SOPClassUID") or "") in MASKS


def is_deflated(header: pydicom.Dataset) -> bool:
    """Whether everything after the file meta group is deflated (PS3.5, A.5)."""
    meta = getattr(header, "file_meta", pydicom.Dataset())
    return bool(meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian)


def check_inflated(path: Path) -> None:
    """Refuse a deflated file that would fill the memory; to be called before it is parsed.

    pydicom inflates all of such a file at once, even where only its header is asked for.

    Raises
    ------
    DataError
        "too large".
    """
    if (start := _deflated_from(path)) is not None:
        _count_items(_inflated(path, start), _ITEMS if _says_mask(path) else _FEWER)


def check_items(path: Path, end: int | None = None) -> None:
    """Refuse a header with too many items in its sequences.

    pydicom takes a kilobyte and 16 microseconds for each, however empty.

    Parameters
    ----------
    path : Path
        A file that is not deflated.
    end : int, optional
        Bytes that belong to the header, if that is known.

    Raises
    ------
    DataError
        "too large".
    """
    length = path.stat().st_size if end is None else end
    if length > _EMPTY * _FEWER:
        _count_items(_plain(path, length), _ITEMS if _says_mask(path) else _FEWER)


class Watched:
    """A file that pydicom parses; once it has met many items, they are counted to the end.

    Parameters
    ----------
    file : BinaryIO
        Open at its start.
    path : Path
        The same file.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.name, self.seek, self.tell = file.name, file.seek, file.tell
        self._read, self._path, self._items, self._reads = file.read, path, 0, 0

    def read(self, size: int = -1) -> bytes:
        """As the file does.

        Raises
        ------
        DataError
            "too large": see :func:`check_items`; or too many elements.
        """
        data, self._reads = self._read(size), self._reads + 1
        if self._reads > _READS:
            raise rule_codes.unusable(rule_codes.TOO_LARGE)
        if data[:4] in _ITEM:
            self._items += 1
            if self._items == _MANY:
                check_items(self._path)
        return data


def check_mask(path: Path) -> None:
    """Refuse a mask's file that would fill the memory once it is parsed.

    Raises
    ------
    DataError
        "too large": the file, or the number of items in its sequences.
    """
    if path.stat().st_size > _LARGEST:
        raise rule_codes.unusable(rule_codes.TOO_LARGE)
    start = _deflated_from(path)
    _count_items(_plain(path) if start is None else _inflated(path, start), _ITEMS)


def _count_items(chunks: Iterable[bytes], most: int) -> None:
    count, before = 0, b""
    for chunk in chunks:
        data = before + chunk
        count += sum(map(data.count, _ITEM))
        before = chunk[-3:]  # too short to be counted twice
        if count > most:
            raise rule_codes.unusable(rule_codes.TOO_LARGE)


def _says_mask(path: Path) -> bool:
    try:
        return str(read_file_meta_info(path).get("MediaStorageSOPClassUID")) in MASKS
    except Exception:  # pydicom raises nearly anything on a broken file
        return False


def _deflated_from(path: Path) -> int | None:
    """Where the deflated part of a file begins; None when there is none."""
    with path.open("rb") as file:
        start = file.read(_META)
    if start[128:132] != b"DICM" or _plainly_not(start):
        return None
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return None
    return _BEFORE_META + int(meta.get("FileMetaInformationGroupLength", 0))


def _plainly_not(start: bytes) -> bool:
    """Whether a file's first bytes hold its whole meta group, and in it no such transfer syntax.

    Parsing the group takes a tenth of the time that a header takes.
    """
    if start[132:140] != _GROUP_LENGTH or len(start) < _BEFORE_META:
        return False
    end = _BEFORE_META + int.from_bytes(start[140:144], "little")
    return end <= len(start) and DeflatedExplicitVRLittleEndian.encode() not in start[:end]


def _plain(path: Path, length: int | None = None) -> Iterator[bytes]:
    left = path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while chunk := file.read(min(_CHUNK, left)):
            left -= len(chunk)
            yield chunk


def _inflated(path: Path, start: int) -> Iterator[bytes]:
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(_CHUNK)
        while data and not inflate.eof:
            chunk = inflate.decompress(data, _CHUNK)
            size += len(chunk)
            if size > _INFLATED:
                raise rule_codes.unusable(rule_codes.TOO_LARGE)
            yield chunk
            data = inflate.unconsumed_tail or file.read(_CHUNK)
