"""Words of DICOM that name nobody, and what is left of a file's own words beside them.

A code string may hold anything that a user typed at a scanner, a name too; so of these fields
only the standard's own words are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import pydicom

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
    return text if not text or _bare(text).upper() in known else OTHER


@dataclass(frozen=True)
class Own:
    """What names the patient of a file: the words of the name, and the id."""

    words: frozenset[str]
    number: str

    @classmethod
    def of(cls, header: pydicom.Dataset) -> Self:
        """Of the file with this header."""
        name = str(header.get("PatientName") or "").casefold()
        return cls(frozenset(_words(name)), _bare(str(header.get("PatientID") or "")).casefold())

    def without(self, text: str) -> str:
        """A text, or "other" where it holds a word of the name, or the id."""
        low, bare = text.casefold(), _bare(text).casefold()
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


def _bare(text: str) -> str:
    return "".join(letter for letter in text if letter.isalnum())
