"""What kind of file this is, by its first bytes or its class."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pydicom

SEGMENTATION: Final = "1.2.840.10008.5.1.4.1.1.66.4"


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
