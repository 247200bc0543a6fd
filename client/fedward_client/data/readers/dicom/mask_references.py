"""References of DICOM SEG and RTSTRUCT to images, without pixels and points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import pydicom
from pydicom.dataset import Dataset

from fedward import rule_codes
from fedward.errors import ConfigError, DataError
from fedward.plan.image_filter import accepts
from fedward.plan.schema import Task
from fedward_client.data.files import file_identity
from fedward_client.data.options import Labels, MaskOptions, PatientOptions
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.headers import Header
from fedward_client.data.readers.dicom.sniff import STRUCTURES, check_mask

Kind = Literal["segmentation", "contours"]
# The points of these lie in one plane and enclose an area (C.8.8.6.3).
CLOSED: Final = frozenset({"CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "CLOSED_PLANAR_XOR"})


@dataclass(frozen=True)
class MaskFile:
    """A file of masks, and what of it serves the task.

    Attributes
    ----------
    path : Path
        The file.
    kind : str
        "segmentation" (DICOM-SEG) or "contours" (RTSTRUCT).
    labels : tuple
        Pairs of the number of a segment or region and its label, 1 being the task's first class.
    threshold : float
        Share of its largest value at which a fractional segment counts.
    """

    path: Path
    kind: Kind
    labels: Labels
    threshold: float = 0.5

    def identity(self) -> str:
        """A digest of place, size and time of change, and of how it is read."""
        return file_identity(self.path, self.kind, self.labels, self.threshold)


@dataclass(frozen=True)
class References:
    """What a file of masks says that it is of; empty where it does not say.

    Attributes
    ----------
    patient : str
        Issuer and id, as of an image.
    series, instances, spaces : frozenset of str
        UIDs of series, of images, and of frames of reference.
    reader : str
        Who drew it; stays in memory.
    """

    patient: str
    series: frozenset[str]
    instances: frozenset[str]
    spaces: frozenset[str]
    reader: str = ""


def read_mask_file(
    path: Path,
    task: Task,
    options: MaskOptions | None = None,
    patients: PatientOptions | None = None,
) -> tuple[MaskFile, References]:
    """Read the header of a segmentation or a structure set.

    Raises
    ------
    DataError
        "unknown class in mask"; "no closed contour": no region of a class encloses anything;
        "not readable"; "too large"; "not selected": it is of a reader whose masks do not count.
    """
    options = options or MaskOptions()
    with quiet():
        try:
            check_mask(path)
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            contours = str(header.SOPClassUID) == STRUCTURES
            found = list(_regions(header) if contours else _segments(header))
            labels = options.labels(found, task.classes)
            of = _of_structures(header, dict(labels)) if contours else _of_segmentation(header)
            whose = _patient(header, patients or PatientOptions())
            of = replace(of, patient=whose, reader=_reader(header))
        except ConfigError:
            raise
        except Exception as error:
            # pydicom raises nearly anything on a broken file, and its texts quote values.
            raise rule_codes.unusable(rule_codes.reason_of(error)) from None
    if not accepts({"reader": options.readers}, {"reader": [of.reader] if of.reader else []}):
        raise rule_codes.unusable(rule_codes.NOT_SELECTED)
    kind: Kind = "contours" if contours else "segmentation"
    return MaskFile(path, kind, labels, options.threshold), of


def link(
    files: Sequence[tuple[MaskFile, References]], headers: Sequence[Header]
) -> tuple[dict[str, tuple[MaskFile, ...]], list[MaskFile]]:
    """The files of each series by its UID, and those that are of no image here.

    A file is of the series that it names; where none of these is here, of those with an image
    that it names; else of those of its patient in its frame of reference.
    """
    known: dict[str, Mapping[str, set[str]]] = {
        "series": defaultdict(set),
        "instances": defaultdict(set),
        "spaces": defaultdict(set),
    }
    for header in headers:
        if uid := header.keys["seriesinstanceuid"]:
            known["series"][uid].add(uid)
            known["instances"][header.keys["sopinstanceuid"]].add(uid)
            known["spaces"][header.patient + "\0" + header.space].add(uid)
    served: dict[str, tuple[MaskFile, ...]] = {}
    idle = []
    for file, of in files:
        spaces = [of.patient + "\0" + space for space in of.spaces]
        asked = (("series", of.series), ("instances", of.instances), ("spaces", spaces))
        found = next(filter(None, (_all(known[name], uids) for name, uids in asked)), [])
        for uid in found:
            served[uid] = (*served.get(uid, ()), file)
        if not found:
            idle.append(file)
    return served, idle


def of_several_readers(
    files: Sequence[tuple[MaskFile, References]], served: Mapping[str, Sequence[MaskFile]]
) -> frozenset[str]:
    """The series of which several readers drew one class; who is not named is nobody else."""
    reader = {file.path: of.reader for file, of in files}
    several = set()
    for uid, own in served.items():
        drawn: dict[int, set[str]] = defaultdict(set)
        for file in own:
            for _, label in file.labels:
                drawn[label] |= {reader[file.path]} - {""}
        if any(len(readers) > 1 for readers in drawn.values()):
            several.add(uid)
    return frozenset(several)


def _reader(header: Dataset) -> str:
    names = ("ContentCreatorName", "ReviewerName", "OperatorsName")
    found = (str(header.get(name) or "").strip() for name in names)
    return next(filter(None, found), "").casefold()


def _all(known: Mapping[str, set[str]], uids: Iterable[str]) -> list[str]:
    return sorted({series for uid in uids if uid in known for series in known[uid]})


def _segments(header: Dataset) -> Iterator[tuple[int, str]]:
    for one in header.SegmentSequence:
        yield int(one.SegmentNumber), str(one.SegmentLabel)


def _regions(header: Dataset) -> Iterator[tuple[int, str]]:
    for one in header.StructureSetROISequence:
        yield int(one.ROINumber), str(one.get("ROIName") or "")


def _of_segmentation(header: Dataset) -> References:
    series = _uids(header.get("ReferencedSeriesSequence"), "SeriesInstanceUID")
    instances = set()
    if not series:
        groups = [*(header.get("SharedFunctionalGroupsSequence") or [])[:1]]
        groups += header.get("PerFrameFunctionalGroupsSequence") or []
        for group in groups:
            for derived in group.get("DerivationImageSequence") or []:
                instances |= _uids(derived.get("SourceImageSequence"), "ReferencedSOPInstanceUID")
    spaces = {str(header.get("FrameOfReferenceUID") or "")}
    return _references(series, instances, spaces)


def _of_structures(header: Dataset, labels: Mapping[int, int]) -> References:
    spaces = {str(header.get("FrameOfReferenceUID") or "")}
    series: set[str] = set()
    for space in header.get("ReferencedFrameOfReferenceSequence") or []:
        spaces.add(str(space.get("FrameOfReferenceUID") or ""))
        for study in space.get("RTReferencedStudySequence") or []:
            series |= _uids(study.get("RTReferencedSeriesSequence"), "SeriesInstanceUID")
    spaces |= _uids(header.StructureSetROISequence, "ReferencedFrameOfReferenceUID")
    instances, closed = set(), 0
    for _, contour in contours_of(header, labels):
        closed += 1
        instances |= _uids(contour.get("ContourImageSequence"), "ReferencedSOPInstanceUID")
    if not closed:
        raise rule_codes.unusable(rule_codes.NO_CONTOURS)
    return _references(series, instances, spaces)


def contours_of(header: Dataset, labels: Mapping[int, int]) -> Iterator[tuple[int, Dataset]]:
    """The closed contours of the regions that are of a class, after their region's number."""
    for region in header.get("ROIContourSequence") or []:
        if (number := int(region.ReferencedROINumber)) in labels:
            for contour in region.get("ContourSequence") or []:
                if str(contour.get("ContourGeometricType") or "").upper() in CLOSED:
                    yield number, contour


def _uids(items: Iterable[Dataset] | None, name: str) -> set[str]:
    return {str(item.get(name) or "") for item in items or []} - {""}


def _references(series: set[str], instances: set[str], spaces: set[str]) -> References:
    return References("", frozenset(series), frozenset(instances - {""}), frozenset(spaces - {""}))


def _patient(header: Dataset, options: PatientOptions) -> str:
    names = ("IssuerOfPatientID", "PatientID", "StudyInstanceUID")
    try:
        return "\\".join(options.patient({n.lower(): str(header.get(n) or "") for n in names}))
    except DataError:
        return ""  # it can still name its images
