"""The facts of a DICOM file: whose it is by keyed hashes, what it shows in DICOM's own words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom

from client.data import reasons
from client.data.decode import frame_bytes, read_frame
from client.data.patient_options import PatientOptions
from client.data.readers.dicom_files import is_mask
from client.data.stored import open_dicom
from client.index.extract_images import LARGEST, measured
from client.index.extract_masks import segments_of
from client.index.extract_people import people
from client.index.facts import FileFacts
from client.index.terms import (
    BODY_PARTS,
    IMAGE_TYPES,
    MODALITIES,
    PHOTOMETRIC,
    YES_NO,
    Own,
    term,
)
from client.secret import Pseudonyms
from fedward.errors import DataError

_VALUES: Final = 16  # of ImageType
_WHO: Final = (
    "PatientID",
    "IssuerOfPatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "AccessionNumber",
)


def dicom_facts(
    path: Path, facts: FileFacts, hashed: Pseudonyms, patients: PatientOptions
) -> FileFacts:
    """Read header and frames of a DICOM file, one frame after another.

    Raises
    ------
    DataError
        "too large", when the header would fill the memory.
    Exception
        Whatever pydicom raises on a broken header.
    """
    header = open_dicom(path).header
    facts = replace(facts, **_who(header, hashed, patients), **_what(header))
    if is_mask(header):
        return replace(facts, marked=segments_of(path))
    if not (facts.rows and facts.columns):
        return replace(facts, reason=reasons.NO_PIXELS)
    if frame_bytes(header) * facts.frames > LARGEST:
        return replace(facts, reason=reasons.TOO_LARGE)
    try:
        frames = (read_frame(path, k).image for k in range(facts.frames))
        return measured(facts, ((i.pixels, i.spacing) for i in frames))
    except DataError as error:
        return replace(facts, reason=reasons.reason_of(error))


def _who(header: pydicom.Dataset, hashed: Pseudonyms, patients: PatientOptions) -> dict[str, Any]:
    text = {key: str(header.get(key) or "").strip() for key in _WHO}
    try:
        patient = patients.patient({key.lower(): value for key, value in text.items()})
    except DataError:
        patient = ("", "")
    return {
        "patient": hashed("patient", *patient) if patient[1] else "",
        "patientid": hashed("patientid", text["PatientID"]),
        "study": hashed("studyinstanceuid", text["StudyInstanceUID"]),
        "series": hashed("seriesinstanceuid", text["SeriesInstanceUID"]),
        "instance": hashed("sopinstanceuid", text["SOPInstanceUID"]),
        "accession": hashed("accessionnumber", text["AccessionNumber"]),
        "nobody": patients.nobody(text["PatientID"]),
        **people(header, patient, hashed, patients),
    }


def _what(header: pydicom.Dataset) -> dict[str, Any]:
    meta = getattr(header, "file_meta", {})
    image_type = header.get("ImageType") or ()
    words = [image_type] if isinstance(image_type, str) else image_type
    own, types = Own.of(header), [term(word, IMAGE_TYPES) for word in list(words)[:_VALUES]]
    return {
        "modality": term(header.get("Modality"), MODALITIES),  # of two letters, as a name may be
        "body_part": own.without(term(header.get("BodyPartExamined"), BODY_PARTS)),
        "manufacturer": own.free(header.get("Manufacturer")),
        "syntax": _uid_name(meta.get("TransferSyntaxUID")),
        "photometric": term(header.get("PhotometricInterpretation"), PHOTOMETRIC),
        "object_type": _uid_name(header.get("SOPClassUID")),
        "image_type": "\\".join(map(own.without, types)),
        "rows": _count(header.get("Rows")),
        "columns": _count(header.get("Columns")),
        "frames": max(1, _count(header.get("NumberOfFrames"))),
        "bits": _count(header.get("BitsStored")),
        "thickness": _positive(header.get("SliceThickness")),
        "burned_in": term(header.get("BurnedInAnnotation"), YES_NO),
        "synthetic": str(header.get("SyntheticData") or "").upper() == "YES",
    }


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
