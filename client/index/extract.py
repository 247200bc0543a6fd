"""Read one file once: bytes, header and pixels, and keep of it what names nobody."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from client.data import reasons
from client.data.files import is_hidden
from client.data.patient_options import PatientOptions
from client.data.quiet import quiet
from client.data.readers.dicom_files import is_dicom
from client.data.readers.nifti import NiftiMask
from client.data.readers.pictures import PictureMask
from client.data.types import Format
from client.index.extract_dicom import dicom_facts
from client.index.extract_images import nifti_facts, npz_facts, picture_facts
from client.index.extract_masks import MASK_FOLDERS, values_of
from client.index.facts import FileFacts
from client.secret import Pseudonyms
from fedward.errors import DataError

AGAIN: Final = -1  # a time of change that no file has, so that the next scan reads it again
_VERSION: Final = 5  # of what is extracted; files read by another are read again
_CHUNK: Final = 1 << 20
_PICTURES: Final = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_TABLES: Final = (".csv", ".xlsx")


@dataclass(frozen=True)
class Extractor:
    """Knows the dataset, and gives the facts of its files.

    Attributes
    ----------
    root : Path
        The dataset.
    format : str
        What its images are.
    secret : bytes
        The site's.
    patients : PatientOptions
        What missing and shared patient ids mean.
    """

    root: Path
    format: Format
    secret: bytes = field(repr=False)
    patients: PatientOptions = field(default_factory=PatientOptions)

    def name(self, path: Path) -> str:
        """The stand-in of a file's path."""
        return Pseudonyms(self.secret)("path", os.fspath(path.relative_to(self.root)))

    @property
    def settings(self) -> str:
        """A keyed hash of what facts depend on beside the file; others mean: read again."""
        parts = (str(_VERSION), self.format, *self.patients.parts)
        return Pseudonyms(self.secret)("settings", *parts)

    def __call__(self, path: Path) -> FileFacts:
        """The facts of a file; never raises for what is in it."""
        name = self.name(path)
        try:
            before = path.stat()
        except OSError as error:
            reason = reasons.NOT_A_FILE if path.is_symlink() else _of_system(error)
            return FileFacts(name, 0, 0, 0, reason=reason)
        facts = FileFacts(name, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
        if path != self.root and is_hidden(path.name):
            return replace(facts, reason=reasons.HIDDEN)
        if stat.S_ISDIR(before.st_mode):
            if path.is_symlink():
                return replace(facts, reason=reasons.LINKED)
            return replace(facts, modified=AGAIN, reason=_of_folder(path))
        if not stat.S_ISREG(before.st_mode) or not _inside(path, self.root):
            return replace(facts, reason=reasons.NOT_A_FILE)
        try:
            found = self._read(path, facts)
            after = path.stat()
        except OSError as error:
            return replace(facts, modified=AGAIN, reason=_of_system(error))
        if _identity(after) != _identity(before):
            return replace(facts, modified=AGAIN, reason=reasons.CHANGED)
        return found

    def _read(self, path: Path, facts: FileFacts) -> FileFacts:
        facts = replace(facts, digest=_digest(path))
        name = path.name.lower()
        if name.endswith(_TABLES):
            return replace(facts, format="table")
        try:
            with quiet():
                return self._image(path, name, facts)
        except Exception as error:
            # Decoders raise nearly anything, and their texts quote the file.
            return replace(facts, reason=reasons.reason_of(error))

    def _marked(self, path: Path, found: FileFacts, mask: Callable[[], Any]) -> FileFacts:
        """With what a mask marks, where the file lies in a folder of masks."""
        if found.reason or path.relative_to(self.root).parts[0] not in MASK_FOLDERS:
            return found
        with suppress(DataError):  # no label map, which its reader tells again
            return replace(found, marked=values_of(mask()))
        return replace(found, marked="{}")

    def _image(self, path: Path, name: str, facts: FileFacts) -> FileFacts:
        if name.endswith((".nii", ".nii.gz")):
            found = nifti_facts(path, replace(facts, format="nifti"))
            return self._marked(path, found, NiftiMask(path, 3))
        if name.endswith(_PICTURES):
            found = picture_facts(path, replace(facts, format="picture"))
            return self._marked(path, found, PictureMask(path))
        if name.endswith(".npz"):
            return npz_facts(path, replace(facts, format="npz"))
        if is_dicom(path):
            hashed = Pseudonyms(self.secret)
            return dicom_facts(path, replace(facts, format="dicom"), hashed, self.patients)
        wrong = reasons.NOT_DICOM if self.format == "dicom" else reasons.OTHER_FORMAT
        return replace(facts, reason=wrong)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _identity(info: os.stat_result) -> tuple[int, ...]:
    # A copying program may set the size and the time back; the entry's own time it cannot.
    return (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _inside(path: Path, root: Path) -> bool:
    return not path.is_symlink() or path.resolve().is_relative_to(root.resolve())


def _of_folder(path: Path) -> str:
    """Why a folder was met that should have been entered."""
    try:
        with os.scandir(path):
            return reasons.CHANGED  # it opens by now
    except OSError as error:
        return _of_system(error)


def _of_system(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return reasons.NOT_PERMITTED
    return reasons.CHANGED if isinstance(error, FileNotFoundError) else reasons.NOT_READABLE
