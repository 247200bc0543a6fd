"""Detection: boxes of classes; right and wrong ones counted by score, and their figures.

A detection is right at an overlap if it takes a marked box of its class that no surer detection of
the image took and whose intersection over union with it is at least that (COCO's rule, Lin et al.
2014, arXiv:1405.0312). Sites count right and wrong detections by score, in hundredths; precision
and recall of all sites together follow from the sums. Within a bin the order of detections of
different images is lost: :func:`average_precision` gives the value for an even mixture, and the
least and the largest that any order could give. How boxes of one image hang together is lost too: a
site draws its images again and again (Efron, 1979, doi:10.1214/aos/1176344552), and sends how far
each figure then moves, from which the intervals follow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from fedward.tasks.base import (
    Boxes,
    BundleSpec,
    Counts,
    Floats,
    Ints,
    Measured,
    MetricSpec,
    Released,
    Tables,
    TaskSpec,
    agree,
    frozen,
    mean,
    numbers,
    permissions,
    project,
    ratio,
    same_names,
    whole,
)
from fedward.tasks.intervals import Interval, mean_of, spread_interval, wilson

if TYPE_CHECKING:
    from torch import Tensor

    from fedward.plan.schema import Task

STRIDES: Final = (8, 16, 32, 64)
"""Pixels of the input from one place of each level of a detector's output to the next."""
_ANCHOR: Final = 4  # strides that an anchor's side is long, as in RetinaNet
MOST_BOXES: Final = 256
"""Boxes that an image may have."""
BINS: Final = 100
OVERLAPS: Final = (0.1, *(round(0.5 + 0.05 * k, 2) for k in range(10)))
"""Overlaps at which a detection may be right."""
SURE: Final = 0.3
"""Score from which on a detection counts in ``box_f1``, and is told where a model is used."""
_PARTS: Final = {"at10": slice(0, 1), "at50": slice(1, 2), "above": slice(2, 11)}
_FALSE: Final = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # wrong detections an image: LUNA16's FROC
_RECALLS: Final = np.linspace(0.0, 1.0, 101)  # COCO's
_LEAST_SCORE: Final = 0.01
_CANDIDATES: Final = 300  # boxes of an image and class before the suppression of those that overlap
_SAME: Final = 0.5  # overlap at which two boxes of a class are of one thing
_FOUND: Final = 100  # detections of an image and class that count, as COCO has it
_F1_STEPS: Final = 1000  # an F1 is counted in thousandths
_FAR: Final = 1e5
_SLACK: Final = 1 + 1e-9
_RANKED: Final[Mapping[str, tuple[str, ...]]] = {
    "map50": ("at50",),
    "map50_95": ("at50", "above"),
    "map10": ("at10",),
    "froc": ("at10",),
}  # figures of detections in the order of their scores, and the arrays that each needs
_DRAWN: Final = 100  # times that a site's images are drawn again

Order = Literal["mixed", "best", "worst"]
_SHARE: Final[Mapping[Order, float]] = {"mixed": 0.5, "best": 0.0, "worst": 1.0}


