"""Reader for NIfTI images (``images/``) with label maps (``labels/``) or ``labels.csv``.

Volumes are turned to the closest canonical orientation: axes to the right, to the front, upwards
(RAS). A slice of a 2D task is shown as radiologists see it: rows downwards or to the back,
columns to the patient's left (or to the back, in a sagittal slice), which is how DICOM stores it.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.data.channels import Channels
from fedward_client.data.files import IMAGE_FOLDERS, file_identity, folder_of
from fedward_client.data.masks import label_map
from fedward_client.data.options import LabelOptions, PatientOptions
from fedward_client.data.quiet import quiet
from fedward_client.data.readers import images as folders
from fedward_client.data.readers.images import people_of
from fedward_client.data.sample import Dataset, Image

_MASKS: Final = ("labels", "labelsTr", "masks")
_UNITS: Final = {"meter": 1e3, "micron": 1e-3}
_POSSIBLE: Final = (1e-5, 100.0)  # mm of a voxel


SUFFIXES: Final = (".nii", ".nii.gz")


def is_nifti(path: Path) -> bool:
    """Whether the suffix is ``.nii`` or ``.nii.gz``."""
    return path.name.lower().endswith(SUFFIXES)


@dataclass(frozen=True)
class NiftiImage:
    """Reads an image of two or three dimensions."""

    path: Path
    dimensions: int

    def __call__(self) -> Image:
        volume, spacing, affine = _canonical(self.path)
        values, spacing = _oriented(volume, spacing, self.dimensions)
        place = affine if self.dimensions == 3 else None
        return Image(np.ascontiguousarray(values[None], np.float32), spacing, affine=place)

    def identity(self) -> str:
        """A digest of place, size and time of change."""
        return file_identity(self.path, self.dimensions)


@dataclass(frozen=True)
class NiftiMask:
    """Reads a label map; with `image`, the two must lie in the same place."""

    path: Path
    dimensions: int
    image: Path | None = None

    def __call__(self) -> NDArray[np.uint8]:
        volume, spacing, affine = _canonical(self.path)
        if self.image is not None:
            other, _, place = _canonical(self.image, header_only=True)
            check_place(volume.shape, affine, other.shape, place)
        values, _ = _oriented(volume, spacing, self.dimensions)
        return label_map(values)

    def identity(self) -> str:
        """A digest of place, size and time of change."""
        return file_identity(self.path, self.dimensions)


@dataclass(frozen=True)
class Turned:
    """A label map whose axes are turned to those of an image.

    Attributes
    ----------
    values : NDArray
        ``(a, b, c)`` uint8.
    affine : NDArray
        ``(4, 4)``, voxel to RAS mm.
    """

    values: NDArray[np.uint8]
    affine: NDArray[np.float64]

    @classmethod
    def to(cls, path: Path, affine: NDArray[np.float64]) -> Turned:
        """Read a label map and turn its axes to the nearest ones of `affine`.

        Raises
        ------
        DataError
            "not readable"; "shape does not fit the task": it has more than three axes; "unknown
            class in mask".
        """
        with quiet():
            try:
                values, own = _opened(path)
                wanted = nib.io_orientation(affine)
                turn = nib.orientations.ornt_transform(nib.io_orientation(own), wanted)
                back = nib.orientations.inv_ornt_aff(turn, values.shape)
                turned = nib.orientations.apply_orientation(label_map(values), turn)
                return cls(turned, own @ back)
            except Exception as error:
                raise rule_codes.unusable(rule_codes.reason_of(error)) from None

    def within(self, place: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The values, when they lie at `place` (see :func:`check_place`)."""
        check_place(self.values.shape, self.affine, shape, place)
        return self.values


def check_place(
    shape: tuple[int, ...],
    affine: NDArray[np.float64],
    image_shape: tuple[int, ...],
    place: NDArray[np.float64],
) -> None:
    """Hold a mask's grid against its image's; both affines map voxels to RAS mm.

    Raises
    ------
    DataError
        "shape of mask differs"; "position of mask differs": steps or origin are a tenth of the
        smallest side of a voxel apart, or some corner half of it.
    """
    if shape != image_shape:
        raise rule_codes.unusable(rule_codes.MASK_SHAPE)
    # Along an axis of one voxel there is no step; what stands there is a thickness.
    steps = [axis for axis in range(3) if shape[axis] > 1]
    smallest = min(_voxel(place)[axis] for axis in steps or range(3))
    differ = (affine - place)[:3]
    corners = np.linalg.norm(differ @ _corners(shape), axis=0)
    if np.abs(differ[:, [*steps, 3]]).max() > 0.1 * smallest or corners.max() > 0.5 * smallest:
        raise rule_codes.unusable(rule_codes.MASK_POSITION)


