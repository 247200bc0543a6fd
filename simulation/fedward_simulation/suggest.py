"""``fedward-simulate plan suggest``: a plan by nnU-Net's rules, from what sites' images are like.

Each site counts its images (:mod:`fedward_client.data.fingerprint`) and lets go what its minimum
count allows; the rules see the sums. Source of the rules: Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z, supplementary note 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Final

from fedward.errors import DataError
from fedward_client.data.fingerprint import Fingerprint, fingerprint, intensity, quantile
from fedward_client.data.sample import Dataset
from fedward_client.data.survey import Survey
from fedward_simulation.first_study import task_of

_INIT: Final = "fedward-simulate init"
_GIB: Final = 2**30
# nnU-Net's reference: 32 channels, patches of 128³ and 2 of them in 8 GB. So the maps of all levels
# are there about a dozen times: two convolutions on either side, gradients, normalisation.
_COPIES: Final = 12
_DEEPEST: Final = 6  # levels
_SMALLEST: Final = 4  # pixels of a side at the last level
_LEAST: Final = 8  # pixels of a side of a patch
_MOST: Final = {2: 512, 3: 320}  # channels
_UNEVEN: Final = 3.0  # times that one axis is coarser, or one class more frequent, than others
_WHOLE: Final = 0.975  # share of the images that a patch must hold whole, to do without patches
_SHARE: Final = 0.05  # of the pixels of all images, the most that a step may see


@dataclass(frozen=True)
class Shape:
    """What the rules make of sizes, spacings and memory.

    Attributes
    ----------
    spacing : tuple of float
        Target, mm; () where the files state none.
    median, patch : tuple of int
        Sides of the median image at that spacing, and of what the network sees.
    whole : bool
        Whether nearly all images fit into a patch.
    widths : tuple of int
        Channels of each level.
    batch : int
        Patches in a step.
    memory : float
        GiB that a step may take, about.
    """

    spacing: tuple[float, ...]
    median: tuple[int, ...]
    patch: tuple[int, ...]
    whole: bool
    widths: tuple[int, ...]
    batch: int
    memory: float


def choose(
    found: Survey,
    data: Mapping[str, Dataset],
    parts: Mapping[str, str],
    *,
    memory: float,
    least: int,
    private: bool,
) -> Mapping[str, str]:
    """The sections of a plan that follow from the data.

    Parameters
    ----------
    found : Survey
        What the data are for.
    data : mapping
        Of each hospital.
    parts : mapping
        The sections of a first plan.
    memory : float
        GiB of the smallest device that trains.
    least : int
        Patients below which a site counts nothing.

    Raises
    ------
    DataError
        Every site has fewer patients than that.
    """
    task = task_of(found)
    told = [fingerprint(one.samples, task).released(least) for one in data.values()]
    there = [one for one in told if one is not None and all(one.sides)]
    if not there:
        raise DataError(
            "a plan is suggested from images of sites that may count them",
            value=f"{len(data)} sites of fewer than {least} patients",
            fix="Bring more patients, lower --minimum-count, or use `fedward-simulate init`",
        )
    whole: Fingerprint = reduce(add, there)
    ours = {name: one.replace(_INIT, f"{_INIT[:-4]}plan suggest") for name, one in parts.items()}
    if not task.has_masks:
        weights = () if task.multi_label else _class_weights(whole)
        return ours | {"training": _weighted(parts["training"], weights)}
    shape = shape_for(whole, memory)
    return ours | {
        "preprocessing": _preprocessing(whole, shape, file_range=found.format != "folders"),
        "model": _model(shape, memory),
        "training": _training(shape, private=private),
    }


# Rules of nnU-Net.


def shape_for(whole: Fingerprint, memory: float) -> Shape:
    """Spacing, patch, levels, widths and batch for images like these, in so much memory (GiB)."""
    spacing = _target(whole)
    scale = [1.0] * len(whole.sides)
    if spacing:
        own = [quantile(one, 0.5) for one in whole.spacings]
        scale = [a / b for a, b in zip(own, spacing, strict=True)]
    median, largest = (
        tuple(
            max(1, round(quantile(one, share) * f))
            for one, f in zip(whole.sides, scale, strict=True)
        )
        for share in (0.5, _WHOLE)
    )
    base = 32 if memory >= 1 else 16 if memory >= 0.25 else 8
    sides = [max(_LEAST, side) for side in median]
    while True:
        levels = _levels(sides)
        step = 2 ** (levels - 1)
        patch = tuple(min(1024 // step * step, -(-side // step) * step) for side in sides)
        widths = tuple(min(base * 2**k, _MOST[len(sides)]) for k in range(levels))
        one = bytes_of(patch, widths)
        if 2 * one <= memory * _GIB or max(patch) <= 2 * _LEAST:
            break
        # The side shrinks that is longest beside the image's own.
        axis = max(range(len(sides)), key=lambda k: sides[k] / max(1, median[k]))
        sides[axis] = max(_LEAST, min(patch[axis], sides[axis]) - step)
    seen = _SHARE * whole.images * math.prod(median) / math.prod(patch)
    batch = int(max(2, min(memory * _GIB // one, seen, 16)))
    fits = all(side <= limit for side, limit in zip(largest, patch, strict=True))
    return Shape(spacing, median, patch, fits, widths, batch, batch * one / _GIB)


def _target(whole: Fingerprint) -> tuple[float, ...]:
    """The median spacing; of an axis that is much coarser than the others its 10th percentile."""
    if not all(sum(one.values()) > whole.images / 2 for one in whole.spacings):
        return ()
    found = [quantile(one, 0.5) for one in whole.spacings]
    coarse = found.index(max(found))
    others = [value for k, value in enumerate(found) if k != coarse]
    side = quantile(whole.sides[coarse], 0.5)
    few = all(side * _UNEVEN < quantile(one, 0.5) for one in _without(whole.sides, coarse))
    if len(found) == 3 and found[coarse] > _UNEVEN * max(others) and few:
        found[coarse] = max(max(others), quantile(whole.spacings[coarse], 0.1))
    return tuple(float(f"{value:.3g}") for value in found)


def _without(axes: Sequence[dict[int, int]], place: int) -> list[dict[int, int]]:
    return [one for k, one in enumerate(axes) if k != place]


def _levels(sides: Sequence[int]) -> int:
    """As often as the shortest side can be halved until four pixels are left, and one."""
    halvings = int(math.log2(max(1.0, min(sides) / _SMALLEST)))
    return min(_DEEPEST, max(3, halvings + 1))


def bytes_of(patch: Sequence[int], widths: Sequence[int]) -> int:
    """Memory that training on one patch takes, about."""
    pixels = math.prod(patch)
    maps = sum(width * pixels / 2 ** (len(patch) * k) for k, width in enumerate(widths))
    return int(4 * _COPIES * maps)


# The plan's sections, each choice with its reason.


def _preprocessing(whole: Fingerprint, shape: Shape, *, file_range: bool) -> str:
    median = " × ".join(map(str, shape.median))
    lines = ["[preprocessing]"]
    if shape.spacing:
        lines += [
            "# The median spacing of the sites' images in mm (of an axis three times as coarse as",
            "# the others its 10th percentile).",
            f"spacing = {list(shape.spacing)}",
        ]
    lines += [
        f"# The median image has about {median} pixels"
        + (" at this spacing." if shape.spacing else "."),
        "# "
        + (
            "Nearly all images fit into this size."
            if shape.whole
            else "The network sees patches of this size, with the image's proportions where they "
            "fit."
        ),
        f"size = {list(shape.patch)}",
    ]
    colour = len(shape.patch) == 2 and 2 * whole.planes.get(3, 0) > whole.images
    lines.append(f"channels = {3 if colour else 1}")
    if 2 * whole.absolute > whole.images and whole.intensities:
        low, high = (intensity(whole, percent) for percent in (0.5, 99.5))
        lines += [
            "# Most images show air by their values, as CT does: percentiles 0.5 and 99.5 of what",
            "# masks mark.",
            f"window = [{low:g}, {max(high, low + 1):g}]",
        ]
    elif file_range:
        lines += [
            "# Values mean nothing by themselves: each image is scaled by its own percentiles.",
            "percentiles = [0.5, 99.5]",
        ]
    lines.append('intensity = "zscore"')
    if not shape.whole:
        lines += [
            "",
            "[preprocessing.patch]",
            "# A third of the patches is about a marked pixel; windows overlap by half.",
            "foreground = 0.33",
            "overlap = 0.5",
        ]
    lines += [
        "",
        "[preprocessing.augmentation]",
        "# nnU-Net's, with smaller turns: mirroring is left out, as sides may matter.",
        "rotate = 15",
        "scale = 0.2",
        "noise = 0.1",
        "blur = 1.0",
        "brightness = 0.25",
        "contrast = 0.25",
        "gamma = 0.3",
        "low_resolution = 0.3",
    ]
    return "\n".join(lines) + "\n"


def _model(shape: Shape, memory: float) -> str:
    most = _MOST[len(shape.patch)]
    return f"""\
