"""Types of a dataset: samples, left-out files, and a prepared site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedward_client.data.volumes import Volumes

BoxRows = tuple[tuple[float, ...], ...]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Lookup:
    """A table that the file itself proposes for display (DICOM VOI LUT, PS3.3 C.11.2.1.1).

    Attributes
    ----------
    first : float
        The pixel value that the first entry is for; below it the first entry counts too, and above
        the last entry the last.
    table : NDArray
        ``(N,)`` float32 from 0 (black) to 1 (white).
    backwards : bool
        Whether pixels run the other way: the entry is for `first` minus the pixel.
    """

    first: float
    table: NDArray[np.float32]
    backwards: bool = False

    def __call__(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pixels of any shape to brightness from 0 to 1."""
        entries = self.first - pixels if self.backwards else pixels - self.first
        places = np.clip(np.floor(entries), 0, len(self.table) - 1).astype(np.intp)
        return np.asarray(self.table[places], np.float32)


@dataclass(frozen=True)
class Image:
    """One decoded image, as the modality means it (HU for CT; grey, bright is high).

    Attributes
    ----------
    pixels : NDArray
        ``(C, H, W)`` or ``(C, H, W, D)``, C being 1 or 3, float32.
    spacing : tuple of float
        Distance of neighbouring pixels in mm, one per spatial axis; 1.0 where unknown.
    window : tuple of float or None
        Lowest and highest displayed value that the file itself proposes (DICOM VOI), if any.
    lookup : Lookup or None
        A table that the file proposes; it leads before `window`.
    tilt : float
        Degrees by which the scanner's gantry leant; the volume has been made upright already.
    measured : bool
        Whether the file states the spacing; False where 1 mm stands for it.
    names : tuple of str
        Of named channels, the planes of `pixels` in their order; () where they have none.
    affine : NDArray or None
        ``(4, 4)``, voxel of a NIfTI volume to RAS mm, by which its channels are registered.
    region : tuple of slice or None
        Rows and columns of a 2D image that show the patient (DICOM ultrasound regions); what is
        around them is text and scales. The mask has the size of the whole image.
    gap : float
        The largest distance, mm, of slices that were unevenly apart; the volume has been resampled
        to even ones already. Else 0.
    """

    pixels: NDArray[np.float32]
    spacing: tuple[float, ...]
    window: tuple[float, float] | None = None
    tilt: float = 0.0
    lookup: Lookup | None = None
    measured: bool = True
    region: tuple[slice, slice] | None = None
    names: tuple[str, ...] = ()
    affine: NDArray[np.float64] | None = None
    gap: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One image of one patient, not read yet.

    Attributes
    ----------
    patient : str
        The patient's key. It stays in the site's memory and goes nowhere else.
    load : callable
        Reads and decodes the image; raises DataError when it cannot.
    label : tuple of int or None
        Classification: one class index, or the 0/1 flags of a multi-label task.
    mask : callable or None
        Segmentation: reads the label map, ``(H, W)`` or ``(H, W, D)`` uint8. Detection: the same,
        where boxes are those around what it marks.
    boxes : tuple or None
        Detection: of each box its lower corner, its upper corner, both in pixels of the image, and
        its class from 1; none where `mask` tells them.
    site : str
        The sub-folder (hospital) that it came from, or "".
    split : str or None
        The division that the data itself brings.
    patient_known : bool
        Whether `patient` is a patient's id; False where the image stands for its patient.
    columns : mapping
        Further columns of the label table, for a plan's ``[table]`` and ``--partition
        column:NAME``.
    """

    patient: str
    load: Callable[[], Image]
    label: tuple[int, ...] | None = None
    mask: Callable[[], NDArray[np.uint8]] | None = None
    boxes: BoxRows | None = None
    site: str = ""
    split: SplitName | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    patient_known: bool = True


def unnamed(samples: Iterable[Sample]) -> int:
    """Images whose patient is not known: each counts as a patient of its own."""
    return sum(not sample.patient_known for sample in samples)


@dataclass(frozen=True)
class LeftOut:
    """A file or row that was not taken.

    Attributes
    ----------
    reason : str
        One of a fixed set of short reasons; safe to send.
    name : str
        What it was; stays at the site.
    """

    reason: str
    name: str


@dataclass(frozen=True)
class Dataset:
    """Everything that a reader took and left out."""

    samples: tuple[Sample, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    """What the reader found out for itself and used, for whoever has the data."""


@dataclass(frozen=True)
class PreparedSite:
    """A site's images, preprocessed for one plan and divided by patient.

    Attributes
    ----------
    name : str
        The site.
    images : NDArray
        ``(N, C, *size)`` float32; may be a read-only memory map. Where a plan asks for patches,
        ``(N,)`` objects, each a whole image ``(C, *S)`` and at least as large as a patch.
    targets : NDArray
        Classification: ``(N,)`` int64 class index, or ``(N, K)`` float32 flags when multi-label.
        Segmentation: ``(N, *size)`` uint8 label map, 0 being background; for patches ``(N,)``
        objects ``(*S)``. Detection: ``(N, M, 2 D + 1)`` float32, of each box its lower and its
        upper corner in pixels of the prepared image, and its class from 1; 0: no box.
    patients : NDArray
        ``(N,)`` int64, a number per patient, without meaning outside this object.
    split : mapping
        "train", "validation", "test" to the ``(n,)`` int64 indices of their images; no patient is
        in two of them.
    spacing : NDArray
        ``(N, D)`` float32, mm per axis after preprocessing; for patches of the image's file.
    left_out : mapping
        Reason to count.
    synthetic : bool
        Whether the images say of themselves that they are synthetic.
    cut : int
        Images all of whose foreground lay outside the middle that the plan keeps.
    cohort : str
        SHA-256 of the frozen cohort that they are of; "" for what is not frozen.
    images_are_patients : bool
        Whether the data name no patients, so that an image counts as a patient.
    volumes : Volumes or None
        For patches: what else is known of the whole images.
    table : NDArray or None
        ``(N, T)`` float32, what the plan's table says of each image (see
        :func:`fedward_client.data.table_rows.encoded`).
    """

    name: str
    images: NDArray[Any]
    targets: NDArray[Any]
    patients: NDArray[np.int64]
    split: Mapping[SplitName, NDArray[np.int64]]
    spacing: NDArray[np.float32]
    left_out: Mapping[str, int] = field(default_factory=dict)
    synthetic: bool = False
    cut: int = 0
    cohort: str = ""
    images_are_patients: bool = False
    volumes: Volumes | None = None
    table: NDArray[np.float32] | None = None

    def patients_in(self, name: SplitName) -> int:
        """Patients of one part of the division."""
        return len(np.unique(self.patients[self.split[name]]))


def joined_tables(tables: Iterable[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    """Rows of several sites one after another; None where they have none."""
    rows = [one for one in tables if one is not None]
    return np.concatenate(rows) if rows else None
