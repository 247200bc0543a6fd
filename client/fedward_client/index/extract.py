"""Extract the index facts of one file: bytes, header and pixels, without identifying values."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image as Pillow

from fedward import rule_codes
from fedward.errors import DataError
from fedward_client.data.files import MASK_FOLDERS, is_hidden, stem
from fedward_client.data.options import PatientOptions
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.mask_references import contours_of
from fedward_client.data.readers.dicom.pixels import (
    frame_bytes,
    frame_values,
    open_dicom,
    read_frame,
    stored_values,
)
from fedward_client.data.readers.dicom.sniff import STRUCTURES, check_mask, is_dicom, is_mask
from fedward_client.data.readers.images import PictureMask
from fedward_client.data.readers.images import is_mask as is_mask_picture
from fedward_client.data.readers.nifti import NiftiMask, in_mm
from fedward_client.data.readers.registry import Format
from fedward_client.secret import Pseudonyms
from fedward_client.worker_pool import take_longer

# Words of DICOM that name nobody, and what is left of a file's own words beside them.
#
# A code string may hold anything that a user typed at a scanner, a name too; so of these fields
# only the standard's own words are kept.

OTHER: Final = "other"
_NUMBER: Final = re.compile(r"[0-9]{5}")  # could be a date, or part of an id
_LONGEST: Final = 64  # letters of a free text that is kept
_WITHIN: Final = 4  # letters of a word that is sought within others


def _these(words: str) -> frozenset[str]:
    return frozenset(words.split())


# PS3.3, C.7.3.1.1.1, with retired ones.
MODALITIES: Final = _these("""
    ANN AR ASMT AU BDUS BI BMD CFM CR CT CTPROTOCOL DG DMS DOC DX ECG EEG EMG EOG EPS ES FID GM HC
    HD IO IOL IVOCT IVUS KER KO LEN LS M3D MG MR NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PA
    PLAN POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN
    RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC AS CD CF CP CS DD DF
    DM DS EC FA FS LP MA MS OPR ST TE VF
""")

# PS3.16, Annex L; compared without blanks and marks.
BODY_PARTS: Final = _these("""
    ABDOMEN ABDOMENPELVIS ADRENAL ANKLE ANUS AORTA APPENDIX ARM AXILLA BACK BILEDUCT BLADDER BRAIN
    BREAST BRONCHUS BUTTOCK CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN
    CHESTABDPELVIS CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA CORONARYARTERY CSPINE CTSPINE
    DUODENUM EAR ELBOW ENTIREBODY ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FIBULA FINGER FOOT
    FOREARM GALLBLADDER GROIN HAND HEAD HEADNECK HEART HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM
    KIDNEY KNEE LARYNX LEG LIVER LSPINE LSSPINE LUNG MANDIBLE MAXILLA MEDIASTINUM MOUTH NECK
    NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE ORBIT OVARY PANCREAS PARANASALSINUS PAROTID
    PATELLA PELVIS PENIS PHARYNX PROSTATE RADIUS RECTUM RIB SACRUM SCALP SCAPULA SCLERA SCROTUM
    SHOULDER SINUS SIJOINT SKIN SKULL SPINE SPLEEN SSPINE STERNUM STOMACH SUBMANDIBULAR TESTIS
    THIGH THORAX THUMB THYMUS THYROID TIBIA TLSPINE TMJ TOE TONGUE TOOTH TRACHEA TSPINE ULNA
    UPPERARM URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA
