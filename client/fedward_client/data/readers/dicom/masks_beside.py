"""Masks that lie among the DICOM files of their images, told from other pictures by their names.

``P1/IM0001_mask.png`` is beside ``P1/IM0001.dcm``. Of a volume in ``P1/T1/``, ``P1/T1_seg.nii.gz``
is beside its folder, ``P1/T1/T1_seg.nii.gz`` and ``P1/T1/seg.nii.gz`` are in it. Archives export
previews too, so only a word for masks, or what the site says, makes a mask of a picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedward_client.data.files import stem
from fedward_client.data.mask_suffix import is_word
from fedward_client.data.one_folder import OneFolder, untold
from fedward_client.data.options import TABLES
from fedward_client.data.readers.images import is_picture
from fedward_client.data.readers.nifti import is_nifti


def masks_beside(
    files: Iterable[Path], base: Path, dimensions: int, suffix: str
) -> OneFolder | None:
    """Tell masks from all else of a tree of DICOM files.

    Parameters
    ----------
    files : iterable of Path
        Below `base`; what is neither picture, NIfTI nor table is taken for DICOM, unread.
    dimensions : int
        2: masks are of files, pictures or NIfTI; 3: NIfTI, of folders.
    suffix : str
        What masks end in before their format, as the site says; "": what all of them have beyond
        the name of an image.

    Returns
    -------
    OneFolder or None
        Its images are all files that are no masks; None: no name is that of a mask.

    Raises
    ------
    DataError
        Masks end in several ways.
    """
    files = list(files)
    named = [f for f in files if is_nifti(f) or (dimensions == 2 and is_picture(f))]
    others = [f for f in files if not (is_nifti(f) or is_picture(f) or f.name in TABLES)]
    known = {f.with_name(stem(f)) if dimensions == 2 else f.parent for f in others} - {base}
    if not suffix:
        words = {file: {*_endings(file, known, dimensions)} for file in named}
        masks = {file: found for file, found in words.items() if found}
        shared = set.intersection(*masks.values()) if masks else {""}
        if len(shared) != 1:
            raise untold(Counter(min(found, key=len) for found in masks.values()))
        (suffix,) = shared
    masked = tuple(file for file in named if suffix and stem(file).endswith(suffix))
    if not masked:
        return None
    return OneFolder(tuple(f for f in files if f not in {*masked}), masked, suffix)


def _endings(file: Path, known: set[Path], dimensions: int) -> Iterator[str]:
    """What a name has beyond each image's that it may be of, where that is a word for masks."""
    name, folder = stem(file), file.parent
    starts = [end for end in range(1, len(name)) if folder / name[:end] in known]
    if dimensions == 3 and folder in known:
        starts += [0] + [len(folder.name)] * name.startswith(folder.name)
    yield from (name[start:] for start in starts if is_word(name[start:]))
