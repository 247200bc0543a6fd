"""Read one file once: bytes, header and pixels, and keep of it what names nobody."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image as Pillow

from client.data import reasons
from client.data.decode import frame_bytes, read_frame
from client.data.quiet import quiet
from client.data.readers.dicom_files import check_inflated, is_dicom, is_segmentation
from client.data.types import Format
from client.index.facts import FileFacts
from client.secret import Pseudonyms
from fedward.errors import DataError

_CHUNK: Final = 1 << 20
_LARGEST: Final = 8 << 30  # bytes that the frames of one file may take when decoded
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
    shared_ids : frozenset of str
        Lower-case patient ids that stand for nobody.
    """

    root: Path
    format: Format
    secret: bytes = field(repr=False)
    shared_ids: frozenset[str] = frozenset()

    def name(self, path: Path) -> str:
        """The stand-in of a file's path."""
        return Pseudonyms(self.secret)("path", os.fspath(path.relative_to(self.root)))

    def __call__(self, path: Path) -> FileFacts:
        """The facts of a file; never raises for what is in it."""
        name = self.name(path)
        try:
            before = path.stat()
        except OSError as error:
            return FileFacts(name, 0, 0, 0, reason=_of_system(error))
        facts = FileFacts(name, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
        if not stat.S_ISREG(before.st_mode) or not _inside(path, self.root):
            return replace(facts, reason=reasons.NOT_A_FILE)
        try:
            found = self._read(path, facts)
            after = path.stat()
        except OSError as error:
            return replace(facts, reason=_of_system(error))
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            # Another time of change than the file's own, so that the next scan reads it again.
            return replace(facts, modified=0, reason=reasons.CHANGED)
        return found

    def _read(self, path: Path, facts: FileFacts) -> FileFacts:
        facts = replace(facts, digest=_digest(path))
        suffix = path.name.lower()
        if suffix.endswith(_TABLES):
            return replace(facts, format="table")
        try:
            with quiet():
                return self._image(path, suffix, facts)
        except DataError as error:
            return replace(facts, reason=reasons.reason_of(error))
        except MemoryError:
            return replace(facts, reason=reasons.TOO_LARGE)
        except Exception:
            # Decoders raise nearly anything, and their texts quote the file.
            return replace(facts, reason=reasons.NOT_READABLE)

    def _image(self, path: Path, name: str, facts: FileFacts) -> FileFacts:
        if name.endswith((".nii", ".nii.gz")):
            return _nifti(path, replace(facts, format="nifti"))
        if name.endswith(_PICTURES):
            return _picture(path, replace(facts, format="picture"))
        if name.endswith(".npz"):
            return replace(facts, format="npz")
        if is_dicom(path):
            return self._dicom(path, replace(facts, format="dicom"))
        wrong = reasons.NOT_DICOM if self.format == "dicom" else reasons.OTHER_FORMAT
        return replace(facts, reason=wrong)

    def _dicom(self, path: Path, facts: FileFacts) -> FileFacts:
        check_inflated(path)
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        facts = replace(facts, **self._who(header), **_what(header))
        if is_segmentation(header):
            return facts
        if not (facts.rows and facts.columns):
            return replace(facts, reason=reasons.NO_PIXELS)
        if frame_bytes(header) * facts.frames > _LARGEST:
            return replace(facts, reason=reasons.TOO_LARGE)
        try:
            frames = (read_frame(path, k).image for k in range(facts.frames))
            return _measured(facts, ((i.pixels, i.spacing) for i in frames))
        except DataError as error:
            return replace(facts, reason=reasons.reason_of(error))

    def _who(self, header: pydicom.Dataset) -> dict[str, Any]:
        hashed = Pseudonyms(self.secret)
        text = {
            key: str(header.get(key) or "").strip()
            for key in ("PatientID", "IssuerOfPatientID", "StudyInstanceUID", "SeriesInstanceUID",
                        "SOPInstanceUID", "AccessionNumber")
        }  # fmt: skip
        patient = text["PatientID"]
        shared = "shared" if patient.lower() in self.shared_ids else ""
        return {
            "patient": hashed("patient", text["IssuerOfPatientID"], patient) if patient else "",
            "patientid": hashed("patientid", patient),
            "study": hashed("studyinstanceuid", text["StudyInstanceUID"]),
            "series": hashed("seriesinstanceuid", text["SeriesInstanceUID"]),
            "instance": hashed("sopinstanceuid", text["SOPInstanceUID"]),
            "accession": hashed("accessionnumber", text["AccessionNumber"]),
            "nobody": shared if patient else "missing",
        }


def _what(header: pydicom.Dataset) -> dict[str, Any]:
    meta = getattr(header, "file_meta", {})
    image_type = header.get("ImageType") or ()
    words = [image_type] if isinstance(image_type, str) else image_type
    return {
        "modality": _word(header.get("Modality")),
        "body_part": _word(header.get("BodyPartExamined")),
        "manufacturer": _word(header.get("Manufacturer")),
        "syntax": _uid_name(meta.get("TransferSyntaxUID")),
        "photometric": _word(header.get("PhotometricInterpretation")),
        "object_type": _uid_name(header.get("SOPClassUID")),
        "image_type": "\\".join(_word(word) for word in words),
        "rows": _count(header.get("Rows")), "columns": _count(header.get("Columns")),
        "frames": max(1, _count(header.get("NumberOfFrames"))),
        "bits": _count(header.get("BitsStored")),
        "thickness": _positive(header.get("SliceThickness")),
        "burned_in": _word(header.get("BurnedInAnnotation")),
        "synthetic": str(header.get("SyntheticData") or "").upper() == "YES",
    }  # fmt: skip


def _nifti(path: Path, facts: FileFacts) -> FileFacts:
    image: Any = nib.load(path)
    shape, zooms = image.shape, tuple(float(z) for z in image.header.get_zooms()[:3])
    facts = replace(
        facts, rows=shape[0], columns=shape[1] if len(shape) > 1 else 1,
        frames=int(np.prod(shape[2:], dtype=np.int64)), bits=image.get_data_dtype().itemsize * 8,
    )  # fmt: skip
    if 8 * facts.rows * facts.columns * facts.frames > _LARGEST:
        return replace(facts, reason=reasons.TOO_LARGE)
    return _measured(facts, [(np.asanyarray(image.dataobj), zooms)])


def _picture(path: Path, facts: FileFacts) -> FileFacts:
    with Pillow.open(path) as image:
        facts = replace(facts, rows=image.height, columns=image.width, frames=1)
        if facts.rows * facts.columns * 24 > _LARGEST:
            return replace(facts, reason=reasons.TOO_LARGE)
        pixels = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    bits = 8 * pixels.dtype.itemsize
    return _measured(replace(facts, bits=bits), [(pixels, (1.0, 1.0))])


def _measured(
    facts: FileFacts, parts: Iterable[tuple[NDArray[Any], tuple[float, ...]]]
) -> FileFacts:
    digest, low, high = hashlib.sha256(), np.inf, -np.inf
    spacing: tuple[float, ...] = ()
    for pixels, mm in parts:
        spacing = mm
        digest.update(repr((pixels.shape, pixels.dtype.str)).encode())
        digest.update(np.ascontiguousarray(pixels).tobytes())
        good = pixels[np.isfinite(pixels)]
        if good.size:
            low, high = min(low, float(good.min())), max(high, float(good.max()))
    ends = (low, high) if low <= high else (float("nan"), float("nan"))
    return replace(
        facts, pixels=digest.hexdigest(), spacing=tuple(round(s, 4) for s in spacing),
        low=ends[0], high=ends[1],
    )  # fmt: skip


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _inside(path: Path, root: Path) -> bool:
    return not path.is_symlink() or path.resolve().is_relative_to(root.resolve())


def _of_system(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return reasons.NOT_PERMITTED
    return reasons.CHANGED if isinstance(error, FileNotFoundError) else reasons.NOT_READABLE


def _word(value: object) -> str:
    return str(value or "").strip()[:64]


def _uid_name(value: object) -> str:
    """The standard's name of a UID; a private one is nobody's business, so it is only called so."""
    if not value:
        return ""
    uid = pydicom.uid.UID(str(value))
    return uid.name if uid.name != uid else "private"


def _count(value: object) -> int:
    try:
        return max(0, int(str(value or 0)))
    except ValueError:
        return 0


def _positive(value: object) -> float:
    try:
        number = float(str(value or 0))
    except ValueError:
        return 0.0
    return number if np.isfinite(number) and number > 0 else 0.0