""")

# PS3.3, C.7.6.1.1.2 and the modules that add to it; compared likewise.
IMAGE_TYPES: Final = _these("""
    ORIGINAL DERIVED MIXED PRIMARY SECONDARY OTHER NONE AXIAL LOCALIZER SCOUT MOSAIC MPR MIP MINIP
    REFORMATTED PROJECTIONIMAGE PROJECTION SINGLEPLANE SINGLEA SINGLEB BIPLANEA BIPLANEB SUBTRACTION
    VOLUME RESAMPLED FILTERED ADDITION MULTIPLICATION DIVISION MASKED MEAN STDDEVIATION QUANTITY
    MAXIMUM MINIMUM CYLINDRICAL SPHERICAL STACK PERFUSION DIFFUSION DIFFUSIONANISO ADC FA TRACE TTP
    MTT CBF RCBF CBV RCBV VELOCITY PHASE MAGNITUDE REAL IMAGINARY PHASEMAP M P R I SE GR IR FFE TOF
    ANGIO FLOW FLUOROSCOPY DYNAMIC CINE STATIC WHOLEBODY TOMO GATED RECONTOMO RECONGATEDTOMO
    EMISSION TRANSMISSION ATTENUATION FUSION FUSED ENERGYPROP FREQUENCY METABOLITEMAP OBSTETRICAL
    SMALLPARTS EPICARDIAL CARDIOLOGY TEE TTE ABDOM ABDOMRAD PRESENTATION LABEL OVERVIEW THUMBNAIL
    T1 T2 T2STAR PROTONDENSITY WATER FAT INPHASE OUTPHASE SUM COMPRESSED UNCOMPRESSED NORM ND
    DISCRETE SPECTROSCOPY MAP RGB POSTCONTRAST PRECONTRAST MONOENERGETIC
""")

PHOTOMETRIC: Final = _these("""
    MONOCHROME1 MONOCHROME2 PALETTECOLOR RGB YBRFULL YBRFULL422 YBRPARTIAL420 YBRPARTIAL422 YBRICT
    YBRRCT XYB HSV ARGB CMYK
""")

YES_NO: Final = frozenset({"YES", "NO"})


def term(value: object, known: frozenset[str]) -> str:
    """A value as it stands if it is one of the known words, "other" if not; "" stays ""."""
    text = str(value or "").strip()
    return text if not text or _alphanumeric(text).upper() in known else OTHER


@dataclass(frozen=True)
class Own:
    """What names the patient of a file: the words of the name, and the id."""

    words: frozenset[str]
    number: str

    @classmethod
    def of(cls, header: pydicom.Dataset) -> Self:
        """Of the file with this header."""
        name = str(header.get("PatientName") or "").casefold()
        return cls(
            frozenset(_words(name)), _alphanumeric(str(header.get("PatientID") or "")).casefold()
        )

    def without(self, text: str) -> str:
        """A text, or "other" where it holds a word of the name, or the id."""
        low, bare = text.casefold(), _alphanumeric(text).casefold()
        words = set(_words(low))
        inside = any(len(word) >= _WITHIN and word in bare for word in self.words)
        same = self.number in words or (len(self.number) >= _WITHIN and self.number in bare)
        return OTHER if inside or same or words & self.words else text

    def free(self, value: object) -> str:
        """A free text, shortened, or "other" where it could be somebody's name or number."""
        text = str(value or "").strip()[:_LONGEST]
        return OTHER if "^" in text or _NUMBER.search(text) else self.without(text)


def _words(text: str) -> Iterable[str]:
    # One letter tells nothing, and stands in the name of many a maker.
    return (word for word in re.findall(r"[^\W_]+", text) if len(word) > 1)


def _alphanumeric(text: str) -> str:
    return "".join(letter for letter in text if letter.isalnum())


# What is known of one file after it was read once.

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
        Why it cannot serve (see :mod:`fedward.rule_codes`); "" when it can.
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
        mm per axis, as in :class:`Image`, of the first frame; empty if unknown.
    thickness : float
        Slice thickness, mm; 0 when unknown.
    burned_in : str
        BurnedInAnnotation, "YES", "NO" or "".
    identity_removed, visual_features : str
        PatientIdentityRemoved and RecognizableVisualFeatures, likewise.
    method : bool
        The file says how it was de-identified (DeidentificationMethod, or a sequence of codes).
    intent : str
        PresentationIntentType: "FOR PRESENTATION", "FOR PROCESSING" or "".
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
    identity_removed: str = ""
    visual_features: str = ""
    method: bool = False
    intent: str = ""
    synthetic: bool = False
    low: float = float("nan")
    high: float = float("nan")
    pixels: str = ""


