"""Prepare a few images of a cohort for a plan, to estimate the rest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.plan.schema import Plan
from fedward_client.data.quiet import quiet
from fedward_client.data.sample import Image, PreparedSite, Sample
from fedward_client.data.table_rows import rows_of
from fedward_client.data.transforms import Prepared, grid_for, prepare_image
from fedward_client.data.volumes import Volumes, as_objects

# A few samples that stand for all.


def spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many samples, in turn from each label, and evenly from the samples of a label.

    The choice depends on the order of the samples alone, so that a page can be made again.
    """
    groups: dict[tuple[int, ...] | None, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        groups[sample.label].append(number)
    chosen: list[int] = []
    for share, group in zip(
        _shares([len(g) for g in groups.values()], most), groups.values(), strict=True
    ):
        chosen += [group[k * len(group) // share] for k in range(share)]
    return [samples[number] for number in sorted(chosen)]


def _shares(sizes: Sequence[int], most: int) -> list[int]:
    """How many to take of each: in turn, until there are enough or nothing is left."""
    shares, left = [0] * len(sizes), min(most, sum(sizes))
    while left:
        for place, size in enumerate(sizes):
            if left and shares[place] < size:
                shares[place], left = shares[place] + 1, left - 1
    return shares


_MOST: Final = 16  # images
_PIXELS: Final = 1 << 22  # of all of them, once prepared


@dataclass
class Probe:
    """What was seen.

    Attributes
    ----------
    of : int
        Images that there are.
    tried, done : int
        Those that were tried, and those of them that could be prepared.
    prepared : list of Prepared
        Some of them as the model takes them.
    samples : list of Sample
        Where these come from.
    lost : list of float
        Of each mask, the share of what it marks that the plan's crop cuts off, where it does.
    left_out : Counter
        Images that cannot be prepared, by reason.
    enlarged : int
        Images that have a side shorter than the plan's size.
    outside : int
        Images without a pixel inside the plan's window.
    unmeasured : int
        Images that state no spacing.
    labels : set of int
        Values of the masks.
    sides : list of tuple
        The sides of each image after resampling, before anything is cut off.
    """

    of: int = 0
    tried: int = 0
    done: int = 0
    lost: list[float] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    enlarged: int = 0
    outside: int = 0
    unmeasured: int = 0
    labels: set[int] = field(default_factory=set)
    sides: list[tuple[int, ...]] = field(default_factory=list)


def probe(samples: Sequence[Sample], plan: Plan, *, every: bool = False) -> Probe:
    """Prepare some of the samples, evenly over the classes, or every one of them."""
    found = Probe(of=len(samples))
    size = plan.preprocessing.channels * int(np.prod(plan.preprocessing.size))
    most = max(2, min(_MOST, _PIXELS // size))
    with quiet():
        for sample in samples if every else spread(samples, most):
            # Whole images are as large as they are: two of them have to do where they are large.
            full = sum(p.pixels.size for p in found.prepared) > _PIXELS
            enough = len(found.prepared) >= most or (len(found.prepared) > 1 and full)
            if enough and not every:
                break
            found.tried += 1
            try:
                _look(sample, plan, found, keep=not enough)
            except Exception as error:
                # One bad file must not stop a check, whatever its decoder raises.
                found.left_out[rule_codes.reason_of(error)] += 1
    return found


def _look(sample: Sample, plan: Plan, found: Probe, *, keep: bool) -> None:
    image = sample.load()
    mask = sample.mask() if sample.mask is not None else None
    ready = prepare_image(image, mask, plan.task, plan.preprocessing, sample.boxes)
    found.done += 1
    if keep:
        found.prepared.append(ready)
        found.samples.append(sample)
    if ready.lost:
        found.lost.append(ready.lost)
    found.sides.append(_sides(image, plan))
    size = plan.preprocessing.size
    found.enlarged += any(n < t for n, t in zip(found.sides[-1], size, strict=True))
    found.outside += _is_outside(image, plan)
    found.unmeasured += not image.measured
    if ready.mask is not None:
        found.labels |= set(np.unique(ready.mask).tolist())


def _sides(image: Image, plan: Plan) -> tuple[int, ...]:
    """How many pixels an image has along its sides, after resampling to a spacing."""
    prep, sides = plan.preprocessing, tuple(image.pixels.shape[1:])
    return sides if prep.spacing is None else grid_for(sides, image.spacing, prep).shape


def _is_outside(image: Image, plan: Plan) -> bool:
    window = plan.preprocessing.window
    if window is None:
        return False
    return bool(image.pixels.max() <= window[0] or image.pixels.min() >= window[1])


def as_site(found: Probe, plan: Plan) -> PreparedSite:
    """The prepared images as a site to train on, each of a patient of its own."""
    count = len(found.prepared)
    labels = [sample.label for sample in found.samples]
    targets: NDArray[Any]
    volumes = None
    images = as_objects(one.pixels for one in found.prepared)
    wholes = [one.whole for one in found.prepared if one.whole is not None]
    if wholes:
        targets = as_objects(one.mask for one in found.prepared if one.mask is not None)
        sides = np.array([one.sides for one in wholes])
        truth = as_objects(one.truth for one in wholes)
        volumes = Volumes(truth, sides, np.stack([one.marked for one in wholes]))
    elif not plan.task.has_labels:
        marked = [one.mask if plan.task.has_masks else one.boxes for one in found.prepared]
        targets = np.stack([one for one in marked if one is not None])
    elif plan.task.multi_label:
        targets = np.array(labels, np.float32)
    else:
        targets = np.array(labels, np.int64)[:, 0]
    none = np.empty(0, np.int64)
    return PreparedSite(
        name="check",
        images=images if wholes else np.stack(list(images)),
        targets=targets,
        patients=np.arange(count),
        spacing=np.array([one.spacing for one in found.prepared]),
        split={"train": np.arange(count), "validation": none, "test": none},
        volumes=volumes,
        table=_rows(found.samples, plan),
    )


def _rows(samples: Sequence[Sample], plan: Plan) -> NDArray[np.float32] | None:
    if plan.table is None:
        return None
    # Rows that the plan leaves out are told by the finding of their column; the time is the same.
    rows = rows_of(plan.table, [sample.columns for sample in samples])
    none = np.zeros(plan.table.width, np.float32)
    return np.stack([none if isinstance(row, str) else row for row in rows])
