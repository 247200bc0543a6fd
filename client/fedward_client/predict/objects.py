"""Predictions as DICOM objects: masks as a segmentation (SEG), figures as a structured report.

Maps that explain them are secondary captures (SC), of volumes a parametric map; the report names
them as its visual explanation.

Both belong to the patient and the study of the images, in series of their own. Their UIDs are
digests of model, release and images: the same prediction has the same UIDs, so that an archive
that gets it twice keeps it once. The report is of template TID 1500 (PS3.16); boxes stand in it as
coordinates on their image (SCOORD).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import highdicom as hd
import numpy as np
import pydicom
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr.coding import CodedConcept
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import DA, TM

from fedward.models.finished import FinishedModel
from fedward.plan.schema import Plan
from fedward_client.data.readers.dicom.pixels import open_dicom
from fedward_client.predict.inputs import DicomSource
from fedward_client.predict.run import NOT_FOR_DIAGNOSIS, Answer, measure

_SCHEME: Final = "99FEDWARD"
_NUMBERS: Final = {"seg": 9001, "sr": 9002, "sc": 9003, "pm": 9004}  # of the series
_LONG: Final = 64  # characters of LO
# Attributes that an image must have, if empty (type 2), for an object about it to have them.
_NEEDED: Final = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
_MOMENTS: Final = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
_PLANE: Final = ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")
_UNITS: Final = {
    "ml": CodedConcept("ml", "UCUM", "milliliter"),
    "mm2": CodedConcept("mm2", "UCUM", "square millimeter"),
}


@dataclass(frozen=True)
class Made:
    """An object.

    Attributes
    ----------
    kind : str
        "seg", "sr", "sc" or "pm"; of further images of one file "sc2" and so on.
    file : bytes
        The whole file.
    """

    kind: str
    file: bytes


@dataclass(frozen=True)
class Shown:
    """Maps that explain the answers of one input.

    Attributes
    ----------
    name : str
        What they are: a method, or "uncertainty".
    classes : tuple
        For each answer the class that is explained; None: all.
    maps : tuple of NDArray
        Of each answer, 0 to 255 on the decoded image, uint8.
    pictures : tuple of NDArray
        Of single images each with its map over it, ``(H, W, 3)`` uint8.
    """

    name: str
    classes: tuple[str | None, ...]
    maps: tuple[NDArray[np.uint8], ...]
    pictures: tuple[NDArray[np.uint8], ...]


def make_objects(
    model: FinishedModel,
    source: DicomSource,
    answers: Sequence[Answer],
    marks: tuple[str, ...],
    shown: Shown | None = None,
) -> tuple[list[Made], list[str]]:
    """The objects of one input, and in words which one the image does not allow.

    Parameters
    ----------
    model : FinishedModel
        What predicted.
    source : DicomSource
        The images.
    answers : sequence of Answer
        Of each image.
    marks : tuple of str
        Why the prediction is doubtful.
    shown : Shown, optional
        Maps that explain it.
    """
    made: list[Made] = []
    wrong: list[str] = []
    author = _Author(model, source, marks, shown)
    segmentation = None
    if model.plan.task.spec.dense and source.header.frames > 1 and not author.placed:
        wrong.append("no SEG can be made of the image: its frames do not say where they lie")
    elif model.plan.task.spec.dense:
        with _tried("SEG", wrong):
            segmentation = _segmentation(author, source, answers)
            made.append(Made("seg", _bytes(segmentation)))
    views: list[Dataset] = []
    if shown is not None and source.volume and not author.placed:
        wrong.append("no parametric map can be made of the image: it does not say where it lies")
    elif shown is not None:
        with _tried("map", wrong):
            views = _views(author, source, shown)
            kind = "pm" if source.volume else "sc"
            names = [kind if k == 1 else f"{kind}{k}" for k in range(1, len(views) + 1)]
            made += [Made(k, _bytes(one)) for k, one in zip(names, views, strict=True)]
    with _tried("SR", wrong):
        made.append(Made("sr", _bytes(_report(author, source, answers, segmentation, views))))
    return made, wrong


@contextmanager
def _tried(kind: str, wrong: list[str]) -> Iterator[None]:
    """Note that an object could not be made: highdicom asks for more than images may have."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        wrong.append(f"no {kind} can be made of the image ({type(error).__name__})")