def levels(size: Sequence[int]) -> list[tuple[int, ...]]:
    """Places of each level of a detector's output for an input of this size."""
    return [tuple(-(-side // stride) for side in size) for stride in STRIDES]


def anchors(size: Sequence[int]) -> Floats:
    """The boxes that a detector's outputs start from: one cube at each place.

    Parameters
    ----------
    size : sequence of int
        Of the input, ``D`` sides.

    Returns
    -------
    NDArray
        ``(A, 2 D)`` lower and upper corners in pixels, level by level.
    """
    found = []
    for stride, places in zip(STRIDES, levels(size), strict=True):
        axes = [(np.arange(n) + 0.5) * stride for n in places]
        centres = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(size))
        half = stride * _ANCHOR / 2
        found.append(np.concatenate([centres - half, centres + half], axis=1))
    return np.concatenate(found)


def overlap(one: Floats, other: Floats) -> Floats:
    """Intersection over union of ``(n, 2 D)`` with ``(m, 2 D)`` boxes, ``(n, m)``."""
    d = one.shape[1] // 2
    low = np.maximum(one[:, None, :d], other[None, :, :d])
    high = np.minimum(one[:, None, d:], other[None, :, d:])
    both = (high - low).clip(min=0).prod(axis=2)
    sizes = [(boxes[:, d:] - boxes[:, :d]).prod(axis=1) for boxes in (one, other)]
    union = sizes[0][:, None] + sizes[1][None, :] - both
    shared: Floats = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return shared


def rightness(found: Boxes, truth: Floats) -> Ints:
    """At which of :data:`OVERLAPS` each detection of an image is right.

    Parameters
    ----------
    found : tuple
        Corners, falling scores and classes of detections.
    truth : NDArray
        ``(m, 2 D + 1)`` marked boxes, the last column the class, from 1.

    Returns
    -------
    NDArray
        ``(n, overlaps)`` of 0 and 1.
    """
    corners, _, classes = found
    limits = np.array(OVERLAPS)
    right = np.zeros((len(corners), len(limits)), np.int64)
    for k in np.unique(classes):
        own, marked = np.flatnonzero(classes == k), truth[truth[:, -1] == k + 1, :-1]
        if not len(marked):
            continue
        shared = overlap(corners[own], marked)
        free = np.ones((len(limits), len(marked)), bool)
        for place, row in zip(own, shared, strict=True):
            open_ = np.where(free, row, -1.0)
            best = open_.argmax(axis=1)
            taken = open_.max(axis=1) >= limits
            right[place] = taken
            free[np.flatnonzero(taken), best[taken]] = False
    return right


# The figures, from right and wrong detections by score.


@dataclass(frozen=True)
class _Curve:
    """Detections from the surest on: what is known at each right one, for one class."""

    recall: Floats
    wrong: Floats


def _curve(right: Ints, wrong: Ints, boxes: int, order: Order) -> _Curve:
    """Recall, and wrong detections before, at each right detection.

    The right detections of a bin are evenly among the wrong ones, or all before or behind them.
    """
    hits, misses = right[::-1], wrong[::-1]
    bins = np.repeat(np.arange(len(hits)), hits)
    place = np.arange(len(bins)) - (np.cumsum(hits) - hits)[bins]
    share = (place + 0.5) / hits[bins] if order == "mixed" else _SHARE[order]
    before = (np.cumsum(misses) - misses)[bins] + share * misses[bins]
    return _Curve(np.arange(1, len(bins) + 1) / boxes, before)


def average_precision(right: Ints, wrong: Ints, boxes: int, order: Order = "mixed") -> float:
    """Average precision: mean of the precision at 101 recalls, each the best at that or more.

    Parameters
    ----------
    right, wrong : NDArray
        ``(BINS,)`` detections of a class by rising score.
    boxes : int
        Marked boxes of the class; at least one.
    order : str
        Of detections within a bin: the value without bins lies between "worst" and "best".

    Returns
    -------
    float
        In 0 to 1, as COCO computes it (Lin et al. 2014, arXiv:1405.0312).
    """
    curve = _curve(right, wrong, boxes, order)
    found = np.arange(1, len(curve.recall) + 1)
    precision = np.maximum.accumulate((found / (found + curve.wrong))[::-1])[::-1]
    places = np.searchsorted(curve.recall, _RECALLS - 1e-12)
    there = places < len(precision)
    return float(precision[places[there]].sum() / len(_RECALLS))


def froc(right: Ints, wrong: Ints, boxes: int, images: int, order: Order = "mixed") -> float:
    """Mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 wrong detections an image.

    Parameters and errors of bins as for :func:`average_precision`. Source: LUNA16 (Setio et al.
    2017, doi:10.1016/j.media.2017.06.015).
    """
    curve = _curve(right, wrong, boxes, order)
    seen = [curve.recall[curve.wrong <= rate * images].max(initial=0.0) for rate in _FALSE]
    return float(np.mean(seen))


def _mean_over_classes(counts: Measured, name: str) -> float | None:
    return mean(counts.per_class(name))


def _interval_over_classes(counts: Measured, per_image: float, name: str) -> Interval | None:
    # The classes are of the same images: their distances to the limits are averaged.
    pairs = zip(counts.per_class(name), counts.class_intervals(name, per_image), strict=True)
    there = [(value, own) for value, own in pairs if value is not None and own is not None]
    return mean_of(there, independent=False)[1] if there else None


def _metric(
    name: str,
    label: str,
    array: str,
    table: str | None = None,
) -> MetricSpec:
    figure = partial(_mean_over_classes, name=name)
    interval = partial(_interval_over_classes, name=name)
    return MetricSpec(name, label, figure, interval, (array,), table, by_class=True, since=2)


_METRICS: Final = (
    _metric("map50", "mAP at IoU .5", "at50"),
    _metric("map50_95", "mAP at IoU .5 to .95", "above"),
    _metric("map10", "mAP at IoU .1", "at10"),
    _metric("froc", "FROC at IoU .1", "at10"),
    _metric("box_f1", "F1 of boxes", "f1", "box_f1"),
)
_PERMISSIONS: Final = permissions(_METRICS, lambda metric: metric.arrays)


@dataclass(frozen=True, eq=False)
class DetectionCounts(Counts):
    """Right and wrong detections by score, and marked boxes, of each of K classes.

    Attributes
    ----------
    scores : mapping
        ``at10``, ``at50``, ``above``: overlaps of :data:`OVERLAPS`; each ``(3, 2, T, K, BINS)``
        int64. First axis: detections; images that have one of them; images whose surest one it is.
        Second axis: right, wrong. The last two parts of the first axis do not leave a site.
    boxes : NDArray
        ``(2, K)`` int64: marked boxes, and images that have one.
    f1 : NDArray
        ``(2, K)`` float64: images in which a class is marked or found, and the sum of their F1 at
        IoU .5 of detections whose score is 0.3 or more.
    number : int
        Images.
    spread : NDArray
        ``(4, K)`` float64, of mAP at .5, at .5 to .95 and at .1, and of FROC: the variance of the
        figure of a site, times the square of its marked boxes. Over sites that weigh as much as
        they have boxes it adds up.
    """

    scores: Mapping[str, Ints]
    boxes: Ints
    f1: Floats
    number: int
    spread: Floats

    @classmethod
    def from_answers(cls, answers: Floats, targets: NDArray[Any]) -> DetectionCounts:
        """Count answers of images.

        Parameters
        ----------
        answers : NDArray
            See :meth:`_Detection.answers`.
        targets : NDArray
            ``(N, MOST_BOXES, 2 D + 1)``, the last column the class, from 1; 0: no box.
        """
        classes = answers.shape[1]
        images, kinds, _ = found = np.nonzero(np.isfinite(answers[..., 0]))
        rows = answers[found]
        bins = np.minimum((rows[:, 0] * BINS).astype(np.int64), BINS - 1)
        bits = rows[:, 1].astype(np.int64)
        scores = np.zeros((3, 2, len(OVERLAPS), classes, BINS), np.int64)
        for t in range(len(OVERLAPS)):
            for w, chosen in enumerate((bits >> t & 1 == 1, bits >> t & 1 == 0)):
                _tally(scores[:, w, t], images[chosen], kinds[chosen], bins[chosen])
        marked = _marked(targets, classes)
        f1 = f1_of(answers, targets)
        there = np.isfinite(f1)
        return cls(
            {name: frozen(scores[:, :, part].copy()) for name, part in _PARTS.items()},
            frozen(np.stack([marked.sum(axis=0), (marked > 0).sum(axis=0)]).astype(np.int64)),
            frozen(np.stack([there.sum(axis=0), np.where(there, f1, 0.0).sum(axis=0)])),
            len(answers),
            frozen(_spread(images, kinds, bins, bits, marked)),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> DetectionCounts:
        """Take counts from outside, trusting nothing (see :meth:`to_arrays`).

        Raises
        ------
        ProtocolError
            A name, a shape or a value is not that of any possible counts.
        """
        same_names(arrays, (*_PARTS, "boxes", "f1", "images", "spread"))
        boxes = whole("boxes", arrays["boxes"], (2, None))
        k, (number,) = boxes.shape[1], whole("images", arrays["images"], (1,))
        f1, spread = numbers("f1", arrays["f1"], (2, k)), arrays["spread"]
        spread = numbers("spread", spread, (len(_RANKED), k))
        scores = {
            name: whole(name, arrays[name], (3, 2, part.stop - part.start, k, BINS))
            for name, part in _PARTS.items()
        }
        agree(bool((boxes[1] <= boxes[0]).all()), "an image with a box must have one")
        agree(bool((boxes[1] <= number).all()), "no more images than there are can have boxes")
        agree(bool((f1[1] <= f1[0] * _SLACK).all()), "no F1 can pass 1")
        agree(bool((f1[0] <= number).all()), "no more images than there are can have an F1")
        agree(bool((spread <= boxes[0] ** 2 / 4 * _SLACK).all()), "no share can vary by more")
        for one in scores.values():
            right = one[0, 0].sum(axis=2)
            agree(bool((right <= boxes[0]).all()), "a box must be found once")
            agree(bool((one[1] <= one[0]).all()), "an image with a detection must have one")
            agree(bool((one[2] <= one[1]).all()), "the surest detection must be one")
            agree(bool((one[2].sum(axis=3) <= number).all()), "an image has one surest detection")
        return cls(
            {name: frozen(one) for name, one in scores.items()},
            frozen(boxes),
            frozen(f1),
            int(number),
            frozen(spread),
        )

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The counts as named arrays, ready to be sent."""
        images = np.array([self.number], np.int64)
        rest = {"boxes": self.boxes, "f1": self.f1, "images": images, "spread": self.spread}
        return {**self.scores, **rest}

    @property
    def classes(self) -> int:
        """Number of classes, K."""
        return int(self.boxes.shape[1])

    @property
    def images(self) -> int:
        """Images."""
        return self.number

    def merge(self, other: DetectionCounts) -> DetectionCounts:
        """The counts of both.

        Raises
        ------
        ProtocolError
            They are of different tasks.
        """
        agree(self.classes == other.classes, "counts that are merged must be of one task")
        return DetectionCounts(
            {name: frozen(one + other.scores[name]) for name, one in self.scores.items()},
            frozen(self.boxes + other.boxes),
            frozen(self.f1 + other.f1),
            self.number + other.number,
            frozen(self.spread + other.spread),
        )

    def per_class(self, name: str) -> list[float | None]:
        """The figure of each class; None for one that no image has."""
        if name == "box_f1":
            return [ratio(total, n) for n, total in self.f1.T]
        return self.bounds(name, "mixed")

    def bounds(self, name: str, order: Order) -> list[float | None]:
        """A figure of each class for an order of detections within a bin.

        What no bins would give lies between "worst" and "best".
        """
        rows = _RANKED[name]
        if not all(self._there(row) for row in rows):
            return [None] * self.classes
        found: list[float | None] = []
        for k, boxes in enumerate(self.boxes[0].tolist()):
            pairs = [
                (right, wrong)
                for row in rows
                for right, wrong in self.scores[row][0, :, :, k].swapaxes(0, 1)
            ]
            if not boxes:
                found.append(None)
            elif name == "froc":
                found.append(froc(*pairs[0], boxes, self.number, order))
            else:
                values = [average_precision(*pair, boxes, order) for pair in pairs]
                found.append(float(np.mean(values)))
        return found

    def class_intervals(self, name: str, per_image: float = 1.0) -> list[Interval | None]:
        """Intervals of 95 %; None of a class without a figure."""
        values = self.per_class(name)
        if name == "box_f1":
            rows = zip(values, self.f1[0], strict=True)
            return [None if value is None else wilson(value, n * per_image) for value, n in rows]
        boxes = np.maximum(self.boxes[0], 1)
        variances = self.spread[list(_RANKED).index(name)] / boxes**2 / per_image
        return [
            None if value is None else spread_interval(value, float(variance), n * per_image)
            for value, variance, n in zip(values, variances, self.boxes[1], strict=True)
        ]

    def gives(self, name: str) -> bool:
        """Whether the part that gives a figure is here, so was not withheld."""
        if name == "box_f1":
            return bool(self.f1[0].any())
        return bool(self.boxes.any()) and self._there(DETECTION.metric(name).arrays[0])

    def _there(self, row: str) -> bool:
        # A model that finds nothing at all has figures of 0 where the boxes are known.
        return bool(self.scores[row].any()) or not any(one.any() for one in self.scores.values())

    def held_to(self, task: Task) -> None:
        """Raise ProtocolError unless the classes are the task's."""
        agree(self.classes == len(task.classes), "counts must have the plan's classes")

    def are_of(self, images: int) -> bool:
        """Whether exactly so many images were counted."""
        return self.number == images

    def release(self, allowed: Collection[str], least: int, digits: int) -> Released:
        """The counts as they may leave; see :meth:`Counts.release`.

        Bins are merged until each holds detections of `least` images, right and wrong ones apart.
        """
        arrays = {name: np.array(array) for name, array in self.to_arrays().items()}
        withheld = {name for name, needed in _PERMISSIONS.items() if not needed <= set(allowed)}
        if self.number < least:
            withheld = set(_PERMISSIONS)
        few = (self.boxes[1] > 0) & (self.boxes[1] < least)
        if few.any():
            arrays["boxes"][:, few] = 0
            withheld.add("classes")
        if _PERMISSIONS.keys() <= withheld:
            arrays["boxes"][...] = 0
        for name in _PARTS:
            own = arrays[name]
            own[:, :, :, few] = 0
            own[0] = coarse(own, least)
            own[1:] = 0
        arrays["f1"][:, few | (arrays["f1"][0] < least)] = 0
        arrays["f1"][1] = np.minimum(arrays["f1"][1].round(digits), arrays["f1"][0])
        for name in withheld & arrays.keys():
            arrays[name][...] = 0
        spread, limit = arrays["spread"], arrays["boxes"][0] ** 2 / 4
        for row, needed in zip(spread, _RANKED.values(), strict=True):
            row[:] = 0 if withheld & {*needed} else np.minimum(row.round(digits), limit)
        return arrays, tuple(sorted(withheld))


def _tally(into: Ints, images: Ints, kinds: Ints, bins: Ints) -> None:
    """Add detections to ``(3, K, BINS)``; those of an image come from the surest on."""
    np.add.at(into[0], (kinds, bins), 1)
    each = np.unique(np.stack([images, kinds, bins]), axis=1)
    np.add.at(into[1], tuple(each[1:]), 1)
    _, first = np.unique(np.stack([images, kinds]), axis=1, return_index=True)
    np.add.at(into[2], (kinds[first], bins[first]), 1)


def coarse(counts: Ints, least: int) -> Ints:
    """Merge neighbouring bins until each holds detections of enough images.

    Parameters
    ----------
    counts : NDArray
        ``(3, 2, T, K, BINS)``, see :class:`DetectionCounts`.
    least : int
        Images.

    Returns
    -------
    NDArray
        ``(2, T, K, BINS)`` detections of the same sums. Of how many images a merged bin is, is not
        known; those of its fullest part, and those whose surest detection it holds, are different
        ones, so that the larger of both numbers is a lower bound.
    """
    made = np.zeros(counts.shape[1:], np.int64)
    for t, k in np.ndindex(*counts.shape[2:4]):
        right, wrong = counts[:, 0, t, k], counts[:, 1, t, k]
        area = float(_area(right[0], wrong[0]))
        made[1, t, k] = _laid(wrong, least, area, partial(_area, right[0]))
        made[0, t, k] = _laid(right, least, area, partial(_area, wrong=made[1, t, k]))
    return made


def _laid(counts: Ints, least: int, area: float, with_: Callable[[Ints], Floats]) -> Ints:
    """Merge the bins of one kind, each group where it keeps the area, the surest first.

    The middle of a group would draw the surest wrong detections to the bulk of the others, and the
    precision would come out points too high.
    """
    now: Ints = counts[0].copy()
    for bins in reversed(_groups(counts[0], counts[1], counts[2], least)):
        total, places = now[bins].sum(), np.arange(bins[0], bins[-1] + 1)
        now[bins] = 0
        tried = now + total * (np.arange(BINS) == places[:, None])
        now = tried[np.abs(with_(tried) - area).argmin()]
    return now


def _spread(images: Ints, kinds: Ints, bins: Ints, bits: Ints, marked: Ints) -> Floats:
    """:attr:`DetectionCounts.spread` of detections, each of an image and a class.

    The same images are drawn for the same number of them, so that counting again gives the same.
    """
    found = np.zeros((len(_RANKED), marked.shape[1]))
    count = len(marked)
    if count < 2:
        return found
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _DRAWN)
    drawn = drawn.astype(np.float64)
    for k in range(marked.shape[1]):
        own, boxes = kinds == k, drawn @ marked[:, k]
        there, areas, froc_ = boxes > 0, [], np.zeros(_DRAWN)
        for t in range(len(OVERLAPS)):
            each = np.zeros((2, count, BINS))
            np.add.at(each, (1 - (bits[own] >> t & 1), images[own], bins[own]), 1)
            right, wrong = drawn @ each[0], drawn @ each[1]
            areas.append(_area(right, wrong) / np.maximum(boxes, 1))
            if t == 0:
                froc_ = _seen(right, wrong, count) / np.maximum(boxes, 1)
        at10, *rest = areas
        values = np.stack([rest[0], np.mean(rest, axis=0), at10, froc_])[:, there]
        if there.sum() > 1:
            variance = values.var(axis=1) * count / (count - 1)
            found[:, k] = np.minimum(variance, 0.25) * marked[:, k].sum() ** 2
    return found


def _seen(right: Floats, wrong: Floats, images: int) -> Floats:
    """Mean of the boxes found at the rates of FROC; of rows of bins."""
    hits, misses = right[..., ::-1], wrong[..., ::-1]
    before = np.cumsum(misses, axis=-1) - misses / 2
    seen = np.cumsum(hits, axis=-1)
    each = [np.where(before <= rate * images, seen, 0.0).max(axis=-1) for rate in _FALSE]
    return np.asarray(np.mean(each, axis=0))


def _area(right: NDArray[Any], wrong: NDArray[Any]) -> Floats:
    """Sum over right detections of the best precision from there on; of rows of bins."""
    hits, misses = np.broadcast_arrays(right[..., ::-1], wrong[..., ::-1])
    found = np.cumsum(hits, axis=-1) - hits / 2
    total = found + np.cumsum(misses, axis=-1) - misses / 2
    precision = np.divide(found, total, out=np.zeros(found.shape), where=total > 0)
    best = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    area: Floats = (hits * best).sum(axis=-1)
    return area


def _groups(n: Ints, seen: Ints, tops: Ints, least: int) -> list[NDArray[np.int64]]:
    found: list[list[int]] = []
    enough = True  # begins a group
    for place in np.flatnonzero(n).tolist():
        if enough:
            found.append([])
        found[-1].append(place)
        enough = max(seen[found[-1]].max(), tops[found[-1]].sum()) >= least
    if len(found) > 1 and not enough:
        last = found.pop()
        found[-1] += last
    return [np.array(one, dtype=np.int64) for one in found]


def _marked(targets: NDArray[Any], classes: int) -> Ints:
    """Marked boxes of each image and class, ``(N, K)``."""
    each = [(targets[..., -1] == k + 1).sum(axis=1) for k in range(classes)]
    return np.stack(each, axis=1).astype(np.int64)


def f1_of(answers: Floats, targets: NDArray[Any]) -> Floats:
    """F1 of each image and class, ``(N, K)``; NaN where a class is neither marked nor found."""
    sure = np.nan_to_num(answers[..., 0], nan=0.0) >= SURE
    bits = np.nan_to_num(answers[..., 1], nan=0.0).astype(np.int64)
    right = sure & (bits >> OVERLAPS.index(0.5) & 1 == 1)
    total = sure.sum(axis=2) + _marked(targets, answers.shape[1])
    nothing = np.full(total.shape, np.nan)
    found: Floats = np.divide(2.0 * right.sum(axis=2), total, out=nothing, where=total > 0)
    return found


@dataclass(frozen=True, eq=False)
class F1Tables(Measured):
    """A noisy table ``(K, 2)`` of F1 without negative cells: what is missing from 1, and F1."""

    k: int
    table: Floats | None

    @property
    def classes(self) -> int:
        """Number of classes, K."""
        return self.k

    def per_class(self, name: str) -> list[float | None]:
        """Mean over images, for each class; None where no image counts."""
        if name != "box_f1" or self.table is None:
            return [None] * self.classes
        return [ratio(there, missing + there) for missing, there in self.table]

    def class_intervals(self, name: str, per_image: float = 1.0) -> list[Interval | None]:
        """Intervals of 95 % of :meth:`per_class`, without the noise."""
        if name != "box_f1" or self.table is None:
            return [None] * self.classes
        rows = zip(self.per_class(name), self.table.sum(axis=1), strict=True)
        return [None if share is None else wilson(share, n * per_image) for share, n in rows]


class _Detection(TaskSpec):
    kind = "detection"
    target = "boxes"
    background = False
    dense = False
    drafted = False
    losses: ClassVar[Mapping[str, tuple[str, ...]]] = {"detection": ("focal_giou",)}
    metrics = _METRICS
    counts = DetectionCounts
    answer_axis = 0
    unit = _F1_STEPS
    bundle = BundleSpec(
        type="tuples",
        format="raw",
        files="the boxes of each image as `output/NAME_boxes.json`, in the image's own pixels",
        postprocessing=(
            {
                "_target_": "scripts.boxes.Boxesd",
                "keys": "pred",
                "image_key": "image",
                "least": SURE,
            },
            {
                "_target_": "scripts.boxes.SaveBoxesd",
                "keys": "pred",
                "image_key": "image",
                "output_dir": "@output_dir",
                "classes": "@class_names",
            },
        ),
        activated=False,
        channels_last=True,
        scripts=("boxes.py",),
        besides=("lower row", "lower column", "upper row", "upper column"),
        output="for each of {rest} anchors the logits of the classes, whose sigmoid is a score, "
        "and the corners of a box in pixels of the input. `scripts/boxes.py` takes the surest of "
        "those of a class that overlap by more than half, and says where they are in the image",
    )
    since = 2

    def rules(self, classes: Sequence[str], multi_label: bool) -> Iterator[tuple[str, str, str]]:
        if multi_label:
            yield "multi_label", "multi_label belongs to classification", "Remove it"

    def goal(self, task: Task, classes: str, images: str, names: str) -> str:
        return f"to find boxes around {classes} in {images}: {names}"

    def output_shape(self, task: Task, size: Sequence[int]) -> tuple[int, ...]:
        """``(A, K + 2 D)``: at each anchor a logit for each class, and the corners of a box."""
        places = sum(int(np.prod(level)) for level in levels(size))
        return (places, task.outputs + 2 * task.dimensions)

    def target_bytes(self, task: Task, pixels: int) -> int:
        return 4 * MOST_BOXES * (2 * task.dimensions + 1)

    def strata(self, task: Task, labels: Sequence[Sequence[int]]) -> list[int] | None:
        return None

    def class_counts(
        self, task: Task, targets: NDArray[Any], indices: NDArray[np.int64]
    ) -> tuple[int, ...]:
        return ()

    def classes_seen(self, task: Task, targets: NDArray[Any]) -> set[int]:
        return {int(value) - 1 for value in np.unique(targets[..., -1]) if value}

    def probabilities(self, task: Task, logits: Tensor) -> Tensor:
        """The classes' logits as probabilities; the boxes stay as they are."""
        import torch

        logits = logits.double()
        likely, corners = logits[..., : task.outputs], logits[..., task.outputs :]
        return torch.cat([likely.where(likely.isfinite(), 0.0).sigmoid(), corners], dim=-1)

    def boxes(self, task: Task, output: Tensor) -> list[Boxes]:
        likely = self.probabilities(task, output).cpu().numpy()
        return [_of_image(one, task.outputs) for one in likely]

    def answers(
        self,
        task: Task,
        logits: Tensor,
        targets: NDArray[Any],
        spacing: NDArray[Any],
        *,
        surface: bool,
    ) -> Floats:
        """``(n, K, 100, 2)``: score, and a bit for each overlap at which it is right.

        NaN where an image has fewer detections of a class. The surest ones come first. A model that
        gives no finite number at a place finds nothing there.
        """
        answers = np.full((len(targets), task.outputs, _FOUND, 2), np.nan)
        powers = 1 << np.arange(len(OVERLAPS))
        for rows, found, truth in zip(answers, self.boxes(task, logits), targets, strict=True):
            right = rightness(found, np.asarray(truth[truth[:, -1] > 0], np.float64))
            for k in range(task.outputs):
                own = np.flatnonzero(found[2] == k)[:_FOUND]
                rows[k, : len(own), 0] = found[1][own]
                rows[k, : len(own), 1] = right[own] @ powers
        return answers

    def confidence(self, task: Task, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        """The loss with its sign changed."""
        return -loss.double()

    def count(self, answers: Floats, targets: NDArray[Any]) -> Counts:
        return DetectionCounts.from_answers(answers, targets)

    def table_shapes(self, task: Task) -> dict[str, tuple[int, ...]]:
        return {"box_f1": (len(task.classes), 2)}

    def parts_for(
        self, task: Task, wanted: Collection[str], allowed: Collection[str], *, surface: bool
    ) -> tuple[str, ...]:
        return ("box_f1",) if "box_f1" in {*wanted} & {*allowed} else ()

    def sensitivity(self, task: Task, parts: Collection[str]) -> int:
        return len(task.classes) * len(set(parts))

    def tables(
        self,
        task: Task,
        answers: Floats,
        targets: NDArray[Any],
        weights: Ints,
        parts: Collection[str],
    ) -> Tables:
        """``(K, 2)``: the weight that is missing from an F1 of 1, and the weight that is there."""
        f1 = f1_of(answers, targets)
        full = np.isfinite(f1) * weights[:, None]
        share = np.rint(np.nan_to_num(f1) * full).astype(np.int64)
        table = np.stack([(full - share).sum(axis=0), share.sum(axis=0)], axis=1)
        return dict.fromkeys(parts, table)

    def tables_of(self, task: Task, counts: DetectionCounts) -> Tables:
        n = counts.f1[0].astype(np.int64) * _F1_STEPS
        there = np.minimum(np.rint(counts.f1[1] * _F1_STEPS).astype(np.int64), n)
        return {"box_f1": np.stack([n - there, there], axis=1)}

    def view(self, task: Task, tables: Mapping[str, Ints]) -> F1Tables:
        table = tables.get("box_f1")
        return F1Tables(len(task.classes), None if table is None else project(table))


def _of_image(output: Floats, classes: int) -> Boxes:
    """The boxes of one image, of overlapping ones of a class the surest; see :meth:`boxes`."""
    whole_ = np.isfinite(output).all(axis=1)
    corners = np.nan_to_num(output[:, classes:]).clip(0, _FAR)
    found: list[tuple[Floats, Floats, Ints]] = []
    for k in range(classes):
        score = np.where(whole_, output[:, k], 0.0)
        order = np.argsort(-score, kind="stable")[:_CANDIDATES]
        order = order[score[order] >= _LEAST_SCORE]
        own = order[_apart(corners[order])][:_FOUND]
        found.append((corners[own], score[own], np.full(len(own), k, np.int64)))
    boxes, scores, kinds = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(-scores, kind="stable")
    return boxes[order], scores[order], kinds[order]


def _apart(corners: Floats) -> list[int]:
    """Places of the boxes that no surer one, which comes before, overlaps too much."""
    shared = overlap(corners, corners) > _SAME
    free, kept = np.ones(len(corners), bool), []
    for place in range(len(corners)):
        if free[place]:
            kept.append(place)
            free &= ~shared[place]
    return kept


DETECTION: Final = _Detection()
DetectionCounts.spec = F1Tables.spec = DETECTION
