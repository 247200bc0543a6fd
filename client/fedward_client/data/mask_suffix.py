"""What the names of masks have beyond those of their images: ``IM1_mask.png`` is of ``IM1.png``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Final

NNUNET: Final = "_0000"
"""What nnU-Net ends the name of an image of one channel in; its label map has the rest."""

# `P1` with `2` or `_2` beyond it may be another patient or scan, `Smith` with `ers` another name.
_MARK: Final = re.compile(r"\D*[^\W\d_]{2}\D*")
_WORD: Final = re.compile(
    r"(?<![a-z])(masks?|seg|segmentations?|labels?|annotations?|gt|ground.?truth|roi)(?![a-z])",
    re.IGNORECASE,
)


def common_suffix(images: Collection[Path], masks: Collection[Path]) -> str:
    """What every mask's name has beyond the name of an image.

    Parameters
    ----------
    images, masks : collection of Path
        Folder and name, without the format.

    Returns
    -------
    str
        "" where masks have the names of images or do not end alike, where the ending has a digit
        or is neither set apart nor a word for masks, and where there are several ways to take the
        names apart: then only the site can tell which image is meant.
    """
    if not masks or {*masks} & {*images}:
        return ""
    known, first = {*images}, min(masks)
    found = {
        suffix
        for suffix in _beyond(known, first)
        if _is_mark(suffix, len(masks))
        and all(one.name.endswith(suffix) for one in masks)
        and {without(one, suffix) for one in masks} <= known
    }
    return found.pop() if len(found) == 1 else ""


def _is_mark(suffix: str, masks: int) -> bool:
    if not _MARK.fullmatch(suffix):
        return False
    return bool(_WORD.search(suffix)) or (masks > 1 and not suffix[0].isalnum())


def in_words(suffix: str, masks: int) -> str:
    """How masks were told from images, where the site did not say it."""
    return f'names of masks end in "{suffix}" ({masks}); masks.suffix can say otherwise'


def has_word(name: str) -> bool:
    """Whether a name has a word for masks."""
    return bool(_WORD.search(name))


def is_word(suffix: str) -> bool:
    """Whether an ending without digits is, or has, a word for masks."""
    return bool(_MARK.fullmatch(suffix) and _WORD.search(suffix))


def with_word(names: Collection[Path], images: Collection[Path]) -> set[Path]:
    """The names that have a word for masks beyond that of an image in their folder."""
    known = {*images}
    return {one for one in names if any(map(_WORD.search, _beyond(known, one)))}


def image_suffix(images: Collection[Path], masks: Collection[Path]) -> str:
    """:data:`NNUNET`, where all images end so, no mask does, and each mask has an image's rest."""
    names = {one.name for one in images}
    if not names or not all(name.endswith(NNUNET) for name in names):
        return ""
    return NNUNET if {*masks} <= {without(one, NNUNET) for one in images} else ""


def without(place: Path, suffix: str) -> Path:
    """A place whose name has lost its suffix."""
    name = place.name.removesuffix(suffix)
    return place.with_name(name) if name else place


def endings(names: Collection[Path], others: Collection[Path]) -> Counter[str]:
    """How many names have each ending beyond the longest name of others in their folder."""
    known = {*others}
    return Counter(min(found, key=len) for one in names if (found := _beyond(known, one)))


def _beyond(known: set[Path], place: Path) -> list[str]:
    """What a name has beyond each known one that it begins with."""
    ends = range(1, len(place.name))
    return [place.name[end:] for end in ends if place.with_name(place.name[:end]) in known]
