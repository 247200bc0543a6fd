"""What kind of file this is, by its first bytes or its class."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Final

import pydicom
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from client.data import reasons

SEGMENTATION: Final = "1.2.840.10008.5.1.4.1.1.66.4"
# Pixels that are no picture of a patient: labels, and doses in space.
NO_PICTURES: Final = frozenset({SEGMENTATION, "1.2.840.10008.5.1.4.1.1.481.2"})
_INFLATED: Final = 512 << 20  # bytes that a deflated file may grow to
_CHUNK: Final = 1 << 20
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


def is_segmentation(header: pydicom.Dataset) -> bool:
    """Whether the object is a DICOM segmentation (PS3.3, A.51)."""
    return str(header.get("SOPClassUID") or "") == SEGMENTATION


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
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(_BEFORE_META + int(meta.get("FileMetaInformationGroupLength", 0)))
        data = file.read(_CHUNK)
        while data and not inflate.eof:
            size += len(inflate.decompress(data, _CHUNK))
            if size > _INFLATED:
                raise reasons.unusable(reasons.TOO_LARGE)
            data = inflate.unconsumed_tail or file.read(_CHUNK)
