"""Masks that lie beside their images, told from them by what their names have beyond.

A name is that of a mask only where it has a word for masks beyond an image's name, or ends in what
the site says: ``P1_flair`` beside ``P1`` may be an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fedward import rule_codes
from fedward.errors import DataError
from fedward_client.data.channels import Cases, Channels
from fedward_client.data.files import IMAGE_FOLDERS, folder_of, stem, walk
from fedward_client.data.mask_suffix import common_suffix, endings, with_word


@dataclass(frozen=True)
class OneFolder:
    """Images and masks of one folder.

    Attributes
    ----------
    images, masks : tuple of Path
        The files; among masks are those that do not end in `suffix`.
    suffix : str
        What the names of masks end in.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    suffix: str


def one_folder(
    root: Path, formats: Collection[str], suffix: str, channels: Channels | None = None
) -> OneFolder:
    """Tell the masks of a dataset from its images, where masks have no folder.

    Parameters
    ----------
    root : Path
        The dataset.
    formats : collection of str
        What names of images and masks end in, in small letters.
    suffix : str
        What masks end in before that, as the site says; "": what all of them have in common.
    channels : mapping, optional
        Named channels; a file of one is no mask.

    Returns
    -------
    OneFolder
        Below the folder of images, where there is one.

    Raises
    ------
    DataError
        No name is that of a mask, or masks end in several ways.
    """
    base = folder_of(root, IMAGE_FOLDERS) or root
    files = [file for file in walk(base) if file.name.lower().endswith(tuple(formats))]
    cases = Cases.of(files, base, channels)
    others = cases.others if cases.places else files
    places = {file: file.relative_to(base).with_name(stem(file)) for file in others}
    known = {*cases.places.values()} or {*places.values()}
    own = with_word(places.values(), known)
    if not suffix:
        suffix = common_suffix(known - own, own)
        if not suffix:
            raise untold(endings(own, known - own))
    ended = {place for place in places.values() if place.name.endswith(suffix)}
    if not ended:
        raise untold(Counter())
    masks = {file for file, place in places.items() if place in own | ended}
    return OneFolder(tuple(f for f in files if f not in masks), tuple(sorted(masks)), suffix)


def untold(found: Counter[str]) -> DataError:
    """That masks cannot be told from images, with the endings that names have."""
    told = ", ".join(f"{word} ({count})" for word, count in found.most_common(3))
    beside = "name each mask as its image with an ending (P1_mask beside P1) and set masks.suffix"
    return DataError(
        "a dataset for segmentation must have masks that can be told from its images",
        value="no folder of masks",
        fix=f"Names end in {told} beyond an image's: set masks.suffix to the one that is meant"
        if told
        else f"Put images into images/ and masks into masks/ or labels/; or {beside}",
        where=rule_codes.NO_MASKS,
    )
