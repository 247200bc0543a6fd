"""What is known of one file after it was read once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FileFormat = Literal["dicom", "nifti", "picture", "npz", "table", "other"]


@dataclass(frozen=True)
class FileFacts:
    """One file. Whatever names a person or a file is a keyed hash or absent.

    Attributes
    ----------
    path : str
        Keyed hash of the path relative to the dataset's root (kind ``path``).
    size : int
        Bytes.
    modified, changed : int
        Times of the last change of content and of the entry, ns; `modified` is -1 where the file
        could not be read to its end, which the next scan tries again.
    digest : str
        SHA-256 of the content, hex; "" when it could not be read.
    format : str
        What kind of file it is.
    reason : str
        Why it cannot serve (see :mod:`client.data.reasons`); "" when it can.
    patient, study, series, instance, accession : str
        Keyed hashes (kinds ``patient`` of issuer and id, ``studyinstanceuid``,
        ``seriesinstanceuid``, ``sopinstanceuid``, ``accessionnumber``); "" when absent.
    patientid : str
        Keyed hash of the id alone (kind ``patientid``), by which a label table may mean it.
    nobody : str
        "missing" or "shared" when the patient id stands for nobody, else "".
    person, born, alike : str
        Keyed hashes of the patient's name with birth date, of the patient with birth date, and of
        the id without case, blanks, marks and leading zeros; "" where something is absent.
    marked : str
        Masks: JSON of the pixels (structure sets: closed contours) of each segment or value by its
        number; "{}" for a mask that marks nothing, "" for what is none.
    modality, body_part, manufacturer, syntax, photometric : str
        As DICOM says; "" when absent. "other" for what is no word of the standard, and for a
        manufacturer, body part or image type with a word of the patient's name or with the id; a
        manufacturer with a caret or five digits in a row too.
    object_type : str
        Name of the SOP class, such as "CT Image Storage"; "" when absent.
    image_type : str
        The first 16 values of ImageType with ``\\`` between.
    rows, columns, frames : int
        Size; slices of a volume are its frames. 0 when unknown.
    bits : int
        Bits stored.
    spacing : tuple of float
        mm per axis, as in :class:`client.data.types.Image`, of the first frame; empty when unknown.
    thickness : float
        Slice thickness, mm; 0 when unknown.
    burned_in : str
        BurnedInAnnotation, "YES", "NO" or "".
    synthetic : bool
        The file says that it is synthetic.
    low, high : float
        Lowest and highest pixel as the modality means it (HU for CT); NaN when there is none.
    pixels : str
        SHA-256 of the decoded pixels and their shape, hex; "" when there are none.
    """

    path: str
    size: int
    modified: int
    changed: int
    digest: str = ""
    format: FileFormat = "other"
    reason: str = ""
    patient: str = ""
    study: str = ""
    series: str = ""
    instance: str = ""
    accession: str = ""
    patientid: str = ""
    nobody: str = ""
    person: str = ""
    born: str = ""
    alike: str = ""
    marked: str = ""
    modality: str = ""
    body_part: str = ""
    manufacturer: str = ""
    syntax: str = ""
    photometric: str = ""
    object_type: str = ""
    image_type: str = ""
    rows: int = 0
    columns: int = 0
    frames: int = 0
    bits: int = 0
    spacing: tuple[float, ...] = ()
    thickness: float = 0.0
    burned_in: str = ""
    synthetic: bool = False
    low: float = float("nan")
    high: float = float("nan")
    pixels: str = ""
