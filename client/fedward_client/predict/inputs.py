"""Images without labels: which ones a path holds, and the grid that an answer goes back to."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward.rule_codes import RuleCode
from fedward_client.data.channels import Cases, ChannelImage, Channels
from fedward_client.data.dataset import masks_beside
from fedward_client.data.files import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    file_identity,
    folder_of,
    stem,
    walk,
)
from fedward_client.data.options import BOX_TABLES, TABLES, PatientOptions
from fedward_client.data.readers.dicom.headers import Header, Listen, read_headers, unheard
from fedward_client.data.readers.dicom.kinds import ImageOptions
from fedward_client.data.readers.dicom.pixels import read_frame, read_place
from fedward_client.data.readers.dicom.series import (
    Geometry,
    Stack,
    arranged,
    frame_affine,
    layout,
    single,
    stacks,
)
from fedward_client.data.readers.images import Picture, is_picture
from fedward_client.data.readers.nifti import (
    NiftiImage,
    is_nifti,
    nifti_bytes,
    save_mask,
    turned_back,
)
from fedward_client.data.sample import Image, LeftOut

Mask = NDArray[np.uint8]
_TABLES: Final = (*TABLES, *BOX_TABLES, "patients.csv")
# Whoever asks about one image wants its answer, whatever its file says of the patient.
_ANYBODY: Final = PatientOptions(missing="series", shared="keep")


class Source(ABC):
    """One image, or all frames of one file where the task is about single images.

    Attributes
    ----------
    name : str
        The (first) file, relative to what was asked about.
    patient : str
        Its patient's id; "" where the data tell none.
    frames : int
        Images that it holds.
    mask_suffix : str
        Of the file that :meth:`mask` makes.
    """

    name: str
    patient: str
    frames: int = 1
    mask_suffix: ClassVar[str] = ".nii.gz"

    @abstractmethod
    def identity(self) -> str:
        """A digest that changes when a file of it does."""

    @abstractmethod
    def images(self) -> Iterator[Image]:
        """Decode them one after another."""

    @abstractmethod
    def mask(self, labels: Sequence[Mask]) -> bytes:
        """Label maps on the decoded grids as a file on the input's own grid."""

    @property
    def stem(self) -> str:
        """What files about it are called: its name and a part of its digest."""
        return stem_of(self.name)


@dataclass(frozen=True)
class PictureSource(Source):
    """A PNG, JPEG, TIFF or BMP file."""

    name: str
    path: Path
    patient: str = ""
    channels: ChannelImage | None = None
    mask_suffix: ClassVar[str] = ".png"

    def identity(self) -> str:
        return self.channels.identity() if self.channels else file_identity(self.path)

    def images(self) -> Iterator[Image]:
        yield (self.channels or Picture(self.path))()

    def mask(self, labels: Sequence[Mask]) -> bytes:
        file = io.BytesIO()
        Pillow.fromarray(np.ascontiguousarray(labels[0])).save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class NiftiSource(Source):
    """A NIfTI file."""

    name: str
    path: Path
    dimensions: int
    patient: str = ""
    channels: ChannelImage | None = None

    def identity(self) -> str:
        return self.channels.identity() if self.channels else file_identity(self.path)

    def images(self) -> Iterator[Image]:
        yield (self.channels or NiftiImage(self.path, self.dimensions))()

    def mask(self, labels: Sequence[Mask]) -> bytes:
        return save_mask(labels[0], self.path, self.dimensions)


@dataclass
class DicomSource(Source):
    """A stack of slices as a volume, or the frames of one file.

    Attributes
    ----------
    stack : Stack
        Its frames.
    volume : bool
        Whether they make one image.
    used : tuple of tuple
        File and frame of each frame that the answer is about, in the order of :meth:`planes`;
        known once the image was decoded.
    """

    name: str
    stack: Stack
    volume: bool
    reason: str = ""

    def __post_init__(self) -> None:
        self.used = self.stack.frames
        self.frames = 1 if self.volume else len(self.stack.frames)
        self._geometry: Geometry | None = None

    @property
    def header(self) -> Header:
        """Of the first file."""
        return self.stack.headers[0]

    @property
    def patient(self) -> str:  # type: ignore[override]
        """The patient's id as the file has it."""
        return self.header.keys.get("patientid", "")

    @property
    def step(self) -> float | None:
        """mm between the slices of a volume; known once the image was decoded."""
        return None if self._geometry is None else self._geometry.step

    def identity(self) -> str:
        whole = "".join(file_identity(path, frame) for path, frame in self.stack.frames)
        return hashlib.sha256(whole.encode()).hexdigest()

    def images(self) -> Iterator[Image]:
        if not self.volume:
            yield from (read_frame(path, frame).image for path, frame in self.stack.frames)
            return
        if self.reason:
            raise rule_codes.unusable(self.reason)
        read = [read_frame(path, frame) for path, frame in self.stack.frames]
        image, numbers, self._geometry = arranged(read)
        self.used = tuple(self.stack.frames[k] for k in numbers)
        del read
        yield image

    def planes(self, labels: Sequence[Mask]) -> NDArray[np.uint8]:
        """The label map of each frame of :attr:`used` as it is stored, ``(F, H, W)``."""
        if self._geometry is not None:
            return np.stack(self._geometry.slices(labels[0]))
        return np.stack(labels)

    def mask(self, labels: Sequence[Mask]) -> bytes:
        made = self._geometry
        if made is not None and made.gap:  # uneven slices have no affine; the resampled ones do
            return nifti_bytes(turned_back(labels[0], made.affine), made.affine)
        planes = self.planes(labels)
        if made is not None:
            return nifti_bytes(np.moveaxis(planes[list(made.order)], 0, -1), made.scanned)
        place = read_place(*self.used[0])
        affine = frame_affine(place)
        if affine is None:
            affine = np.diag([*place.spacing, 1.0, 1.0])
        return nifti_bytes(np.moveaxis(planes, 0, -1), affine)


