"""Trees of DICOM files, as an archive exports them.

Files are found by what they are, not by suffix. Labels come from ``labels.csv``, keyed by one of
SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID, AccessionNumber, PatientID or file; masks from
``masks/`` (PNG or NIfTI, named by the image's file stem or SOPInstanceUID; volumes by series UID).
In a 2D task each frame is an image; in a 3D task each series is a volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pydicom
from numpy.typing import NDArray

from client.data import reasons
from client.data.decode import Frame, read_frame
from client.data.files import file_identity, stem, table_keys, walk
from client.data.quiet import quiet
from client.data.readers.nifti import NiftiMask, is_nifti, oriented_volume
from client.data.readers.pictures import PictureMask, is_picture
from client.data.tables import Entry, Table, read_table
from client.data.types import Dataset, Image, LeftOut, Sample
from fedward.errors import DataError
from fedward.plan.schema import Task

KEYS: Final[tuple[str, ...]] = (
    "sopinstanceuid", "seriesinstanceuid", "studyinstanceuid", "accessionnumber", "patientid",
    "file",
)  # fmt: skip
_TAGS: Final = [
    "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "AccessionNumber", "PatientID",
    "IssuerOfPatientID", "Modality", "Rows", "Columns", "NumberOfFrames", "SyntheticData",
]  # fmt: skip
_PIXELS: Final = frozenset(  # tags (7FE0,0008), (7FE0,0009), (7FE0,0010) in either byte order
    bytes.fromhex(tag)
    for tag in ("e07f0800", "e07f0900", "e07f1000", "7fe00008", "7fe00009", "7fe00010")
)
_TABLES: Final = ("labels.csv", "patients.csv")
Frames = tuple[tuple[Path, int], ...]


@dataclass(frozen=True)
class DicomFrame:
    """Reads one frame."""

    path: Path
    frame: int = 0

    def __call__(self) -> Image:
        return read_frame(self.path, self.frame).image

    def identity(self) -> str:
        """A digest of place, size and time of change."""
        return file_identity(self.path, self.frame)


@dataclass(frozen=True)
class DicomVolume:
    """Reads a series as a volume: sorted by position, turned to RAS like a NIfTI image."""

    frames: Frames

    def __call__(self) -> Image:
        return stack([read_frame(path, frame) for path, frame in self.frames])

    def identity(self) -> str:
        """A digest of place, size and time of change of every file."""
        return "".join(file_identity(path, frame) for path, frame in self.frames)


@dataclass(frozen=True)
class _Header:
    """What is known of a file before its pixels are decoded."""

    path: Path
    patient: str
    keys: dict[str, str]
    modality: str
    frames: int
    synthetic: bool


def read(root: Path, task: Task) -> Dataset:
    """Read a DICOM tree.

    Raises
    ------
    DataError
        A classification task finds no ``labels.csv``, a segmentation task no ``masks/``.
    """
    base = root / "images" if (root / "images").is_dir() else root
    files = [f for f in walk(base, without=("masks",)) if f.name not in _TABLES]
    headers, left_out = _headers(files, root, task)
    samples: list[Sample] = []
    for name, item in _items(root, base, headers, task):
        if isinstance(item, Sample):
            samples.append(item)
        else:
            left_out.append(LeftOut(item, name))
    return Dataset(tuple(samples), tuple(left_out))


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


def _headers(files: Sequence[Path], root: Path, task: Task) -> tuple[list[_Header], list[LeftOut]]:
    headers: list[_Header] = []
    left_out: list[LeftOut] = []
    seen: set[str] = set()
    with quiet():
        for file in files:
            try:
                header = _header(file, task)
                uid = header.keys["sopinstanceuid"]
                if uid in seen:
                    raise reasons.unusable(reasons.DUPLICATE)
                seen |= {uid} - {""}
                headers.append(header)
            except DataError as error:
                name = file.relative_to(root).as_posix()
                left_out.append(LeftOut(reasons.reason_of(error), name))
    return headers, left_out


def _header(path: Path, task: Task) -> _Header:
    if not is_dicom(path):
        raise reasons.unusable(reasons.NOT_DICOM)
    try:
        with path.open("rb") as file:
            tags = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=True)
            pixels_next = file.read(4) in _PIXELS or _deflated(tags)
        words = {name.lower(): str(tags.get(name) or "").strip() for name in _TAGS}
        frames = int(tags.get("NumberOfFrames") or 1)
    except Exception:
        # pydicom raises nearly anything on a broken file, and its texts quote values.
        raise reasons.unusable(reasons.NOT_READABLE) from None
    if not (words["rows"] and words["columns"] and pixels_next):
        raise reasons.unusable(reasons.NO_PIXELS)
    if "any" not in task.modality and words["modality"] not in task.modality:
        raise reasons.unusable(reasons.OTHER_MODALITY)
    if not words["patientid"]:
        raise reasons.unusable(reasons.NO_PATIENT)
    patient = "\\".join((words["issuerofpatientid"], words["patientid"]))
    keys = {name: words[name] for name in KEYS if name in words}
    synthetic = words["syntheticdata"].upper() == "YES"
    return _Header(path, patient, keys, words["modality"], max(frames, 1), synthetic)


def _deflated(header: pydicom.FileDataset) -> bool:
    # There the next bytes are compressed and tell nothing.
    syntax = header.file_meta.get("TransferSyntaxUID")
    return bool(syntax == pydicom.uid.DeflatedExplicitVRLittleEndian)


def _items(
    root: Path, base: Path, headers: list[_Header], task: Task
) -> Iterator[tuple[str, Sample | str]]:
    table = _table(root, task)
    masks = _masks(root, task)
    keys = table_keys([h.path for h in headers], (root, base))
    groups = [(h,) for h in headers] if task.dimensions == 2 else _series(headers)
    for group in groups:
        first = group[0]
        name = first.path.relative_to(root).as_posix()
        if table is not None:
            yield from ((name, item) for item in _labelled(group, keys, table, task))
        else:
            yield from ((name, item) for item in _masked(group, masks, task))


def _series(headers: list[_Header]) -> list[tuple[_Header, ...]]:
    groups: dict[tuple[str, str], list[_Header]] = {}
    for header in headers:
        uid = header.keys["seriesinstanceuid"] or str(header.path)
        groups.setdefault((header.patient, uid), []).append(header)
    return [tuple(group) for group in groups.values()]


def _table(root: Path, task: Task) -> Table | None:
    if task.kind == "segmentation":
        return None
    if not (root / "labels.csv").is_file():
        raise DataError(
            "DICOM files for classification need a labels.csv",
            fix="Write one with a column PatientID, StudyInstanceUID, SeriesInstanceUID, "
            "SOPInstanceUID, AccessionNumber or file, and a column label",
        )
    return read_table(root / "labels.csv", KEYS, task)


def _masks(root: Path, task: Task) -> dict[str, Path]:
    if task.kind == "classification":
        return {}
    if not (root / "masks").is_dir():
        raise DataError(
            "DICOM files for segmentation need a folder masks",
            fix="Put PNG or NIfTI masks there, named by file stem or SOPInstanceUID",
        )
    return {stem(f): f for f in walk(root / "masks") if is_picture(f) or is_nifti(f)}


def _loads(group: tuple[_Header, ...], task: Task) -> Iterator[Callable[[], Image]]:
    frames = tuple((h.path, k) for h in group for k in range(h.frames))
    if task.dimensions == 3:
        yield DicomVolume(frames)
    else:
        yield from (DicomFrame(path, frame) for path, frame in frames)


def _labelled(
    group: tuple[_Header, ...], keys: dict[Path, tuple[str, ...]], table: Table, task: Task
) -> Iterator[Sample | str]:
    entries = [_entry(header, keys[header.path], table) for header in group]
    found = [e for e in entries if e is not None]
    distinct = {(e.label, e.reason) for e in found}
    if not found:
        yield reasons.NO_LABEL
    elif len(distinct) > 1:
        yield reasons.CONFLICTING
    elif found[0].label is None:
        yield found[0].reason or reasons.NO_LABEL
    else:
        entry = found[0]
        columns = entry.columns | _columns(group)
        for load in _loads(group, task):
            yield Sample(group[0].patient, load, entry.label, split=entry.split, columns=columns)


def _entry(header: _Header, files: tuple[str, ...], table: Table) -> Entry | None:
    if table.column == "file":
        return table.find(files)
    value = header.keys[table.column]
    return table.find([value]) if value else None


def _columns(group: tuple[_Header, ...]) -> dict[str, str]:
    return {"synthetic": "yes"} if any(h.synthetic for h in group) else {}


def _masked(
    group: tuple[_Header, ...], masks: dict[str, Path], task: Task
) -> Iterator[Sample | str]:
    header = group[0]
    volume = task.dimensions == 3
    names = (
        [header.keys["seriesinstanceuid"], header.path.parent.name]
        if volume
        else [header.keys["sopinstanceuid"], stem(header.path)]
    )
    mask = next((masks[name] for name in names if name in masks), None)
    if mask is None or (volume and not is_nifti(mask)):
        yield reasons.NO_MASK
    elif not volume and header.frames > 1:
        yield reasons.MASK_SHAPE  # one mask cannot serve several frames
    else:
        read_mask = NiftiMask(mask, task.dimensions) if is_nifti(mask) else PictureMask(mask)
        load = next(_loads(group, task))
        yield Sample(header.patient, load, mask=read_mask, columns=_columns(group))


def stack(frames: Sequence[Frame]) -> Image:
    """Frames of one series as a volume ``(C, x, y, z)`` in RAS.

    Raises
    ------
    DataError
        "shape does not fit the task": the frames do not share a plane and a size, or do not say
        where they lie; "slices missing": they are not evenly spaced (10 %).
    """
    along = frames[0].orientation
    if len(frames) < 2 or along is None or not all(_alike(f, frames[0]) for f in frames):
        raise reasons.unusable(reasons.WRONG_SHAPE)
    normal = np.cross(along[0], along[1])
    places = np.array([f.position for f in frames]) @ normal
    order = np.argsort(places, kind="stable")
    steps = np.diff(places[order])
    if steps.min() <= 0 or np.ptp(steps) > 0.1 * np.median(steps):
        raise reasons.unusable(reasons.INCOMPLETE)
    ordered = [frames[k] for k in order]
    values = np.stack([f.image.pixels for f in ordered], axis=-1)
    affine = _affine(ordered[0], along, normal, float(np.mean(steps)))
    turned = [oriented_volume(channel, affine) for channel in values]
    pixels = np.ascontiguousarray(np.stack([t[0] for t in turned]), np.float32)
    return Image(pixels, turned[0][1], ordered[len(ordered) // 2].image.window)


def _alike(frame: Frame, first: Frame) -> bool:
    return (
        frame.position is not None
        and frame.orientation is not None
        and frame.image.pixels.shape == first.image.pixels.shape
        and np.allclose(frame.orientation, first.orientation, atol=1e-3)  # type: ignore[arg-type]
        and np.allclose(frame.image.spacing, first.image.spacing, rtol=1e-3)
    )


def _affine(
    first: Frame, along: NDArray[np.float64], normal: NDArray[np.float64], step: float
) -> NDArray[np.float64]:
    """Voxel (row, column, slice) to RAS mm (C.7.6.2.1.1, with left and posterior negated)."""
    affine = np.eye(4)
    affine[:3, 0] = along[1] * first.image.spacing[0]
    affine[:3, 1] = along[0] * first.image.spacing[1]
    affine[:3, 2] = normal * step
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
