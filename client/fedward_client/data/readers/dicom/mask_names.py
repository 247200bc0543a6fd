"""Match mask files to DICOM images by UID, folder path or name.

A name counts only where it means one mask and one image: archives call the files of every patient
IM0001, and a mask must never mark another patient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from fedward import rule_codes
from fedward_client.data.files import stem
from fedward_client.data.mask_suffix import common_suffix
from fedward_client.data.readers.dicom.headers import Header
from fedward_client.data.readers.nifti import is_nifti

T = TypeVar("T")
Key = tuple[str, ...]
Parts = tuple[str, ...]  # of a path below the folder of images or of masks, without suffix


@dataclass
class NamedMasks:
    """What names tell.

    Attributes
    ----------
    of : dict
        By image file: its mask, or the reason why the name tells none.
    idle : list
        Masks of no image, each with the reason.
    """

    of: dict[Path, Path | str] = field(default_factory=dict)
    idle: list[tuple[Path, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Image:
    """A file (2D) or a series (3D); what is left out has its places alone."""

    uid: str
    patient: str
    files: tuple[Path, ...]
    places: frozenset[Parts]


def by_name(
    masks: Sequence[Path],
    folder: Path,
    headers: Sequence[Header],
    left_out: Iterable[Path],
    base: Path,
    dimensions: int,
    suffix: str = "",
) -> NamedMasks:
    """Find the image of each mask.

    Parameters
    ----------
    masks : sequence of Path
        Pictures and NIfTI files in `folder`.
    headers : sequence of Header
        The images below `base` that can be used.
    left_out : iterable of Path
        Images there that cannot; they have a name still.
    dimensions : int
        2: a mask is of a file, by SOPInstanceUID, place or stem; 3: of a series, by its UID or by
        place or name of its folder.
    suffix : str
        What the names of masks end in beyond that; "": nothing, or what all of them share.
    """
    found = NamedMasks()
    usable = [mask for mask in masks if dimensions == 2 or is_nifti(mask)]
    found.idle += [(mask, rule_codes.WRONG_SHAPE) for mask in sorted({*masks} - {*usable})]
    found.idle += [(one, rule_codes.NOT_SELECTED) for one in usable if not _ends(one, suffix)]
    usable = [mask for mask in usable if _ends(mask, suffix)]
    if not usable:
        return found
    images = list(_images(headers, base, dimensions))
    known = {place for image in images for place in image.places}
    others = {_place(path, base, dimensions) for path in left_out} - known
    named = [*images, *(_Image("", "", (), frozenset({p})) for p in others)]
    names = _Names(usable, folder, named, suffix or _common(usable, named))
    used: set[Path] = set()
    for image in images:
        of = names.of(image)
        used |= {*of}
        if of:
            mask = of[0] if len(of) == 1 and names.alone(of[0], image) else rule_codes.AMBIGUOUS
            found.of |= dict.fromkeys(image.files, mask)
    found.idle += [(mask, rule_codes.NO_IMAGE) for mask in usable if mask not in used]
    return found


def _ends(mask: Path, suffix: str) -> bool:
    return stem(mask).endswith(suffix)


def _common(masks: Sequence[Path], images: Sequence[_Image]) -> str:
    """The ending that all masks share beyond a name of an image, wherever it lies."""
    names = {place[-1] for one in images for place in one.places} | {one.uid for one in images}
    return common_suffix([Path(name) for name in names if name], [Path(stem(m)) for m in masks])


def _images(headers: Sequence[Header], base: Path, dimensions: int) -> Iterator[_Image]:
    if dimensions == 2:
        for one in headers:
            place = _place(one.path, base, dimensions)
            uid = one.keys["sopinstanceuid"]
            yield _Image(uid, one.patient, (one.path,), frozenset({place}))
        return
    series: dict[Key, list[Header]] = defaultdict(list)
    for one in headers:
        uid = one.keys["seriesinstanceuid"]
        series[one.patient, uid, "" if uid else str(one.path)].append(one)
    for (patient, uid, _), of in series.items():
        places = frozenset(_place(one.path, base, dimensions) for one in of)
        yield _Image(uid, patient, tuple(one.path for one in of), places)


def _place(path: Path, base: Path, dimensions: int) -> Parts:
    """Of a file its own place, of a slice of a volume that of its folder."""
    if dimensions == 2:
        return (*path.parent.relative_to(base).parts, stem(path))
    return path.parent.relative_to(base).parts or (base.name,)


class _Names:
    """Masks and images by all that they may be called."""

    def __init__(
        self, masks: Sequence[Path], folder: Path, images: Sequence[_Image], suffix: str
    ) -> None:
        whole = {mask: _place(mask, folder, 2) for mask in masks}
        places = {mask: (*of[:-1], of[-1].removesuffix(suffix)) for mask, of in whole.items()}
        self._images = _Tree({image: image.places for image in images})
        places = {mask: self._of_volume(place) for mask, place in places.items()}
        self._masks = _Tree({mask: [place] for mask, place in places.items()})
        self._place = places
        self._stems: dict[str, list[Path]] = defaultdict(list)
        for mask, place in places.items():
            self._stems[place[-1]].append(mask)
        self._uids: dict[str, set[_Image]] = defaultdict(set)
        for image in images:
            self._uids[image.uid].add(image)

    def _of_volume(self, place: Parts) -> Parts:
        """The folder of a series, for a mask in it that has its name, or none but the suffix."""
        inside = len(place) > 1 and place[-1] in ("", place[-2])
        return place[:-1] if inside and self._images.at([place[:-1]]) else place

    def of(self, image: _Image) -> list[Path]:
        """The masks that may be an image's, by the most exact of its names that any mask has."""
        if image.uid in self._stems and image.uid:
            return self._stems[image.uid]
        if exact := self._masks.at(image.places):
            return exact
        near = self._masks.near(image.places)
        return [mask for mask in near if not self._images.at([self._place[mask]])]

    def alone(self, mask: Path, image: _Image) -> bool:
        """Whether no other image may have the mask, which :meth:`of` gave for this one."""
        place = self._place[mask]
        if image.uid and place[-1] == image.uid:
            return len(self._uids[image.uid]) == 1
        images = self._images.at([place]) or self._images.near([place])
        return images == [image]


class _Tree(Generic[T]):
    """Things by their places: at one place, or where one place ends as another does."""

    def __init__(self, things: Mapping[T, Collection[Parts]]) -> None:
        self._at: dict[Parts, list[T]] = defaultdict(list)
        self._ending: dict[Parts, list[T]] = defaultdict(list)
        for thing, places in things.items():
            for place in places:
                self._at[place].append(thing)
                for start in range(1, len(place)):
                    self._ending[place[start:]].append(thing)

    def at(self, places: Iterable[Parts]) -> list[T]:
        """What lies at one of the places."""
        return _once(thing for place in places for thing in self._at.get(place, ()))

    def near(self, places: Iterable[Parts]) -> list[T]:
        """What lies where one of the places ends, or ends as one of them does."""
        ends = [(place, place[start:]) for place in places for start in range(len(place))]
        found = [thing for _, end in ends for thing in self._at.get(end, ())]
        found += [thing for place, end in ends if place == end for thing in self._ending[place]]
        return _once(found)


def _once(things: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(things))