@dataclass(frozen=True)
class Found:
    """What a path holds."""

    sources: tuple[Source, ...]
    left_out: tuple[LeftOut, ...]


def find_inputs(
    path: Path,
    task: Task,
    format: str | None = None,
    images: ImageOptions | None = None,
    listen: Listen = unheard,
    channels: Channels | None = None,
    suffix: str = "",
) -> Found:
    """The images of a file or a folder, of every modality; masks and tables are not among them.

    Parameters
    ----------
    path : Path
        A file, or a folder, whose sub-folder ``images`` is meant where it has one.
    task : Task
        The model's: whether images have two or three dimensions.
    format : str, optional
        One of :data:`fedward_client.data.readers.registry.READERS`; None tells it by each file.
    images : ImageOptions, optional
        Which DICOM images the site takes.
    listen : callable, optional
        Hears how many DICOM headers are read, and of how many.
    channels : mapping, optional
        Of a dataset, where they have files of their own: the files of a case are one image.
    suffix : str
        Of a dataset, what the names of its masks end in.

    Raises
    ------
    DataError
        There is nothing.
    """
    if not path.exists():
        raise DataError(RuleCode.DATASET, fix="Check the path and the mount", where=path.name)
    base = base_of(path)
    root = path if path.is_dir() else path.parent
    inside = walk(base, without=MASK_FOLDERS) if base.is_dir() else [path]
    files = [file for file in inside if file.name not in _TABLES]
    kinds = {file: format or _kind(file) for file in files}
    if task.has_masks:
        beside = (masks_beside(path, kind, suffix, channels) for kind in {*kinds.values()})
        masks = {mask for one in beside if one for mask in one.masks}
        files = [file for file in files if file not in masks]
    sources: list[Source] = []
    cases = Cases.of(
        [file for file in files if kinds[file] in ("folders", "nifti")], base, channels
    )
    for file in cases.files:
        name = file.relative_to(root).as_posix()
        if kinds[file] == "folders":
            sources.append(PictureSource(name, file, channels=cases.image(file, Picture)))
        else:
            load = partial(NiftiImage, dimensions=task.dimensions)
            made = cases.image(file, load)
            sources.append(NiftiSource(name, file, task.dimensions, channels=made))
    dicom = [file for file in files if kinds[file] == "dicom"]
    found, left_out = _dicom(dicom, root, task, images, listen)
    names = sorted([*sources, *found], key=lambda source: source.name)
    if not names and not left_out:
        raise DataError(
            RuleCode.DATASET_IMAGES,
            values={"task": task.kind, "reasons": ()},
            where=path.name,
        )
    return Found(tuple(names), tuple(left_out))


def stem_of(name: str) -> str:
    """What files about an input of that name are called: its name and a part of its digest."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem(Path(name)))
    return f"{plain[:60]}-{digest[:8]}"


def base_of(path: Path) -> Path:
    """Where the images of a path lie: in its sub-folder ``images``, where it has one."""
    return folder_of(path, IMAGE_FOLDERS) or path


def _kind(file: Path) -> str:
    # What is of no known kind is looked at as DICOM, whose reader says why it is none.
    if is_picture(file):
        return "folders"
    return "nifti" if is_nifti(file) else "dicom"


def _dicom(
    files: list[Path], root: Path, task: Task, images: ImageOptions | None, listen: Listen
) -> tuple[list[DicomSource], list[LeftOut]]:
    anything = task.model_copy(update={"modality": ("any",)})
    headers, _, left_out = read_headers(files, root, anything, _ANYBODY, listen, images)
    volume = task.dimensions == 3
    groups = stacks(headers) if volume else [single(header) for header in headers]
    sources, times = [], Counter[str]()
    for group in groups:
        name = group.headers[0].path.relative_to(root).as_posix()
        times[name] += 1  # one file may hold several stacks
        name = name if times[name] == 1 else f"{name}#{times[name]}"
        sources.append(DicomSource(name, group, volume, layout(group).reason if volume else ""))
    return sources, left_out