class _Author:
    """What all objects of one input say of the model, and their UIDs."""

    def __init__(
        self,
        model: FinishedModel,
        source: DicomSource,
        marks: tuple[str, ...],
        shown: Shown | None,
    ) -> None:
        self.model, self.plan, self.marks, self.shown = model, model.plan, marks, shown
        self.images = _headers(source)
        self.first = next(iter(self.images.values()))
        told = "PerFrameFunctionalGroupsSequence" in self.first or source.header.frames == 1
        self.placed = told and "FrameOfReferenceUID" in self.first  # the images say where they lie
        self.release = version("fedward")
        self._of = [model.sha256, self.release, *marks]
        if shown is not None:
            self._of += [shown.name, *(one or "" for one in shown.classes)]

    def uid(self, *parts: str) -> str:
        """A UID that follows from the model, the release, the marks and these parts."""
        return str(pydicom.uid.generate_uid(entropy_srcs=[*self._of, *parts]))

    def facts(self, kind: str) -> dict[str, Any]:
        """What each object says of itself, as highdicom takes it."""
        images = sorted(str(one.SOPInstanceUID) for one in self.images.values())
        return {
            "series_instance_uid": self.uid(kind, str(self.first.SeriesInstanceUID)),
            "series_number": _NUMBERS[kind],
            "sop_instance_uid": self.uid(kind, *images),
            "instance_number": max(1, int(self.first.get("InstanceNumber") or 1)),
            "manufacturer": "Fedward",
            "manufacturer_model_name": self.plan.study.name[:_LONG],
            "software_versions": self.release,
            "device_serial_number": self.model.sha256,
            "series_description": f"{NOT_FOR_DIAGNOSIS} {self.plan.study.name}"[:_LONG],
            "content_qualification": hd.ContentQualificationValues.RESEARCH,
            "coding_schemes": [
                CodingSchemeIdentificationItem(_SCHEME, name="Classes of a Fedward study plan")
            ],
        }

    def parameters(self) -> dict[str, str]:
        """What an algorithm's identification says besides its name and version."""
        told = {"Plan SHA-256": self.model.plan_sha256, "Use": NOT_FOR_DIAGNOSIS}
        return told | ({"Remarks": "; ".join(self.marks)} if self.marks else {})

    def concept(self, name: str) -> CodedConcept:
        """A class of the plan as a code: its number, with which its name comes."""
        number = self.plan.task.classes.index(name)
        return CodedConcept(f"{self.model.plan_sha256[:12]}{number:04d}", _SCHEME, name[:_LONG])


def _headers(source: DicomSource) -> dict[Path, Dataset]:
    """The images' attributes without pixels, as highdicom takes them for one series.

    What objects must have is there, if empty. Orientation and spacing are those of the first
    image, from which writers let the others differ by a rounding.
    """
    found = {path: _header(path) for path in dict.fromkeys(path for path, _ in source.used)}
    first = next(iter(found.values()))
    if source.header.frames > 1:
        _share(first, source.used[0][1])
        return found
    for header in found.values():
        if not all(header.get(name) for name in _PLANE):  # in no space in which anything could lie
            header.pop("FrameOfReferenceUID", None)
            continue
        header.ImageOrientationPatient = first.ImageOrientationPatient
        header.PixelSpacing = first.PixelSpacing
        header.SliceThickness = first.get("SliceThickness") or source.step
    return found


def _header(path: Path) -> Dataset:
    opened = open_dicom(path).header
    header = Dataset()
    header.update(opened)
    header.file_meta = opened.file_meta
    for name in _NEEDED:
        known = _MOMENTS.get(name)
        if name not in header:
            setattr(header, name, None if known else "")
        elif known and not _is_moment(known, header.get(name)):
            setattr(header, name, None)  # of another form than the standard's: as if not stated
    return header


def _is_moment(kind: Callable[[str], object], value: object) -> bool:
    try:
        return bool(kind(str(value or "")))
    except ValueError:
        return False


