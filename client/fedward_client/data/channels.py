"""Several images of one patient as the named channels of one: planes of a file, or files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Preprocessing
from fedward_client.data.sample import Dataset, Image, LeftOut, Sample
from fedward_client.data.transforms import lacks_too_much

_YES: Final = frozenset({"1", "1.0", "yes", "true"})


@dataclass(frozen=True)
class ChannelOptions:
    """Where a channel of a dataset's images is.

    Attributes
    ----------
    plane : int
        Of the image's file, from 0.
    missing : str
        Column of a table that says, with 1, yes or true, that an image lacks the channel, whatever
        its file holds in its place; "": no image does.
    """

    plane: int
    missing: str = ""

    def lacking(self, cells: Mapping[str, str]) -> bool:
        """Whether a table says that an image lacks it; `cells` by name in lower case."""
        text = cells.get(self.missing.strip().casefold(), "")
        return bool(self.missing) and text.strip().casefold() in _YES


Channels = Mapping[str, ChannelOptions]


@dataclass(frozen=True)
class Part:
    """One channel: its name, what reads the file that it is in, and its plane there."""

    name: str
    load: Callable[[], Image]
    plane: int


@dataclass(frozen=True)
class ChannelImage:
    """Reads the channels that an image has as one image.

    Attributes
    ----------
    parts : tuple of Part
        Without those that are missing; of one grid.
    """

    parts: tuple[Part, ...]

    def __call__(self) -> Image:
        read = {part.load: part.load() for part in self.parts}
        first = read[self.parts[0].load]
        planes = [_plane(read[part.load], part.plane) for part in self.parts]
        names = tuple(part.name for part in self.parts)
        return replace(first, pixels=np.stack(planes), names=names)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the channels that there are."""
        return tuple(part.name for part in self.parts)

    def identity(self) -> str:
        """A digest that changes when a file, or what is taken of it, does."""
        told = [(part.name, part.plane, _identity(part.load)) for part in self.parts]
        return hashlib.sha256(repr(told).encode("utf-8", "surrogateescape")).hexdigest()


def _identity(load: Callable[[], Image]) -> str:
    identity: Callable[[], str] = getattr(load, "identity")  # noqa: B009
    return identity()


def _plane(image: Image, number: int) -> NDArray[np.float32]:
    if number >= len(image.pixels):
        raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
    plane: NDArray[np.float32] = image.pixels[number]
    return plane


def with_channels(dataset: Dataset, channels: Channels) -> Dataset:
    """A dataset whose images have named channels; what has none of them is left out.

    Raises
    ------
    DataError
        No table has a column that says which images lack a channel.
    """
    samples: list[Sample] = []
    left_out = list(dataset.left_out)
    own = there(channels, [sample.columns for sample in dataset.samples])
    for sample, some in zip(dataset.samples, own, strict=True):
        if some:
            parts = tuple(Part(name, sample.load, one.plane) for name, one in some.items())
            samples.append(replace(sample, load=ChannelImage(parts)))
        else:
            left_out.append(LeftOut(rule_codes.CHANNEL_MISSING, sample.patient))
    return Dataset(tuple(samples), tuple(left_out))


def there(channels: Channels, cells: Sequence[Mapping[str, str]]) -> list[Channels]:
    """The channels that each image has, by what a table says of it.

    Raises
    ------
    DataError
        No image has a column that says which of them lack a channel.
    """
    rows = [{name.strip().casefold(): text for name, text in one.items()} for one in cells]
    known = {name for row in rows for name in row}
    for name, one in channels.items():
        if one.missing and one.missing.strip().casefold() not in known and rows:
            raise DataError(
                "a table must have the column that tells which images lack a channel",
                value=one.missing,
                fix=f"Correct channels.{name}.missing, or add the column to the table",
                where=f"channels.{name}.missing",
            )
    return [{name: one for name, one in channels.items() if not one.lacking(row)} for row in rows]


def planes_of(image: Image, channels: Channels) -> Image:
    """An image with the channels that it has, by name."""
    planes = [_plane(image, one.plane) for one in channels.values()]
    if not planes:
        raise rule_codes.unusable(rule_codes.CHANNEL_MISSING)
    return replace(image, pixels=np.stack(planes), names=tuple(channels))


def names_of(sample: Sample) -> tuple[str, ...]:
    """The channels that an image has by its cohort; () for one whose channels have no names."""
    load = getattr(sample.load, "load", sample.load)
    return load.names if isinstance(load, ChannelImage) else ()


def missing_in(sample: Sample, prep: Preprocessing) -> tuple[str, ...]:
    """The plan's channels that an image lacks."""
    names = names_of(sample)
    return tuple(one.name for one in prep.channel if one.name not in names) if names else ()


def dropped(samples: Iterable[Sample], prep: Preprocessing) -> Counter[str]:
    """How many of the images that are used lack each channel."""
    used = (sample for sample in samples if names_of(sample))
    kept = [sample for sample in used if not lacks_too_much(names_of(sample), prep)]
    return Counter(name for sample in kept for name in missing_in(sample, prep))


def drops(samples: Sequence[Sample], prep: Preprocessing) -> Iterator[str]:
    """What is put in the place of channels that images lack, in words that name nobody."""
    for name, count in sorted(dropped(samples, prep).items()):
        yield f"channel {name} is zeros in {count} of {len(samples)} images, which lack it"
