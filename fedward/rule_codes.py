"""Fixed reasons for leaving an image out; each is safe to send."""

from __future__ import annotations

from typing import Final

from fedward.errors import DataError

NOT_READABLE: Final = "not readable"
NOT_DICOM: Final = "not DICOM"
NO_PIXELS: Final = "no pixel data"
OTHER_MODALITY: Final = "other modality"
NO_PATIENT: Final = "no patient id"
SHARED_PATIENT: Final = "shared patient id"
NO_LABEL: Final = "no label"
UNKNOWN_CLASS: Final = "unknown class"
CONFLICTING: Final = "conflicting labels"
NO_MASK: Final = "no mask"
AMBIGUOUS: Final = "ambiguous name of mask"
NO_IMAGE: Final = "no image"
DUPLICATE: Final = "duplicate"
WRONG_SHAPE: Final = "shape does not fit the task"
MASK_SHAPE: Final = "shape of mask differs"
MASK_POSITION: Final = "position of mask differs"
MASK_CLASS: Final = "unknown class in mask"
NO_CONTOURS: Final = "no closed contour"
INCOMPLETE: Final = "slices missing"
UNEVEN: Final = "slices uneven"
DUPLICATE_SLICES: Final = "duplicate slices"
SCOUT: Final = "scout or localizer"
MOSAIC: Final = "mosaic of slices"
TILTED: Final = "gantry tilt"
TOO_LARGE: Final = "too large"
CHANGED: Final = "changed while read"
NOT_PERMITTED: Final = "not permitted"
NOT_A_FILE: Final = "not a file"
LINKED: Final = "linked folder"
HIDDEN: Final = "hidden"
DECODER_FAILED: Final = "decoder failed"
OTHER_FORMAT: Final = "other format"

REASONS: Final = frozenset(
    {
        NOT_READABLE,
        NOT_DICOM,
        NO_PIXELS,
        OTHER_MODALITY,
        NO_PATIENT,
        SHARED_PATIENT,
        NO_LABEL,
        UNKNOWN_CLASS,
        CONFLICTING,
        NO_MASK,
        AMBIGUOUS,
        NO_IMAGE,
        DUPLICATE,
        WRONG_SHAPE,
        MASK_SHAPE,
        MASK_POSITION,
        MASK_CLASS,
        NO_CONTOURS,
        INCOMPLETE,
        UNEVEN,
        DUPLICATE_SLICES,
        SCOUT,
        MOSAIC,
        TILTED,
        TOO_LARGE,
        CHANGED,
        NOT_PERMITTED,
        NOT_A_FILE,
        LINKED,
        HIDDEN,
        DECODER_FAILED,
        OTHER_FORMAT,
    }
)

# Where an error says that a dataset has no table of labels, or no masks, at all.
NO_TABLE: Final = "labels"
NO_MASKS: Final = "masks"


def unusable(reason: str) -> DataError:
    """The error with which a sample's ``load`` or ``mask`` says that the image is left out."""
    return DataError(reason, fix="Mend the file or take it out")


def reason_of(error: BaseException) -> str:
    """The fixed reason behind an error: its own, or "not readable" for anything else.

    A process that ran out of the memory that it may take met something "too large".
    """
    if isinstance(error, DataError) and error.rule in REASONS:
        return error.rule
    if isinstance(error, MemoryError):
        return TOO_LARGE
    return NOT_READABLE


# The sentences with which a policy refuses; fixed, so that they may leave the site.

COORDINATOR: Final = "the coordinator must be one that the site accepts"
STUDY: Final = "the study must be one that the site serves"
MODEL: Final = "the network must be one that the site allows"
PARAMETERS: Final = "the network must not have more parameters than the site allows"
UPLOAD: Final = "an update must not be larger than the site allows"
PRIVATE: Final = "updates must be differentially private"
EPSILON: Final = "ε must not be above what the site allows a study"
COHORT_EPSILON: Final = "ε must not be above what the site allows all studies together"
EVALUATION_EPSILON: Final = "ε of evaluations must not be above what the site allows"
DELTA: Final = "δ must not be above what the site allows"
COHORT: Final = "the site must have a frozen cohort for the study"
PATIENTS: Final = "the site must have as many patients as its policy asks for"
PER_CLASS: Final = "the site must have as many patients of each class as its policy asks for"
PATIENT_KEY: Final = (
    "a private study must have images that name their patients, or a site that takes each image "
    "for a patient"
)

SITES: Final = "a round must ask as many sites as the site's policy asks for"

PENDING: Final = "the study must be approved at the site; it waits for that"
DENIED: Final = "the study must be approved at the site; it was denied"
PAUSED: Final = "the site must not be paused"
QUIET: Final = "the site must be outside its quiet hours"
WITHHELD: Final = "what the site counts must be enough, and allowed, to leave it"

NETWORKED: Final = "the trainer must have no network before it opens a dataset"

STOPPED: Final = "the site must stay up until the order is carried out"
GIVEN_UP: Final = "the order must not be given up by who sent it"

STOPS_TRAINER: Final = "an order must not stop the trainer, and this one did before"
CONNECTOR: Final = "the connector must not be able to read images while an order is carried out"

UNWRITTEN: Final = "the audit log must be writable"
MEMORY: Final = "the device must have memory for one image"

FIX: Final = "Change the plan, or ask the site's security officer"

RULES: Final = (
    COORDINATOR,
    STUDY,
    MODEL,
    PARAMETERS,
    UPLOAD,
    PRIVATE,
    EPSILON,
    COHORT_EPSILON,
    DELTA,
    COHORT,
    PATIENTS,
    PER_CLASS,
    SITES,
    PENDING,
    DENIED,
    PAUSED,
    QUIET,
    WITHHELD,
    NETWORKED,
    EVALUATION_EPSILON,
    CONNECTOR,
    PATIENT_KEY,
)