def _share(header: Dataset, frame: int) -> None:
    """Tell plane and spacing of a multi-frame file for all frames, where each frame tells them."""
    shared, each = Dataset(), header.get("PerFrameFunctionalGroupsSequence")
    for one in header.get("SharedFunctionalGroupsSequence") or []:
        shared.update(one)
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if name not in shared and each and name in each[frame]:
            shared[name] = each[frame][name]
    if len(shared):
        header.SharedFunctionalGroupsSequence = [shared]


# Segmentation.


def _segmentation(
    author: _Author, source: DicomSource, answers: Sequence[Answer]
) -> hd.seg.Segmentation:
    planes = source.planes([one.labels for one in answers if one.labels is not None])
    images = list(author.images.values())
    if source.header.frames > 1:  # one object with all frames, of which the stack may be some
        whole = np.zeros((source.header.frames, *planes.shape[1:]), np.uint8)
        whole[[frame for _, frame in source.used]] = planes
        planes = whole
    facts = author.facts("seg")
    tool = hd.AlgorithmIdentificationSequence(
        name=author.plan.study.name[:_LONG],
        family=codes.DCM.ArtificialIntelligence,
        version=author.model.sha256,
        source="Fedward",
        parameters=author.parameters(),
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:_LONG],
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=author.concept(name),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=tool,
            tracking_uid=author.uid("segment", facts["sop_instance_uid"], name),
            tracking_id=name[:_LONG],
        )
        for number, name in enumerate(author.plan.task.classes, start=1)
    ]
    made = hd.seg.Segmentation(
        source_images=images,
        pixel_array=planes,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        content_label="NOT_DIAGNOSTIC",
        content_description=f"{NOT_FOR_DIAGNOSIS} Plan {author.model.plan_sha256[:12]}",
        omit_empty_frames=bool(planes.any()),
        **facts,
    )
    if not author.placed:  # then a general image must have it, if empty (PS3.3, C.7.6.1)
        made.PatientOrientation = author.first.get("PatientOrientation") or None
    return made


# Maps that explain an answer.


def _views(author: _Author, source: DicomSource, shown: Shown) -> list[Dataset]:
    if source.volume:
        made = [_parametric_map(author, source, shown)]
    else:
        numbers = range(len(shown.pictures))
        made = [_capture(author, source, shown, number) for number in numbers]
    for one in made:  # a series must have it, if empty, whatever part of the body it shows
        one.Laterality = author.first.get("Laterality") or None
    return made


def _capture(author: _Author, source: DicomSource, shown: Shown, number: int) -> hd.sc.SCImage:
    """The image with its map over it, as any viewer shows it, and says what it is."""
    facts = author.facts("sc")
    del facts["content_qualification"]  # a secondary capture has none
    facts["sop_instance_uid"] = author.uid("sc", *_instances(author, source, number))
    facts["instance_number"] = number + 1
    path, frame = source.used[number]
    image = author.images[path]
    made = hd.sc.SCImage.from_ref_dataset(
        image,
        _labelled(shown.pictures[number]),
        hd.PhotometricInterpretationValues.RGB,
        8,
        hd.CoordinateSystemNames.PATIENT,
        patient_orientation=_orientation(image),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **facts,
    )
    what = shown.classes[number]
    told = f"{NOT_FOR_DIAGNOSIS} {shown.name}" + (f" of {what}" if what else "")
    made.DerivationDescription = told[:1024]
    made.ImageComments = "; ".join(f"{k}: {v}" for k, v in author.parameters().items())
    made.BurnedInAnnotation = "YES"
    origin = Dataset()
    origin.ReferencedSOPClassUID = image.SOPClassUID
    origin.ReferencedSOPInstanceUID = image.SOPInstanceUID
    if source.header.frames > 1:
        origin.ReferencedFrameNumber = frame + 1
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    origin.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(purpose)]
    made.SourceImageSequence = [origin]
    return made


def _orientation(image: Dataset) -> tuple[str, str]:
    """Where rows and columns run, as the image says; else as frontal radiographs are shown."""
    told = tuple(image.get("PatientOrientation") or ())
    return told if len(told) == 2 else ("L", "F")


