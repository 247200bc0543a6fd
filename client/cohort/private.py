"""Files for the site's own eyes: readable by their owner only, and never half written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fedward.errors import OutputError


def write_private(
    path: Path, content: bytes, *, modified: int | None = None, mode: int = 0o600
) -> None:
    """Write a file aside and give it its name when it is safe on the disk.

    Parameters
    ----------
    path : Path
        Replaced if it is there; its folder must exist.
    content : bytes
        All of it.
    modified : int, optional
        Time of change to give it, ns.
    mode : int
        Who may read it, whatever the umask.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
        aside = Path(name)
        try:
            os.fchmod(handle, mode)
            _fill(handle, content)
            if modified is not None:
                os.utime(aside, ns=(modified, modified))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            "the folder of the result must be writable",
            value=os.strerror(error.errno or 0),
            fix="Choose another, or free some space",
        ) from None


def _fill(handle: int, content: bytes) -> None:
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut only when the folder itself is on the disk.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
