"""DICOM headers: the facts about files before any pixel is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

import pydicom
from pydicom.tag import BaseTag, Tag

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.data.options import PatientOptions
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.kinds import (
    PRESENTATION,
    PROCESSING,
    ImageOptions,
    Kind,
)
from fedward_client.data.readers.dicom.kinds import TAGS as KIND_TAGS
from fedward_client.data.readers.dicom.pixels import Place, place_of
from fedward_client.data.readers.dicom.sniff import (
    MASKS,
    Watched,
    check_inflated,
    is_dicom,
)
from fedward_client.data.sample import LeftOut

KEYS: Final[tuple[str, ...]] = (
    "sopinstanceuid",
    "seriesinstanceuid",
    "studyinstanceuid",
    "accessionnumber",
    "patientid",
    "file",
)
_TAGS: Final = [
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "AccessionNumber",
    "PatientID",
    "IssuerOfPatientID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SyntheticData",
    "SOPClassUID",
    "ImageType",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "FrameOfReferenceUID",
]
# What tells slices in one place apart, what says it best first. Private ones: diffusion weights and
# directions of Siemens, GE and Philips, which classic MR objects have no standard attribute for.
TAKES: Final[tuple[str | int, ...]] = (
    "TemporalPositionIdentifier",
    "EchoNumbers",
    "EchoTime",
    "InversionTime",
    "ImageType",
    "DiffusionBValue",
    0x0019100C,
    0x00431039,
    0x20011003,
    "DiffusionGradientOrientation",
    0x0019100E,
    "TriggerTime",
    "NominalPercentageOfCardiacPhase",
    "KVP",
    "ExposureTime",
    "FlipAngle",
    "RepetitionTime",
    "ConvolutionKernel",
    "SliceThickness",
    "ContrastBolusAgent",
    "SeriesDescription",
    "AcquisitionNumber",
    "FrameReferenceTime",
    "AcquisitionTime",
    "ContentTime",
)
# Of these a value may belong to a slice alone, as it was scanned one after the other.
TIMES: Final = frozenset(
    {"TriggerTime", "AcquisitionNumber", "FrameReferenceTime", "AcquisitionTime", "ContentTime"}
)
_WANTED: Final[list[BaseTag]] = [Tag(name) for name in (*_TAGS, *TAKES, *KIND_TAGS)]
_OFTEN: Final = 50  # files after which the progress is told
_FRAME: Final = 8  # bytes of the smallest frame that there is
_LONGEST: Final = 1 << 16  # bytes of a value; each is made into objects of a hundred bytes
_INFLATED: Final = 1 << 20  # frames of a deflated file
_PIXELS: Final = frozenset(  # tags (7FE0,0008), (7FE0,0009), (7FE0,0010) in either byte order
    bytes.fromhex(tag)
    for tag in ("e07f0800", "e07f0900", "e07f1000", "7fe00008", "7fe00009", "7fe00010")
)

Listen = Callable[[int, int], None]


@dataclass(frozen=True)
class Header:
    """What is known of a file before its pixels are decoded.

    Attributes
    ----------
    path : Path
        The file.
    patient : str
        Issuer and id of the patient.
    keys : dict
        Values by which a label table may mean the file, by the column's lower-case name.
    modality : str
        As in DICOM.
    frames : int
        At least 1.
    synthetic : bool
        Whether the file says so (0008,001C).
    shape : tuple of int
        Rows and columns.
    spacing, orientation : tuple of float
        What the slices of one volume share, up to rounding; empty where unknown.
    takes : tuple
        Values of :data:`TAKES`, in their order: what tells slices in one place apart.
    space : str
        UID of the frame of reference, in which positions are comparable.
    place : Place or None
        Where the slice lies; None in a multi-frame file, whose frames tell.
    intent : str
        ``FOR PRESENTATION``, ``FOR PROCESSING`` or "".
    """

    path: Path
    patient: str
    keys: dict[str, str]
    modality: str
    frames: int
    synthetic: bool
    shape: tuple[int, int] = (0, 0)
    spacing: tuple[float, ...] = ()
    orientation: tuple[float, ...] = ()
    takes: tuple[str, ...] = ()
    space: str = ""
    place: Place | None = None
    intent: str = ""


@dataclass(frozen=True)
class MaskObject:
    """A DICOM segmentation or structure set found among the files."""

    path: Path


def unheard(done: int, of: int) -> None:
    """Who listens to nothing."""


def read_headers(
    files: Sequence[Path],
    root: Path,
    task: Task,
    patients: PatientOptions | None = None,
    listen: Listen = unheard,
    images: ImageOptions | None = None,
) -> tuple[list[Header], list[Path], list[LeftOut]]:
    """The images among files, the masks if the task is segmentation, and what was left out."""
    patients, images = patients or PatientOptions(), images or ImageOptions()
    headers: list[Header] = []
    masks: list[Path] = []
    left_out: list[LeftOut] = []
    seen: set[str] = set()
    with quiet():
        for place, file in enumerate(files):
            if place % _OFTEN == 0:
                listen(place, len(files))
            try:
                header = _header(file, task, patients, images)
                if isinstance(header, MaskObject):
                    masks.append(file)
                    continue
                uid = header.keys["sopinstanceuid"]
                if uid in seen:
                    raise rule_codes.unusable(rule_codes.DUPLICATE)
                seen |= {uid} - {""}
                headers.append(header)
            except DataError as error:
                name = file.relative_to(root).as_posix()
                left_out.append(LeftOut(rule_codes.reason_of(error), name))
    kept, raw = _presented(headers)
    reason = rule_codes.FOR_PROCESSING
    left_out += [LeftOut(reason, one.path.relative_to(root).as_posix()) for one in raw]
    return kept, masks, left_out


def _presented(headers: list[Header]) -> tuple[list[Header], list[Header]]:
    """The images, and those for processing beside which the study has some for presentation.

    A digital detector sends each exposure twice; one patient would count for two images.
    """

    def study(header: Header) -> tuple[str, str, str]:
        return header.patient, header.keys["studyinstanceuid"], header.modality

    shown = {study(header) for header in headers if header.intent == PRESENTATION}
    raw = [one for one in headers if one.intent == PROCESSING and study(one) in shown]
    twice = {header.path for header in raw}
    return [header for header in headers if header.path not in twice], raw


def _header(
    path: Path, task: Task, patients: PatientOptions, images: ImageOptions
) -> Header | MaskObject:
    if not is_dicom(path):
        raise rule_codes.unusable(rule_codes.NOT_DICOM)
    try:
        tags, pixels_next = _read(path)
        words = {name.lower(): str(tags.get(name) or "").strip() for name in _TAGS}
        frames = int(tags.get("NumberOfFrames") or 1)
        kind = Kind.of(tags)
        shape = int(tags.get("Rows") or 0), int(tags.get("Columns") or 0)
    except Exception as error:
        # pydicom raises nearly anything on a broken file, and its texts quote values.
        raise rule_codes.unusable(rule_codes.reason_of(error)) from None
    if words["sopclassuid"] in MASKS and task.has_masks:
        return MaskObject(path)
    if words["sopclassuid"] in MASKS and task.has_boxes:
        raise rule_codes.unusable(rule_codes.NOT_SELECTED)  # not an image without a box
    if not (words["rows"] and words["columns"] and pixels_next):
        raise rule_codes.unusable(rule_codes.NO_PIXELS)
    if "any" not in task.modality and words["modality"] not in task.modality:
        raise rule_codes.unusable(rule_codes.OTHER_MODALITY)
    if reason := kind.reason(images):
        raise rule_codes.unusable(reason)
    patient = "\\".join(patients.patient(words))
    if frames > _most_frames(path, tags):
        raise rule_codes.unusable(rule_codes.NOT_READABLE)
    keys = {name: words[name] for name in KEYS if name in words}
    if patients.nobody(words["patientid"]) and patients.shared != "keep":
        keys["patientid"] = ""  # a row of such an id would be of many patients
    synthetic = words["syntheticdata"].upper() == "YES"
    return Header(
        path,
        patient,
        keys,
        words["modality"],
        max(frames, 1),
        synthetic,
        shape=shape,
        spacing=_numbers(tags, "PixelSpacing"),
        orientation=_numbers(tags, "ImageOrientationPatient"),
        takes=tuple(_take(tags, name) for name in TAKES),
        space=words["frameofreferenceuid"],
        place=_place(tags) if frames <= 1 else None,
        intent=kind.intent,
    )


def _read(path: Path) -> tuple[pydicom.FileDataset, bool]:
    """The tags that are asked for, and whether pixels come after the header."""
    check_inflated(path)
    with path.open("rb") as file:
        tags = pydicom.dcmread(
            cast(BinaryIO, Watched(file, path)),
            defer_size=_LONGEST,
            stop_before_pixels=True,
            specific_tags=_WANTED,
            force=True,
        )
        pixels_next = file.read(4) in _PIXELS or _deflated(tags)
    if any(getattr(element, "length", 0) > _LONGEST for element in tags.values()):
        raise rule_codes.unusable(rule_codes.TOO_LARGE)
    return tags, pixels_next


def rows_and_columns(path: Path) -> tuple[int, int]:
    """Rows and columns of a file's frames.

    Raises
    ------
    DataError
        "not readable".
    """
    with quiet():
        try:
            tags = pydicom.dcmread(path, force=True, specific_tags=["Rows", "Columns"])
            return int(tags.Rows), int(tags.Columns)
        except Exception as error:
            raise rule_codes.unusable(rule_codes.reason_of(error)) from None


def _place(tags: pydicom.FileDataset) -> Place | None:
    try:
        return place_of(tags, 0)
    except Exception:  # numbers that are none; whoever reads the frame meets them again, and tells
        return None


def _most_frames(path: Path, tags: pydicom.FileDataset) -> int:
    """No fewer than the file can hold: of every coding, the smallest frame takes some bytes."""
    return _INFLATED if _deflated(tags) else max(1, path.stat().st_size // _FRAME)


def _take(tags: pydicom.FileDataset, name: str | int) -> str:
    found = tags.get(name)  # a private attribute comes with its tag and VR
    value = getattr(found, "value", found)
    return "" if value is None else str(value).strip()


def _numbers(tags: pydicom.FileDataset, name: str) -> tuple[float, ...]:
    try:
        return tuple(float(v) for v in tags.get(name) or ())
    except (TypeError, ValueError):
        return ()


def _deflated(header: pydicom.FileDataset) -> bool:
    # There the next bytes are compressed and tell nothing.
    syntax = header.file_meta.get("TransferSyntaxUID")
    return bool(syntax == pydicom.uid.DeflatedExplicitVRLittleEndian)