# Keyed hashes by which one person under two ids, or two under one, is found out.


def people(
    header: pydicom.Dataset, patient: tuple[str, str], hashed: Pseudonyms, options: PatientOptions
) -> dict[str, str]:
    """Hashes of name with birth date, of birth date with id, and of the id as it may be misspelt.

    Parameters
    ----------
    header : Dataset
        The file's.
    patient : tuple of str
        Issuer and id by the site's rule; ("", "") for nobody.
    hashed : Pseudonyms
        The site's.
    options : PatientOptions
        Names that are on its list of shared ids are nobody's.
    """
    name, born = (str(header.get(key) or "").strip() for key in ("PatientName", "PatientBirthDate"))
    own = str(header.get("PatientID") or "")
    known = bool(patient[1]) and not options.nobody(own)
    named = bool(_bare(name)) and not options.nobody(name.replace("^", " "))
    return {
        "person": hashed("person", _bare(name), born) if known and named and born else "",
        "born": hashed("born", *patient, born) if patient[1] and born else "",
        "alike": hashed("alike", _bare(own).lstrip("0")) if known else "",
    }


def _bare(text: str) -> str:
    """Without case, blanks and marks."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


# How much each segment of a mask marks: the class balance of a segmentation task.


def segments_of(path: Path) -> str:
    """Pixels that each segment marks (closed contours of each region), by number, as JSON.

    Raises
    ------
    DataError
        "too large".
    Exception
        Whatever pydicom and decoders raise.
    """
    check_mask(path)
    opened = open_dicom(path)
    header = opened.header
    if str(header.SOPClassUID) == STRUCTURES:
        every = {int(one.ROINumber): 1 for one in header.StructureSetROISequence}
        return _text(Counter(number for number, _ in contours_of(header, every)))
    frames = int(header.get("NumberOfFrames") or 1)
    if frame_bytes(header) > LARGEST:
        raise rule_codes.unusable(rule_codes.TOO_LARGE)
    take_longer(frame_values(header) * frames)
    marked: Counter[int] = Counter()
    for number in range(frames):
        values = stored_values(opened, number)
        if str(header.get("SegmentationType", "")).upper() == "LABELMAP":
            marked += _values(values)
        else:
            marked[_segment(header, number)] += int(np.count_nonzero(values))
    return _text(marked)


def values_of(pixels: NDArray[Any]) -> str:
    """Pixels of each value above 0 in a label map, as JSON."""
    return _text(_values(pixels))


def _values(pixels: NDArray[Any]) -> Counter[int]:
    values, counts = np.unique(pixels, return_counts=True)
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return Counter({int(value): int(n) for value, n in pairs if value > 0})


def _segment(header: pydicom.Dataset, frame: int) -> int:
    shared = (header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    group = header.PerFrameFunctionalGroupsSequence[frame]
    owner = group if "SegmentIdentificationSequence" in group else shared
    return int(owner.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def _text(counts: Counter[int]) -> str:
    return json.dumps({str(number): counts[number] for number in sorted(counts)})


# The facts of NIfTI volumes, pictures and npz archives, and of any decoded pixels.

LARGEST: Final = 8 << 30  # bytes that what is decoded at once may take


def nifti_facts(path: Path, facts: FileFacts) -> FileFacts:
    """Header and range of a NIfTI volume; slices are its frames.

    Raises
    ------
    Exception
        Whatever nibabel raises on a broken file.
    """
    image: Any = nib.load(path)
    shape, unit = image.shape, in_mm(image)
    zooms = tuple(float(z) * unit for z in image.header.get_zooms()[:3])
    facts = replace(
        facts,
        rows=shape[0],
        columns=shape[1] if len(shape) > 1 else 1,
        frames=math.prod(shape[2:]),
        bits=image.get_data_dtype().itemsize * 8,
    )
    if 8 * math.prod(shape) > LARGEST:
        return replace(facts, reason=rule_codes.TOO_LARGE)
    take_longer(2 * math.prod(shape))  # of a mask the values are counted too
    return measured(facts, [(np.asanyarray(image.dataobj), zooms)])


def picture_facts(path: Path, facts: FileFacts) -> FileFacts:
    """Size and range of a PNG, JPEG, TIFF or BMP; never decoded when Pillow calls it a bomb.

    Raises
    ------
    Exception
        Whatever Pillow raises on a broken file.
    """
    try:
        with Pillow.open(path) as image:
            facts = replace(facts, rows=image.height, columns=image.width, frames=1)
            pixels = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    except Pillow.DecompressionBombError:
        return replace(facts, reason=rule_codes.TOO_LARGE)
    bits = 8 * pixels.dtype.itemsize
    return measured(replace(facts, bits=bits), [(pixels, (1.0, 1.0))])


def npz_facts(path: Path, facts: FileFacts) -> FileFacts:
    """Whether an archive opens and is not larger than it may be; its arrays are not looked at.

    Raises
    ------
    BadZipFile
        It is no archive, or is cut off.
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    return replace(facts, reason=rule_codes.TOO_LARGE if size > LARGEST else "")


