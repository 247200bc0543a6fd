"""Finished parts of an audit on disk, so that a killed one goes on where it was.

They tell of single patients, and stay on this machine: only their owner can read them.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.errors import OutputError

_ABOUT = "about.json"


class Store:
    """Named parts, each a set of arrays.

    Parameters
    ----------
    folder : Path
        Made when missing.
    about : mapping
        What the parts depend on; parts of anything else that are there are removed.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._folder = folder
        text = json.dumps(dict(about), sort_keys=True)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            known = folder / _ABOUT
            if not known.exists() or known.read_text("utf-8") != text:
                for old in folder.glob("*.npz"):
                    old.unlink()
                self._write(_ABOUT, text.encode())
        except OSError as error:
            raise _unwritable(error) from error

    def get(self, name: str) -> dict[str, NDArray[Any]] | None:
        """A part, or None where it is not there or not whole."""
        try:
            with (self._folder / f"{name}.npz").open("rb") as file:
                return dict(np.load(file, allow_pickle=False))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def put(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep a part, whole or not at all.

        Raises
        ------
        OutputError
            It cannot be written.
        """
        content = io.BytesIO()
        np.savez(content, **dict(arrays))  # type: ignore[arg-type]
        try:
            self._write(f"{name}.npz", content.getvalue())
        except OSError as error:
            raise _unwritable(error) from error

    def _write(self, name: str, content: bytes) -> None:
        part = self._folder / f".{name}.part"
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._folder / name)


def _unwritable(error: OSError) -> OutputError:
    return OutputError(
        "an audit must be able to keep its finished parts",
        value=error.strerror,
        fix="Choose another folder with --out, or free some space",
        where="--out",
    )
