"""The data formats: how each is recognised and read.

A format is an entry of :data:`READERS`; the configuration, the command lines and their
documentation list what is here. The modules of the readers are imported when a dataset is read:
a process that only reads a configuration needs no image decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from fedward.plan.schema import Task
    from fedward.tasks.base import Target
    from fedward_client.data.dataset import DatasetSpec
    from fedward_client.data.sample import Dataset


@dataclass(frozen=True)
class Reader:
    """What a format's module gives.

    Attributes
    ----------
    recognises : callable
        Whether a file is one of the format's images.
    read : callable
        From the folder, the task and what the site says of its data to samples, decoded later.
    beside : collection of str
        What names of images and masks end in, where masks may lie beside their images.
    """

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Task, DatasetSpec], Dataset]
    beside: Collection[str] = ()


@dataclass(frozen=True)
class ReaderSpec:
    """A data format.

    Attributes
    ----------
    name : str
        As in ``format`` of ``site.toml`` and in ``--format``.
    summary : str
        What it is, for documentation.
    load : callable
        Imports the reader.
    packages : tuple of str
        Distributions that the reader needs; the trainer's container installs them.
    targets : frozenset of str
        What can be read of an image beside it: ``target`` of a task.
    names_patients : bool
        Whether the data themselves name patients, so that no column of a table does.
    issuers : bool
        Whether a patient id comes with an issuer, as DICOM's does.
    archive : bool
        Whether all images of a dataset lie in one file.
    """

    name: str
    summary: str
    load: Callable[[], Reader]
    packages: tuple[str, ...] = ()
    targets: frozenset[Target] = frozenset({"labels", "masks"})
    names_patients: bool = False
    issuers: bool = False
    archive: bool = False


def _npz() -> Reader:
    from fedward_client.data.readers import npz

    return Reader(npz.is_npz, lambda root, task, _: npz.read(root, task))


def _folders() -> Reader:
    from fedward_client.data.readers import images

    return Reader(
        images.is_picture,
        lambda root, task, spec: images.read(
            root, task, spec.labels, spec.patients, spec.masks, spec.channels, spec.boxes
        ),
        images.MASK_SUFFIXES,
    )


def _nifti() -> Reader:
    from fedward_client.data.readers import nifti

    return Reader(
        nifti.is_nifti,
        lambda root, task, spec: nifti.read(
            root, task, spec.labels, spec.patients, spec.channels, spec.masks.suffix
        ),
        nifti.SUFFIXES,
    )


def _dicom() -> Reader:
    from fedward_client.data.readers.dicom import reader, sniff

    return Reader(
        sniff.is_dicom,
        lambda root, task, spec: reader.read(
            root,
            task,
            spec.masks,
            spec.patients,
            spec.labels,
            spec.listen,
            spec.images,
            spec.boxes,
        ),
    )


READERS: Final[Mapping[str, ReaderSpec]] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ReaderSpec(
                "npz",
                "one NumPy archive, as MedMNIST's",
                _npz,
                names_patients=True,
                archive=True,
            ),
            ReaderSpec(
                "folders",
                "PNG, JPEG, TIFF or BMP pictures",
                _folders,
                ("pillow",),
                frozenset({"labels", "masks", "boxes"}),
            ),
            ReaderSpec("nifti", "NIfTI-1 or NIfTI-2 images", _nifti, ("nibabel",)),
            ReaderSpec(
                "dicom",
                "DICOM files",
                _dicom,
                ("pydicom", "pylibjpeg[all]"),
                frozenset({"labels", "masks", "boxes"}),
                names_patients=True,
                issuers=True,
            ),
        )
    }
)
"""The formats by name, in the order in which a file is tried."""


def formats() -> str:
    """The formats and what they are, as in a sentence."""
    return "; ".join(f"`{name}`: {spec.summary}" for name, spec in READERS.items())


if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[*READERS]