def _corners(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """``(4, 8)``, the voxels at the corners of a grid."""
    return np.array([(*c, 1.0) for c in product(*((0.0, n - 1.0) for n in shape))]).T


def read(
    root: Path,
    task: Task,
    options: LabelOptions | None = None,
    patients: PatientOptions | None = None,
    channels: Channels | None = None,
    suffix: str = "",
) -> Dataset:
    """Read a NIfTI folder.

    Parameters
    ----------
    root : Path
        The folder.
    task : Task
        What its labels or masks are for.
    options : LabelOptions, optional
        Where the table of labels lies, and what its words mean.
    patients : PatientOptions, optional
        What missing and shared patient ids of a table mean.
    channels : mapping, optional
        Named channels, some of which may have files of their own.
    suffix : str
        What the names of masks end in.

    Raises
    ------
    DataError
        The folder does not have the layout that the task needs.
    """
    options = options or LabelOptions()
    people = people_of(root, patients, options)
    d = task.dimensions
    if task.has_masks:
        people.check()
        return folders.pairs(
            root,
            (SUFFIXES, SUFFIXES),
            lambda i, m: (NiftiImage(i, d), NiftiMask(m, d, i)),
            people,
            channels,
            suffix,
            _MASKS,
        )
    if options.table(root) is not None:
        return folders.labelled(
            root,
            folder_of(root, IMAGE_FOLDERS) or root,
            is_nifti,
            lambda f: NiftiImage(f, d),
            people,
            task,
            options,
            channels,
        )
    raise DataError(
        f"a NIfTI folder for {task.kind} must hold labels.csv",
        fix="See the data page for the layouts",
        where=rule_codes.NO_TABLE,
    )


def oriented_volume(
    values: NDArray[Any], affine: NDArray[np.float64]
) -> tuple[NDArray[Any], tuple[float, ...]]:
    """A volume turned to RAS, and its spacing in mm; `affine` maps voxels to RAS mm."""
    turned = nib.as_closest_canonical(nib.Nifti1Image(values, affine))
    return np.asanyarray(turned.dataobj), _voxel(turned.affine)


def turned_back(values: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """The inverse of :func:`oriented_volume`: a volume in RAS with the axes that `affine` is of."""
    upright = np.array([[0, 1], [1, 1], [2, 1]])
    turn = nib.orientations.ornt_transform(upright, nib.io_orientation(affine))
    return np.asarray(nib.orientations.apply_orientation(values, turn))


def save_mask(mask: NDArray[np.uint8], like: Path, dimensions: int) -> bytes:
    """A label map on the decoded grid of an image, as the NIfTI file of the image's own grid.

    Parameters
    ----------
    mask : NDArray
        ``(x, y, z)`` in RAS, or of a 2D task ``(H, W)`` as :class:`NiftiImage` shows it.
    like : Path
        The image.
    dimensions : int
        Of the task.

    Returns
    -------
    bytes
        Compressed with gzip; the same for the same values.
    """
    file: Any = nib.load(like)
    if dimensions == 2:
        (thin,) = (axis for axis, n in enumerate(_canonical(like, True)[0].shape) if n == 1)
        mask = np.expand_dims(mask[::-1, ::-1].T, thin)
    own = np.array(file.affine, np.float64)
    return nifti_bytes(turned_back(mask, own).reshape(file.shape), own, file.header)


def nifti_bytes(
    labels: NDArray[np.uint8], affine: NDArray[np.float64], header: Any = None
) -> bytes:
    """A label map as a compressed NIfTI-1 file; units and codes of the place are those of `header`,
    else mm in the scanner's axes."""
    made = nib.Nifti1Image(np.ascontiguousarray(labels), affine)
    if header is None:
        made.header.set_xyzt_units("mm")
        made.set_sform(affine, 1)
        made.set_qform(affine, 1)
    else:
        made.header.set_xyzt_units(*header.get_xyzt_units())
        made.set_sform(affine, int(header["sform_code"]) or 1)
        if int(header["qform_code"]):
            made.set_qform(header.get_qform(), int(header["qform_code"]))
    return gzip.compress(made.to_bytes(), 6, mtime=0)


def _voxel(affine: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(v) or 1.0 for v in voxel_sizes(affine))


def _canonical(
    path: Path, header_only: bool = False
) -> tuple[NDArray[Any], tuple[float, ...], NDArray[np.float64]]:
    with quiet():
        try:
            turned = nib.as_closest_canonical(nib.Nifti1Image(*_opened(path, header_only)))
            return np.asanyarray(turned.dataobj), _voxel(turned.affine), turned.affine
        except Exception as error:
            # nibabel raises nearly anything on a broken file, and its texts quote the path.
            raise rule_codes.unusable(rule_codes.reason_of(error)) from None


def _opened(path: Path, header_only: bool = False) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The values ``(a, b, c)`` of a file and its affine; no values with `header_only`."""
    file: Any = nib.load(path)
    shape = tuple(file.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    shape += (1,) * (3 - len(shape))
    if len(shape) != 3:
        raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
    values = np.broadcast_to(np.uint8(0), shape) if header_only else _values(file, shape)
    affine = np.array(file.affine, np.float64)
    affine[:3] *= in_mm(file)
    return values, affine


def in_mm(file: Any) -> float:
    """What the file's unit of length is in mm; 1 where it says none, or one that cannot be."""
    length, _ = file.header.get_xyzt_units()
    unit = _UNITS.get(length, 1.0)
    sizes = [float(size) * unit for size in file.header.get_zooms()[:3]]
    return unit if all(_POSSIBLE[0] <= size <= _POSSIBLE[1] for size in sizes) else 1.0


def _values(file: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.asarray(file.get_fdata(dtype=np.float32, caching="unchanged")).reshape(shape)


def _oriented(
    volume: NDArray[Any], spacing: tuple[float, ...], dimensions: int
) -> tuple[NDArray[Any], tuple[float, ...]]:
    if dimensions == 3:
        return volume, spacing
    thin = [axis for axis in range(3) if volume.shape[axis] == 1]
    if len(thin) != 1:
        raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
    kept = [spacing[axis] for axis in range(3) if axis != thin[0]]
    return np.squeeze(volume, thin[0]).T[::-1, ::-1], (kept[1], kept[0])