def _labelled(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    drawn = Pillow.fromarray(picture)
    ImageDraw.Draw(drawn).text((2, 2), NOT_FOR_DIAGNOSIS, fill=(255, 255, 255))
    return np.asarray(drawn)


def _parametric_map(author: _Author, source: DicomSource, shown: Shown) -> hd.pm.ParametricMap:
    images, planes = list(author.images.values()), source.planes(shown.maps)
    if source.header.frames > 1:
        whole = np.zeros((source.header.frames, *planes.shape[1:]), np.uint8)
        whole[[frame for _, frame in source.used]] = planes
        planes = whole
    name = CodedConcept("MAP", _SCHEME, shown.name[:_LONG])
    scale = hd.pm.RealWorldValueMapping(
        lut_label="MAP",
        lut_explanation=shown.name[:_LONG],
        unit=codes.UCUM.NoUnits,
        value_range=(0, 255),
        slope=1 / 255,
        intercept=0.0,
        quantity_definition=name,
    )
    return hd.pm.ParametricMap(
        source_images=images,
        pixel_array=planes.astype(np.uint16),  # integers have 16 bits there
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[scale],
        window_center=127.5,
        window_width=256,
        content_label="NOT_DIAGNOSTIC",
        content_description=f"{NOT_FOR_DIAGNOSIS} {shown.name}"[:_LONG],
        **author.facts("pm"),
    )


# Structured report.


def _report(
    author: _Author,
    source: DicomSource,
    answers: Sequence[Answer],
    segmentation: hd.seg.Segmentation | None,
    views: Sequence[Dataset],
) -> hd.sr.EnhancedSR:
    facts = author.facts("sr")
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=author.uid("device"),
        name=author.plan.study.name[:_LONG],
        manufacturer_name="Fedward",
        model_name=author.plan.study.name[:_LONG],
        serial_number=author.model.sha256,
    )
    context = hd.sr.ObservationContext(
        observer_device_context=hd.sr.ObserverContext(codes.DCM.Device, device)
    )
    groups = [
        group
        for number, answer in enumerate(answers)
        for group in _groups(author, source, number, answer, segmentation, views)
    ]
    content = hd.sr.MeasurementReport(
        observation_context=context,
        procedure_reported=CodedConcept("363679005", "SCT", "Imaging"),
        imaging_measurements=groups,
    )
    evidence = [*author.images.values(), *([segmentation] if segmentation else []), *views]
    return hd.sr.EnhancedSR(
        evidence=evidence,
        content=content[0],
        is_complete=True,
        is_final=False,
        is_verified=False,
        **facts,
    )


def _groups(
    author: _Author,
    source: DicomSource,
    number: int,
    answer: Answer,
    segmentation: hd.seg.Segmentation | None,
    views: Sequence[Dataset],
) -> Iterator[Any]:
    """A measurement group (TID 1501, or 1411 with a segment) for each class of an image."""
    plan = author.plan
    tool = hd.sr.AlgorithmIdentification(
        name=plan.study.name,
        version=author.model.sha256,
        parameters=[f"{key}: {value}" for key, value in author.parameters().items()],
    )
    for place, name in enumerate(plan.task.classes):
        identity = hd.sr.TrackingIdentifier(
            uid=author.uid("group", *_instances(author, source, number), name), identifier=name
        )
        shared: Mapping[str, Any] = {
            "tracking_identifier": identity,
            "finding_type": author.concept(name),
            "algorithm_id": tool,
            "measurements": [_measurement(plan, answer, place)],
            "qualitative_evaluations": [
                hd.sr.QualitativeEvaluation(
                    CodedConcept("USE", _SCHEME, "Intended use"),
                    CodedConcept("NOTDIAGNOSTIC", _SCHEME, NOT_FOR_DIAGNOSIS),
                )
            ],
        }
        if segmentation is not None and source.volume and answer.voxels[place]:
            segment = hd.sr.ReferencedSegment.from_segmentation(segmentation, place + 1)
            group = hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                **shared, referenced_segment=segment
            )
            yield _with_view(author, group, number, name, views)
            continue
        images = _references(author, source, number)
        group = hd.sr.MeasurementsAndQualitativeEvaluations(**shared, source_images=images)
        yield _with_view(author, group, number, name, views)
        for count, (region, score) in enumerate(_regions(author, source, number, answer, place)):
            uid = author.uid("box", *_instances(author, source, number), name, str(count))
            told = hd.sr.Measurement(codes.DCM.Probability, score, codes.UCUM.NoUnits)
            own = {
                "tracking_identifier": hd.sr.TrackingIdentifier(uid=uid, identifier=name),
                "measurements": [told],
            }
            yield hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
                **{**shared, **own}, referenced_region=region
            )


