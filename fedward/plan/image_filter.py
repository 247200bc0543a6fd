"""Which DICOM images are taken, by what their headers say: patterns of a plan or of a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Final

from pydantic import Field

Pattern = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^!?[^!]")]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=32)]

# Keys, and the attributes that they are about.
ATTRIBUTES: Final = {
    "series_description": "SeriesDescription",
    "image_type": "ImageType",
    "body_part": "BodyPartExamined",
    "intent": "PresentationIntentType",
    "kernel": "ConvolutionKernel",
}
HOW: Final = (
    "patterns (`*` and `?`, any case), of which one value must match one, and none may match one "
    "that begins with `!`"
)


def accepts(patterns: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> bool:
    """Whether an image's values fit the patterns of every key.

    Parameters
    ----------
    patterns : mapping
        Key of :data:`ATTRIBUTES` to its patterns; none takes everything.
    values : mapping
        Key to what the image says; what says nothing fits no pattern without `!`.
    """
    return all(_fits(own, values.get(key, ())) for key, own in patterns.items())


def _fits(patterns: Sequence[str], values: Sequence[str]) -> bool:
    wanted = [one for one in patterns if not one.startswith("!")]
    if any(_matches(value, one[1:]) for one in patterns if one[0] == "!" for value in values):
        return False
    return not wanted or any(_matches(value, one) for one in wanted for value in values)


def _matches(value: str, pattern: str) -> bool:
    return fnmatchcase(value.strip().casefold(), pattern.casefold())