def measured(
    facts: FileFacts, parts: Iterable[tuple[NDArray[Any], tuple[float, ...]]]
) -> FileFacts:
    """The facts with range, spacing and hash of the decoded pixels.

    Parameters
    ----------
    facts : FileFacts
        What is known so far.
    parts : iterable of (NDArray, tuple of float)
        Frames and their spacing in mm; only one is held at a time.
    """
    digest, low, high = hashlib.sha256(), math.inf, -math.inf
    spacing: tuple[float, ...] = ()
    for place, (pixels, mm) in enumerate(parts):
        spacing = spacing if place else mm
        digest.update(repr((pixels.shape, pixels.dtype.str)).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        if pixels.size:
            ends = _ends(pixels)
            low, high = min(low, ends[0]), max(high, ends[1])
    known = low <= high
    return replace(
        facts,
        pixels=digest.hexdigest(),
        spacing=tuple(round(s, 4) for s in spacing),
        low=low if known else math.nan,
        high=high if known else math.nan,
    )


def _ends(pixels: NDArray[Any]) -> tuple[float, float]:
    """The lowest and the highest finite value; the other way round where there is none."""
    low, high = float(pixels.min()), float(pixels.max())
    if math.isfinite(low) and math.isfinite(high):  # one NaN would have made both NaN
        return low, high
    good = pixels[np.isfinite(pixels)]
    return (float(good.min()), float(good.max())) if good.size else (math.inf, -math.inf)


# The facts of a DICOM file: whose it is by keyed hashes, what it shows in DICOM's own words.

_VALUES: Final = 16  # of ImageType
_METHODS: Final = ("DeidentificationMethod", "DeidentificationMethodCodeSequence")
_INTENTS: Final = frozenset({"FORPRESENTATION", "FORPROCESSING"})
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
        return replace(facts, reason=rule_codes.NO_PIXELS)
    take_longer(frame_values(header) * facts.frames)
    try:
        frames = (read_frame(path, k).image for k in range(facts.frames))
        return measured(facts, ((i.pixels, i.spacing if i.measured else ()) for i in frames))
    except DataError as error:
        return replace(facts, reason=rule_codes.reason_of(error))


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
        "identity_removed": term(header.get("PatientIdentityRemoved"), YES_NO),
        "visual_features": term(header.get("RecognizableVisualFeatures"), YES_NO),
        "method": any(header.get(name) for name in _METHODS),
        "intent": term(header.get("PresentationIntentType"), _INTENTS),
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


AGAIN: Final = -1  # a time of change that no file has, so that the next scan reads it again
_VERSION: Final = 10  # of what is extracted; files read by another are read again
_CHUNK: Final = 1 << 20
_PICTURES: Final = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_TABLES: Final = (".csv", ".xlsx")
_KINDS: Final = {(".nii", ".nii.gz"): "nifti", _PICTURES: "folders"}


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
    mask_suffix : str
        What names of masks end in that lie beside their images; "" where none do.
    """

    root: Path
    format: Format
    secret: bytes = field(repr=False)
    patients: PatientOptions = field(default_factory=PatientOptions)
    mask_suffix: str = ""

    def name(self, path: Path) -> str:
        """The stand-in of a file's path."""
        return Pseudonyms(self.secret)("path", os.fspath(path.relative_to(self.root)))

    @property
    def settings(self) -> str:
        """A keyed hash of what facts depend on beside the file; others mean: read again."""
        parts = (
            str(_VERSION),
            self.format,
            *self.patients.parts,
            *([self.mask_suffix] if self.mask_suffix else []),
        )
        return Pseudonyms(self.secret)("settings", *parts)

    def __call__(self, path: Path) -> FileFacts:
        """The facts of a file; never raises for what is in it."""
        name = self.name(path)
        try:
            before = path.stat()
        except OSError as error:
            reason = rule_codes.NOT_A_FILE if path.is_symlink() else _of_system(error)
            return FileFacts(name, 0, 0, 0, reason=reason)
        facts = FileFacts(name, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
        if path != self.root and is_hidden(path.name):
            return replace(facts, reason=rule_codes.HIDDEN)
        if stat.S_ISDIR(before.st_mode):
            if path.is_symlink():
                return replace(facts, reason=rule_codes.LINKED)
            return replace(facts, modified=AGAIN, reason=_of_folder(path))
        if not stat.S_ISREG(before.st_mode) or not _inside(path, self.root):
            return replace(facts, reason=rule_codes.NOT_A_FILE)
        try:
            found = self._read(path, facts)
            after = path.stat()
        except OSError as error:
            return replace(facts, modified=AGAIN, reason=_of_system(error))
        if _identity(after) != _identity(before):
            return replace(facts, modified=AGAIN, reason=rule_codes.CHANGED)
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
            return replace(facts, reason=rule_codes.reason_of(error))

    def _is_mask(self, path: Path) -> bool:
        if self.mask_suffix:
            return stem(path).endswith(self.mask_suffix)
        return path.relative_to(self.root).parts[0] in MASK_FOLDERS

    def _other_format(self, path: Path, name: str) -> str:
        """Why the dataset's reader takes a file for no image; "" where it is one, or a mask."""
        named = next((kind for ends, kind in _KINDS.items() if name.endswith(ends)), "")
        if self.format == "dicom":
            return rule_codes.NOT_DICOM if named and not self._is_mask(path) else ""
        other = is_dicom(path) if not named else named != self.format
        return rule_codes.OTHER_FORMAT if other else ""

    def _marked(self, path: Path, found: FileFacts, mask: Callable[[], Any]) -> FileFacts:
        """With what a mask marks, where the file is one."""
        if found.reason or not self._is_mask(path):
            return found
        with suppress(DataError):  # no label map, which its reader tells again
            return replace(found, marked=values_of(mask()))
        return replace(found, marked="{}")

    def _image(self, path: Path, name: str, facts: FileFacts) -> FileFacts:
        if reason := self._other_format(path, name):
            return replace(facts, reason=reason)
        if name.endswith((".nii", ".nii.gz")):
            found = nifti_facts(path, replace(facts, format="nifti"))
            return self._marked(path, found, NiftiMask(path, 3))
        if name.endswith(_PICTURES) or (self._is_mask(path) and is_mask_picture(path)):
            found = picture_facts(path, replace(facts, format="picture"))
            return self._marked(path, found, PictureMask(path))
        if name.endswith(".npz"):
            return npz_facts(path, replace(facts, format="npz"))
        if is_dicom(path):
            hashed = Pseudonyms(self.secret)
            return dicom_facts(path, replace(facts, format="dicom"), hashed, self.patients)
        wrong = rule_codes.NOT_DICOM if self.format == "dicom" else rule_codes.OTHER_FORMAT
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
            return rule_codes.CHANGED  # it opens by now
    except OSError as error:
        return _of_system(error)


def _of_system(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return rule_codes.NOT_PERMITTED
    return rule_codes.CHANGED if isinstance(error, FileNotFoundError) else rule_codes.NOT_READABLE