def _with_view(
    author: _Author, group: Any, number: int, name: str, views: Sequence[Dataset]
) -> Any:
    """A group of a class that names the map of its image, where that explains the class."""
    if author.shown is not None and views and author.shown.classes[number] in (None, name):
        view = views[number]
        group[0].ContentSequence.append(
            hd.sr.ImageContentItem(
                name=codes.DCM.VisualExplanation,
                referenced_sop_class_uid=view.SOPClassUID,
                referenced_sop_instance_uid=view.SOPInstanceUID,
                relationship_type=hd.sr.RelationshipTypeValues.CONTAINS,
            )
        )
    return group


def _regions(
    author: _Author, source: DicomSource, number: int, answer: Answer, place: int
) -> Iterator[tuple[hd.sr.ImageRegion, float]]:
    """Each box of a class as a closed line, with its score.

    Coordinates are (column, row), and 0 is the outer border of the first pixel (PS3.3,
    C.18.6.1.2), as of the corners of boxes.
    """
    if answer.boxes is None:
        return
    path, frame = source.used[number]
    image = hd.sr.SourceImageForRegion(
        referenced_sop_class_uid=author.images[path].SOPClassUID,
        referenced_sop_instance_uid=author.images[path].SOPInstanceUID,
        referenced_frame_numbers=[frame + 1] if source.header.frames > 1 else None,
    )
    for corners, score, kind in zip(*answer.boxes, strict=True):
        if kind == place:
            top, left, bottom, right = map(float, corners)
            line = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
            region = hd.sr.ImageRegion(
                hd.sr.GraphicTypeValues.POLYLINE, np.array(line), source_image=image
            )
            yield region, float(score)


def _measurement(plan: Plan, answer: Answer, place: int) -> hd.sr.Measurement:
    if answer.boxes is not None:
        count = CodedConcept("COUNT", _SCHEME, "Number of boxes")
        boxes = CodedConcept("{boxes}", "UCUM", "boxes")
        return hd.sr.Measurement(count, int((answer.boxes[2] == place).sum()), boxes)
    if answer.labels is None:
        value = float(answer.probabilities[place])
        return hd.sr.Measurement(codes.DCM.Probability, value, codes.UCUM.NoUnits)
    unit, factor = measure(plan)
    kind = codes.SCT.Volume if plan.task.dimensions == 3 else codes.SCT.Area
    if answer.size is None:
        pixels = CodedConcept("{pixels}", "UCUM", "pixels")
        return hd.sr.Measurement(kind, float(answer.voxels[place]), pixels)
    return hd.sr.Measurement(kind, answer.voxels[place] * answer.size * factor, _UNITS[unit])


def _instances(author: _Author, source: DicomSource, number: int) -> list[str]:
    """Which image an answer is about."""
    if source.volume:
        return sorted(str(one.SOPInstanceUID) for one in author.images.values())
    path, frame = source.used[number]
    return [str(author.images[path].SOPInstanceUID), str(frame)]


def _references(author: _Author, source: DicomSource, number: int) -> list[Any]:
    used = source.used if source.volume else source.used[number : number + 1]
    frames: dict[Path, list[int]] = {}
    for path, frame in used:
        frames.setdefault(path, []).append(frame + 1)
    several = source.header.frames > 1
    return [
        hd.sr.SourceImageForMeasurementGroup(
            referenced_sop_class_uid=author.images[path].SOPClassUID,
            referenced_sop_instance_uid=author.images[path].SOPInstanceUID,
            referenced_frame_numbers=numbers if several else None,
        )
        for path, numbers in frames.items()
    ]


def _bytes(made: Dataset) -> bytes:
    file = io.BytesIO()
    made.save_as(file)
    return file.getvalue()