# The U-Net of nnU-Net. It has {len(shape.widths)} levels: the shortest side is halved until about
# {_SMALLEST} pixels are left. Widths double from level to level, up to {most}. They begin at 32,
# with less than 1 GiB at 16, with less than 0.25 GiB at 8. A step of this plan takes about
# {shape.memory:.2g} GiB of the {memory:g} GiB that were stated.
[model]
name = "dynunet"
channels = {list(shape.widths)}
"""


def _training(shape: Shape, *, private: bool) -> str:
    what = "images" if shape.whole else "patches"
    return f"""\
[training]
# nnU-Net takes 250,000 steps. These are few: raise the rounds while the figures still improve.
rounds = {40 if private else 60}
learning_rate = 0.003
# Falls to nothing over the rounds, as (1 - t)^0.9.
schedule = "polynomial"
# What a hospital does in a round, and {what} in a step: what the memory holds, two at least, and
# {_SHARE:.0%} of all pixels at most.
local_steps = {4 if private else 10}
batch_size = {shape.batch}
optimizer = "adamw"
weight_decay = 1e-3
# Dice and cross-entropy together, as in nnU-Net.
loss = "dice_ce"
"""


def _class_weights(whole: Fingerprint) -> tuple[float, ...]:
    """By the root of how rare a class is, where one is three times as frequent as another."""
    shown = whole.classes
    if not min(shown) or max(shown) < _UNEVEN * min(shown):
        return ()
    rare = [1 / math.sqrt(n) for n in shown]
    return tuple(round(value * len(rare) / sum(rare), 2) for value in rare)


def _weighted(training: str, weights: Sequence[float]) -> str:
    if not weights:
        return training
    reason = "# Classes are of different frequency: each weighs by the root of how rare it is.\n"
    lines = training.splitlines(keepends=True)
    place = next(k for k, line in enumerate(lines) if line.startswith("loss ="))
    lines.insert(place + 1, f"{reason}class_weights = {list(weights)}\n")
    return "".join(lines)
