"""The fixed set of reasons for leaving an image out; each is safe to send."""

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
