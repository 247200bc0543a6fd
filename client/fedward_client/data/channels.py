"""Several images of one patient as the named channels of one: planes of a file, or files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Preprocessing
from fedward_client.data.options import ChannelOptions
from fedward_client.data.sample import Dataset, Image, LeftOut, Sample

_SAME: Final = 1e-4  # mm between two grids that are one


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
        Without those that are missing. The grid is that of the first.
    """

    parts: tuple[Part, ...]

    def __call__(self) -> Image:
        first = self.parts[0].load()
        read = {self.parts[0].load: first}
        for part in self.parts[1:]:
            if part.load not in read:
                read[part.load] = registered(part.load(), first)
        planes = [_plane(read[part.load], part.plane) for part in self.parts]
        if len(read) > 1:  # one window is not another's
            first = replace(first, window=None, lookup=None)
        return replace(first, pixels=np.stack(planes), names=self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the channels that there are."""
        return tuple(part.name for part in self.parts)

    def identity(self) -> str:
        """A digest that changes when a file, or what is taken of it, does."""
        told = [(part.name, part.plane, _identity(part.load)) for part in self.parts]
        return hashlib.sha256(repr(told).encode("utf-8", "surrogateescape")).hexdigest()


def registered(image: Image, to: Image) -> Image:
    """An image on another one's grid: linear, its border repeated where it does not reach.

    Raises
    ------
    DataError
        "channels of different size", where the files do not say where they lie; "channels of
        different places": volumes have nothing in common.
    """
    shape, wanted = image.pixels.shape[1:], to.pixels.shape[1:]
    if image.affine is None or to.affine is None:
        if shape != wanted:
            raise rule_codes.unusable(rule_codes.CHANNEL_SHAPE)
        return image
    if shape == wanted and np.allclose(image.affine, to.affine, atol=_SAME):
        return image
    ends = [_box(one, sides) for one, sides in ((image.affine, shape), (to.affine, wanted))]
    if (ends[0][1] < ends[1][0]).any() or (ends[1][1] < ends[0][0]).any():
        raise rule_codes.unusable(rule_codes.CHANNEL_POSITION)
    # Workers that read headers import this module, and need neither.
    import torch
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import SpatialResample

    own = MetaTensor(torch.from_numpy(image.pixels), affine=torch.from_numpy(image.affine))
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True)
    moved = resample(own, dst_affine=torch.from_numpy(to.affine), spatial_size=wanted)
    return replace(to, pixels=np.asarray(moved.numpy(), np.float32), window=image.window)


def _box(
    affine: NDArray[np.float64], shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest corner of a volume, RAS mm."""
    corners = np.array([(*c, 1.0) for c in product(*((-0.5, n - 0.5) for n in shape))])
    found = (corners @ affine.T)[:, :3]
    return found.min(0), found.max(0)


def _identity(load: Callable[[], Image]) -> str:
    identity: Callable[[], str] = getattr(load, "identity")  # noqa: B009
    return identity()


def _plane(image: Image, number: int) -> NDArray[np.float32]:
    if number >= len(image.pixels):
        raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
    plane: NDArray[np.float32] = image.pixels[number]
    return plane


@dataclass(frozen=True)
class Cases:
    """Files of which several are channels of one image.

    Attributes
    ----------
    files : mapping
        The file that stands for each case, that of its first channel, to its channels by name; to
        nothing where channels have no files of their own.
    places : mapping
        The case of each: its path within the dataset, without what tells the channel.
    others : tuple of Path
        Files of no channel.
    """

    files: Mapping[Path, Mapping[str, Path]]
    places: Mapping[Path, Path] = field(default_factory=dict)
    others: tuple[Path, ...] = ()
    channels: Channels = field(default_factory=dict)

    @classmethod
    def of(cls, files: Sequence[Path], root: Path, channels: Channels | None) -> Cases:
        """Put together which files of a folder are of one case.

        A file whose name two channels claim is of the one with the longer suffix.
        """
        own = {name: one for name, one in (channels or {}).items() if one.by_file}
        if not own:
            return cls({file: {} for file in files})
        cases: dict[Path, dict[str, Path]] = {}
        others = []
        longest = sorted(own.items(), key=lambda item: -len(item[1].suffix))
        for file in files:
            found = ((name, one.place(file.relative_to(root))) for name, one in longest)
            name, place = next(((n, p) for n, p in found if p is not None), ("", None))
            if place is None or name in cases.get(place, {}):
                others.append(file)
            else:
                cases.setdefault(place, {})[name] = file
        made = {
            place: {name: some[name] for name in own if name in some}
            for place, some in cases.items()
        }
        first = {next(iter(some.values())): (place, some) for place, some in made.items()}
        return cls(
            {file: some for file, (_, some) in first.items()},
            {file: place for file, (place, _) in first.items()},
            tuple(others),
            own,
        )

    def keys(self, names: Mapping[Path, tuple[str, ...]]) -> dict[Path, tuple[str, ...]]:
        """What tables may call each image: its case, where it has several files, then its file."""
        alike = Counter(place.name for place in self.places.values())
        made = {}
        for file, own in names.items():
            place = self.places.get(file)
            case = () if place is None else (place.as_posix(),)
            loose = (place.name,) if place is not None and alike[place.name] == 1 else ()
            made[file] = tuple(dict.fromkeys((*case, *loose, *own)))
        return made

    def with_files(
        self, file: Path, made: Sample | str, load: Callable[[Path], Callable[[], Image]]
    ) -> Sample | str:
        """The sample of a case, which reads all of its files."""
        image = self.image(file, load)
        return made if isinstance(made, str) or image is None else replace(made, load=image)

    def image(self, file: Path, load: Callable[[Path], Callable[[], Image]]) -> ChannelImage | None:
        """What reads the channels of a case; None where they have no files of their own."""
        some = self.files[file]
        if not some:
            return None
        parts = (Part(name, load(path), self.channels[name].plane) for name, path in some.items())
        return ChannelImage(tuple(parts))

    def left_out(self, root: Path) -> tuple[LeftOut, ...]:
        """The files of no channel."""
        names = (path.relative_to(root).as_posix() for path in self.others)
        return tuple(LeftOut(rule_codes.NOT_SELECTED, name) for name in names)


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
        parts = tuple(Part(name, sample.load, one.plane) for name, one in some.items())
        if isinstance(sample.load, ChannelImage):  # of several files
            parts = tuple(part for part in sample.load.parts if part.name in some)
        if parts:
            samples.append(replace(sample, load=ChannelImage(parts)))
        else:
            left_out.append(LeftOut(rule_codes.CHANNEL_MISSING, sample.patient))
    return replace(dataset, samples=tuple(samples), left_out=tuple(left_out))


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
    """An image with the channels that it has, by name.

    Raises
    ------
    DataError
        "channel missing": it has none; "shape does not fit the task": it has no such plane.
    """
    if image.names:  # of several files
        kept = tuple(name for name in image.names if name in channels)
        if not kept:
            raise rule_codes.unusable(rule_codes.CHANNEL_MISSING)
        pixels = image.pixels[[image.names.index(name) for name in kept]]
        return replace(image, pixels=pixels, names=kept)
    planes = [_plane(image, one.plane) for one in channels.values()]
    if not planes:
        raise rule_codes.unusable(rule_codes.CHANNEL_MISSING)
    return replace(image, pixels=np.stack(planes), names=tuple(channels))


def names_of(sample: Sample) -> tuple[str, ...]:
    """The channels that an image has by its cohort; () for one whose channels have no names."""
    load = getattr(sample.load, "load", sample.load)
    return load.names if isinstance(load, ChannelImage) else ()


def lacks_too_much(names: Sequence[str], prep: Preprocessing) -> bool:
    """Whether an image with these channels is left out: it lacks one that it must have, or all."""
    if any(one.missing == "leave-out" and one.name not in names for one in prep.channel):
        return True
    return not any(one.name in names for one in prep.channel)


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
