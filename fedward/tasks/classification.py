"""Classification, single-label or multi-label: counts of answers, and the figures from them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from fedward.errors import DataError, ModelError
from fedward.rule_codes import RuleCode
from fedward.tasks.base import (
    BundleSpec,
    Counts,
    Floats,
    Ints,
    MetricSpec,
    Released,
    Tables,
    TaskSpec,
    agree,
    frozen,
    loss_sum,
    mean,
    numbers,
    permissions,
    project,
    ratio,
    same_names,
    whole,
)
from fedward.tasks.intervals import (
    Interval,
    auc_interval,
    mean_interval,
    mean_of,
    widen,
    wilson,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fedward.plan.schema import Task

Flags = NDArray[np.bool_]
Part = tuple[float, Interval]


# From a classifier's probabilities to its answers.

CALIBRATION_BINS: Final = 15
_TINY: Final = 1e-12


def as_probabilities(values: NDArray[Any]) -> Floats:
    """The values as ``(N, K)`` float64 in 0 to 1; raises ModelError for any others."""
    p = np.asarray(values, dtype=np.float64)
    if p.ndim != 2 or not p.shape[1]:
        raise ModelError(RuleCode.PROBABILITY_SHAPE, value=p.shape)
    # Written so that NaN fails it; sums of float32 may pass 1 by a rounding.
    if not ((p >= -1e-6) & (p <= 1 + 1e-6)).all():
        raise ModelError(
            RuleCode.PROBABILITIES,
            fix="Lower the learning rate; the model may have diverged",
        )
    return np.clip(p, 0.0, 1.0)


def truth_flags(targets: NDArray[Any], p: Floats) -> Flags:
    """Indices ``(N,)`` or flags ``(N, K)`` as flags ``(N, K)``; raises DataError for any others."""
    fix = "Check the label table against the plan's classes"
    if targets.ndim == 2:
        if targets.shape != p.shape or not np.isin(targets, (0, 1)).all():
            raise DataError(RuleCode.TARGET_FLAGS, fix=fix)
        return targets.astype(np.bool_)
    if targets.shape != p.shape[:1] or targets.dtype.kind not in "iu":
        raise DataError(RuleCode.TARGET_INDEX, fix=fix)
    if ((targets < 0) | (targets >= p.shape[1])).any():
        raise DataError(RuleCode.TARGET_RANGE, values={"last": p.shape[1] - 1}, fix=fix)
    flags: Flags = targets[:, None] == np.arange(p.shape[1])
    return flags


def _single_label(p: Floats, truth: Flags) -> tuple[Ints, Floats, Flags]:
    """Confusion ``(K, K)``; confidence and rightness ``(N,)`` of the likeliest class."""
    k, answer = p.shape[1], p.argmax(axis=1)
    actual = truth.argmax(axis=1)
    confusion = np.bincount(actual * k + answer, minlength=k * k).reshape(k, k)
    return confusion.astype(np.int64), p.max(axis=1), answer == actual


def _multi_label(p: Floats, truth: Flags) -> tuple[Ints, Floats, Flags]:
    """Confusion ``(K, 2, 2)``; confidence and rightness ``(N * K,)`` of each decision at 0.5."""
    k, answer = p.shape[1], p >= 0.5
    cell = np.arange(k) * 4 + truth * 2 + answer
    confusion = np.bincount(cell.ravel(), minlength=4 * k).reshape(k, 2, 2)
    return confusion.astype(np.int64), np.maximum(p, 1 - p).ravel(), (answer == truth).ravel()


def _calibration(confidence: Floats, right: Flags) -> Floats:
    """Decisions, summed confidence and right ones in bins of equal width, ``(3, 15)``."""
    place = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    weights = (None, confidence, right.astype(np.float64))
    return np.stack([np.bincount(place, w, CALIBRATION_BINS).astype(np.float64) for w in weights])


def _cross_entropy(p: Floats, truth: Flags, multi_label: bool) -> Floats:
    """Cross-entropy of each image in nats, ``(N,)``; multi-label: mean binary one over classes."""
    of_truth = -np.log(np.maximum(np.where(truth, p, 1 - p), _TINY))
    entropy: Floats = of_truth.mean(axis=1) if multi_label else of_truth[truth]
    return entropy


# Score histograms: enough of the scores to give the area under the ROC curve.
#
# Bins uniform in probability would put all scores of a confident model into two of them, and bins
# uniform in the logit all scores of a hardly trained one. The scale here is asinh(logit p): about
# linear in the logit near p = 1/2 and logarithmic in it towards 0 and 1.

BINS: Final = 2048
SCORE_BINS: Final = 24  # even, so that a probability of 1/2 is the edge of a bin
# The logit where the scale turns from linear to logarithmic, and the largest one. The least float32
# above 0 is exp(-87) or so: a softmax gives nothing further out. With few bins the scale is
# logarithmic almost everywhere: logits may be a hundredth where a model is hardly trained, and
# above 20 where it is sure of itself, and either way they must fall into many bins.
_TURN: Final = {BINS: 1.0, SCORE_BINS: 0.3}
_REACH: Final = {BINS: math.asinh(87.0), SCORE_BINS: math.asinh(30.0 / 0.3)}
_SMALLEST: Final = 1e-38


def bin_of(probability: NDArray[Any], bins: int = BINS) -> Ints:
    """The bin of each probability; same shape, 0 to ``bins - 1``, never falling as p rises."""
    place = (np.arcsinh(logit(probability) / _TURN[bins]) / _REACH[bins] + 1) / 2
    found: Ints = np.clip((place * bins).astype(np.int64), 0, bins - 1)
    return found


def logit(probability: NDArray[Any]) -> Floats:
    """log p - log(1 - p), finite also at 0 and 1; same shape."""
    p = np.asarray(probability, dtype=np.float64)
    odds: Floats = np.log(np.maximum(p, _SMALLEST)) - np.log(np.maximum(1 - p, _SMALLEST))
    return odds


def middles(bins: int = BINS) -> Floats:
    """The probability in the middle of each bin, ``(bins,)``."""
    return _probability((np.arange(bins) + 0.5) / bins, bins)


def lower_edges(bins: int = BINS) -> Floats:
    """The lowest probability of each bin, ``(bins,)``; that of the first is 0."""
    edges = _probability(np.arange(bins) / bins, bins)
    edges[0] = 0.0
    return edges


def _probability(place: Floats, bins: int) -> Floats:
    p: Floats = 1 / (1 + np.exp(-_TURN[bins] * np.sinh((2 * place - 1) * _REACH[bins])))
    return p


def histograms(probabilities: Floats, positive: NDArray[np.bool_]) -> Ints:
    """Count the scores of each class.

    Parameters
    ----------
    probabilities : NDArray
        ``(N, K)`` in 0 to 1.
    positive : NDArray
        ``(N, K)``, whether the image has the class.

    Returns
    -------
    NDArray
        ``(2, K, BINS)``; first the images without the class, then those with it.
    """
    classes = probabilities.shape[1]
    row = positive * classes + np.arange(classes)
    flat = np.bincount((row * BINS + bin_of(probabilities)).ravel(), minlength=2 * classes * BINS)
    return flat.reshape(2, classes, BINS).astype(np.int64)


def auc(negative: Ints, positive: Ints) -> float | None:
    """Area under the ROC curve of binned scores.

    Parameters
    ----------
    negative, positive : NDArray
        ``(BINS,)`` counts: the Mann-Whitney statistic, where pairs within a bin count one half.
        ``(SCORE_BINS,)``: bins are wide, and within one the positive scores tend to be the higher
        ones, so the area is that under a smooth curve through the edges.

    Returns
    -------
    float or None
        None unless there are scores of both kinds.
    """
    # Python's float product: the count of pairs may pass int64.
    pairs = float(negative.sum()) * float(positive.sum())
    if not pairs:
        return None
    if len(negative) == SCORE_BINS:
        return _smooth_area(negative, positive)
    below = np.cumsum(negative) - negative
    return float(np.dot(positive.astype(np.float64), below + negative / 2) / pairs)


def _smooth_area(negative: NDArray[Any], positive: NDArray[Any]) -> float:
    """Area under the monotone cubic curve (Fritsch and Carlson, 1980) through a ROC's points.

    Both rates are interpolated over the way along the axes, so the curve rises everywhere and stays
    within the unit square.
    """
    from scipy.interpolate import PchipInterpolator

    points = np.cumsum([positive[::-1] / positive.sum(), negative[::-1] / negative.sum()], axis=1)
    points = np.concatenate([[[0.0], [0.0]], points], axis=1)
    way = points.sum(axis=0)
    kept = np.concatenate([[True], np.diff(way) > 0])
    way, curves = way[kept], [PchipInterpolator(way[kept], rate[kept]) for rate in points]
    # Gauss and Legendre's three nodes are exact for the product of a cubic and a parabola.
    nodes, weights = np.polynomial.legendre.leggauss(3)
    half = np.diff(way)[:, None] / 2
    places = way[:-1, None] + half * (1 + nodes)
    return float((curves[0](places) * curves[1](places, 1) * half * weights).sum())


@dataclass(frozen=True, eq=False)
class ClassificationCounts(Counts):
    """Counts over images; add those of several sites to get those of all images.

    Attributes
    ----------
    scores : NDArray
        ``(2, K, BINS)`` int64 score histograms of the images without and with each class.
    confusion : NDArray
        ``(K, K)`` int64, truth by highest probability; multi-label: ``(K, 2, 2)``, for each class
        truth by decision at 0.5.
    calibration : NDArray
        ``(3, 15)`` float64: decisions, summed confidence and right ones per bin of confidence.
    loss : NDArray
        ``(2,)`` float64: summed loss and number of images.
    """

    scores: Ints
    confusion: Ints
    calibration: Floats
    loss: Floats

    @classmethod
    def from_scores(
        cls,
        probabilities: NDArray[Any],
        targets: NDArray[Any],
        losses: NDArray[Any] | None = None,
    ) -> ClassificationCounts:
        """Count the answers on some images; none at all is fine.

        Parameters
        ----------
        probabilities : NDArray
            ``(N, K)`` in 0 to 1: a softmax, or sigmoids when multi-label.
        targets : NDArray
            ``(N,)`` class indices, or ``(N, K)`` flags when multi-label.
        losses : NDArray, optional
            ``(N,)`` the loss of each image; by default its cross-entropy, in multi-label its
            binary cross-entropy averaged over classes, in nats.

        Raises
        ------
        ModelError
            The probabilities are not finite or not in 0 to 1 (a diverged model).
        DataError
            The targets do not fit them.
        """
        p = as_probabilities(probabilities)
        truth = truth_flags(np.asarray(targets), p)
        several = np.ndim(targets) == 2
        count = _multi_label if several else _single_label
        confusion, confidence, right = count(p, truth)
        each = _cross_entropy(p, truth, several) if losses is None else losses
        return cls(
            frozen(histograms(p, truth)),
            frozen(confusion),
            frozen(_calibration(confidence, right)),
            frozen(loss_sum(each, len(p))),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ClassificationCounts:
        """Take counts from outside, trusting nothing (see :meth:`to_arrays`).

        Raises
        ------
        ProtocolError
            A name, a shape, a value or a sum is not that of any possible counts.
        """
        same_names(arrays, ("scores", "confusion", "calibration", "loss"))
        scores = whole("scores", arrays["scores"], (2, None, BINS))
        k = scores.shape[1]
        several = np.ndim(arrays["confusion"]) == 3
        confusion = whole("confusion", arrays["confusion"], (k, 2, 2) if several else (k, k))
        calibration = numbers("calibration", arrays["calibration"], (3, CALIBRATION_BINS))
        whole("calibration", calibration[::2], (2, CALIBRATION_BINS))
        loss = numbers("loss", arrays["loss"], (2,))
        result = cls(frozen(scores), frozen(confusion), frozen(calibration), frozen(loss))
        _consistent(result)
        return result

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The counts as named arrays, ready to be sent."""
        return {
            "scores": self.scores,
            "confusion": self.confusion,
            "calibration": self.calibration,
            "loss": self.loss,
        }

    @property
    def classes(self) -> int:
        """Number of classes, K."""
        return int(self.scores.shape[1])

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self.confusion.ndim == 3

    @property
    def images(self) -> int:
        """Number of images counted; a site may withhold parts, which then hold nothing."""
        confusion = self.confusion.reshape(self.classes, -1).sum(axis=1)
        per_image = self.classes if self.multi_label else 1
        answers_ = confusion.max(initial=0) if self.multi_label else confusion.sum()
        scored = self.scores.sum(axis=(0, 2)).max(initial=0)
        decided = -(-int(self.calibration[0].sum()) // per_image)
        return max(int(self.loss[1]), int(answers_), int(scored), decided)

    def merge(self, other: ClassificationCounts) -> ClassificationCounts:
        """The counts of both together.

        Raises
        ------
        ProtocolError
            They are of different tasks.
        """
        same = self.confusion.shape == other.confusion.shape and self.classes == other.classes
        agree(same, "counts that are merged must be of one task")
        return ClassificationCounts(
            frozen(self.scores + other.scores),
            frozen(self.confusion + other.confusion),
            frozen(self.calibration + other.calibration),
            frozen(self.loss + other.loss),
        )

    def gives(self, name: str) -> bool:
        """Whether the part that gives a figure is here for every class, so was not withheld."""
        several = self.multi_label
        part = {
            "scores": self.scores.sum(axis=(0, 2)),
            "confusion": self.confusion.sum(axis=(1, 2)) if several else self.confusion.sum()[None],
            "calibration": self.calibration[0].sum(keepdims=True),
            "loss": self.loss[1:],
        }[CLASSIFICATION.metric(name).arrays[0]]
        return bool((part > 0).all())

    def held_to(self, task: Task) -> None:
        """Raise ProtocolError unless classes and number of labels are the task's."""
        agree(self.classes == len(task.classes), "counts must have the plan's classes")
        agree(self.multi_label == task.multi_label, "counts must be multi-label as the plan is")

    def are_of(self, images: int) -> bool:
        """Whether exactly so many images were counted."""
        return self.images == images

    def release(self, allowed: Collection[str], least: int, digits: int) -> Released:
        """The counts as they may leave; see :meth:`Counts.release`."""
        arrays = {name: np.array(array) for name, array in self.to_arrays().items()}
        withheld = {name for name in arrays if not _PERMISSIONS[name] <= set(allowed)}
        if self.images < least:
            withheld = set(arrays)
        small = _small_classes(self, least)
        if small.any():
            withheld |= _hide(arrays, small, self.multi_label)
        for name in withheld & set(arrays):
            arrays[name][...] = 0
        arrays["scores"] = coarse_scores(arrays["scores"], least)
        arrays["calibration"] = coarse_bins(arrays["calibration"], least)
        arrays["calibration"][1] = arrays["calibration"][1].round(digits)
        arrays["loss"][0] = arrays["loss"][0].round(digits)
        return arrays, tuple(sorted(withheld))


def _small_classes(counts: ClassificationCounts, least: int) -> NDArray[np.bool_]:
    tp, fn, fp, tn = rates(counts)
    few = [(n > 0) & (n < least) for n in (tp + fn, fp + tn)]
    either: NDArray[np.bool_] = few[0] | few[1]
    return either


def _hide(arrays: dict[str, NDArray[Any]], small: NDArray[np.bool_], multi_label: bool) -> set[str]:
    if not multi_label:  # the other classes and the total would tell
        return {"scores", "confusion"}
    arrays["scores"][:, small] = 0
    arrays["confusion"][small] = 0
    return {"classes"}


def _consistent(counts: ClassificationCounts) -> None:
    """Hold the parts against each other; one that a site withholds holds nothing at all."""
    n, k = counts.images, counts.classes
    decisions, several = int(counts.calibration[0].sum()), counts.multi_label
    everything = n * k if several else n
    scored = counts.scores.sum(axis=(0, 2))
    confused = counts.confusion.sum(axis=(1, 2)) if several else counts.confusion.sum()[None]
    agree(counts.loss[1] in (0, n), "the number of images must be whole")
    agree(counts.loss[1] > 0 or counts.loss[0] == 0, "a loss must be of some images")
    agree(_none_or(scored, n), "each class must have one score an image")
    agree(several or len(set(scored.tolist())) <= 1, "each class must have one score an image")
    agree(decisions in (0, everything), "the calibration bins must hold each decision once")
    agree(_none_or(confused, n), "the confusion must hold each decision once")
    both = (scored > 0) & (confused > 0)
    positive = counts.scores[1].sum(axis=1)
    agree(bool((rates(counts)[:2].sum(axis=0) == positive)[both].all()), "positives must agree")
    below = counts.calibration[1:] <= counts.calibration[0] * (1 + 1e-9)
    agree(bool(below.all()), "no calibration bin can be surer or righter than full")
    if decisions and confused.all():
        right = rates(counts)[[0, 3]].sum() if several else np.trace(counts.confusion)
        agree(counts.calibration[2].sum() == right, "calibration and confusion must agree")


def _none_or(totals: Ints, n: int) -> bool:
    return bool(((totals == 0) | (totals == n)).all())


# Merge neighbouring bins until each that is not empty holds enough.


def coarse_scores(scores: Ints, least: int) -> Ints:
    """Merge the bins of each histogram, and keep the area under each ROC curve.

    Parameters
    ----------
    scores : NDArray
        ``(2, K, BINS)`` counts, without and with each class.
    least : int
        What a bin must hold to stand alone.

    Returns
    -------
    NDArray
        The same shape and sums; each bin holds 0 or at least `least`, if the row holds that many.
    """
    made = np.zeros_like(scores)
    for k in range(scores.shape[1]):
        made[0, k] = _merged(scores[0, k], scores[1, k], least)
        made[1, k] = _merged(scores[1, k], made[0, k], least)
    return made


def _merged(row: Ints, other: Ints, least: int) -> Ints:
    """Lay each group of bins where it ranks among the other kind as its scores do on average.

    The middle of a group would draw the few scores that overlap with the other kind to the bulk of
    their own, and the area would come out points too high.
    """
    made, below, left = np.zeros_like(row), np.cumsum(other) - other / 2, 0.0
    for bins in _groups(row, least):
        counts, places = row[bins], np.arange(bins[0], bins[-1] + 1)
        pairs = float(counts @ below[bins]) + left
        off = np.abs(below[places] * counts.sum() - pairs)
        middle = bins[np.searchsorted(np.cumsum(counts), (counts.sum() + 1) // 2)]
        nearest = places[off <= off.min()]
        place = nearest[np.abs(nearest - middle).argmin()]
        made[place] += counts.sum()
        # What a place between two steps leaves over goes to the next group.
        left = pairs - float(below[place] * counts.sum())
    return made


def coarse_bins(table: NDArray[Any], least: int) -> NDArray[Any]:
    """Merge the columns of a table ``(rows, BINS)`` by the counts in its first row."""
    made = np.zeros_like(table)
    for bins in _groups(table[0], least):
        made[:, bins[len(bins) // 2]] = table[:, bins].sum(axis=1)
    return made


def _groups(counts: NDArray[Any], least: int) -> list[NDArray[np.int64]]:
    """Neighbouring bins that are not empty, in groups that hold `least` or more each."""
    found: list[list[int]] = []
    held = least  # begins a group
    for place in np.flatnonzero(counts):
        if held >= least:
            found.append([])
            held = 0
        found[-1].append(int(place))
        held += counts[place]
    if len(found) > 1 and held < least:
        last = found.pop()
        found[-1] += last
    return [np.array(one, dtype=np.int64) for one in found]


# The figures.


def rates(counts: ClassificationCounts) -> Ints:
    """True positives, false negatives, false positives, true negatives: ``(4, K)``."""
    m = counts.confusion
    if counts.multi_label:
        return np.stack([m[:, 1, 1], m[:, 1, 0], m[:, 0, 1], m[:, 0, 0]])
    hit = np.diag(m)
    missed, wrong = m.sum(axis=1) - hit, m.sum(axis=0) - hit
    return np.stack([hit, missed, wrong, m.sum() - hit - missed - wrong])


def _over_classes(counts: ClassificationCounts, values: Sequence[float | None]) -> float | None:
    binary = counts.classes == 2 and not counts.multi_label
    return values[-1] if binary else mean(values)


def _sensitivities(counts: ClassificationCounts) -> list[float | None]:
    tp, fn, _, _ = rates(counts)
    return [ratio(a, a + b) for a, b in zip(tp, fn, strict=True)]


def _specificities(counts: ClassificationCounts) -> list[float | None]:
    _, _, fp, tn = rates(counts)
    return [ratio(a, a + b) for a, b in zip(tn, fp, strict=True)]


def _mean_auc(counts: ClassificationCounts) -> float | None:
    return _over_classes(counts, list(map(auc, *counts.scores)))


def _accuracy(counts: ClassificationCounts) -> float | None:
    return ratio(counts.calibration[2].sum(), counts.calibration[0].sum())


def _balanced_accuracy(counts: ClassificationCounts) -> float | None:
    sensitivity = _sensitivities(counts)
    if not counts.multi_label:
        return mean(sensitivity) if sum(s is not None for s in sensitivity) > 1 else None
    pairs = zip(sensitivity, _specificities(counts), strict=True)
    return mean((a + b) / 2 for a, b in pairs if a is not None and b is not None)


def _f1(counts: ClassificationCounts) -> float | None:
    tp, fn, fp, _ = rates(counts)
    parts = zip(tp, fn, fp, strict=True)
    return _over_classes(counts, [ratio(2 * a, 2 * a + b + c) for a, b, c in parts])


def _precision(counts: ClassificationCounts) -> float | None:
    tp, _, fp, _ = rates(counts)
    return _over_classes(counts, [ratio(a, a + b) for a, b in zip(tp, fp, strict=True)])


def _ece(counts: ClassificationCounts) -> float | None:
    """Expected calibration error (Guo et al., 2017, eq. 5)."""
    n, confidence, right = counts.calibration
    return ratio(np.abs(confidence - right).sum(), n.sum())


def _sensitivity(counts: ClassificationCounts) -> float | None:
    return _over_classes(counts, _sensitivities(counts))


def _specificity(counts: ClassificationCounts) -> float | None:
    return _over_classes(counts, _specificities(counts))


def _loss(counts: ClassificationCounts) -> float | None:
    return ratio(counts.loss[0], counts.loss[1])


# Their intervals, given the patients that one count stands for.

_DRAWS: Final = 200


def share_interval(part: float, all_: float, per_count: float) -> Part | None:
    """A share with Wilson's interval; None of nothing."""
    if all_ <= 0:
        return None
    share = min(1.0, max(0.0, float(part / all_)))
    interval = wilson(share, float(all_) * per_count)
    return None if interval is None else (share, interval)


def _interval_over_classes(
    counts: ClassificationCounts, parts: Sequence[Part | None], *, independent: bool = False
) -> Interval | None:
    if counts.classes == 2 and not counts.multi_label:
        return parts[-1][1] if parts[-1] else None
    return _mean(parts, independent=independent)


def _mean(parts: Sequence[Part | None], *, independent: bool) -> Interval | None:
    there = [part for part in parts if part]
    return mean_of(there, independent=independent)[1] if there else None


def sensitivities(counts: ClassificationCounts, per_count: float) -> list[Part | None]:
    """Of each class, with its interval."""
    tp, fn, _, _ = rates(counts)
    return [share_interval(a, a + b, per_count) for a, b in zip(tp, fn, strict=True)]


def specificities(counts: ClassificationCounts, per_count: float) -> list[Part | None]:
    """Of each class, with its interval."""
    _, _, fp, tn = rates(counts)
    return [share_interval(a, a + b, per_count) for a, b in zip(tn, fp, strict=True)]


def _auc_interval(counts: ClassificationCounts, per_count: float) -> Interval | None:
    parts: list[Part | None] = []
    for negative, positive in zip(*counts.scores, strict=True):
        area = auc(negative, positive)
        interval = None if area is None else auc_interval(area, negative, positive, per_count)
        parts.append((area, interval) if area is not None and interval else None)
    return _interval_over_classes(counts, parts)


def _accuracy_interval(counts: ClassificationCounts, per_count: float) -> Interval | None:
    decisions, _, right = counts.calibration.sum(axis=1)
    part = share_interval(right, decisions, per_count / _decisions_per_image(counts))
    return part[1] if part else None


def _decisions_per_image(counts: ClassificationCounts) -> int:
    # The decisions on one image are not independent: it weighs as one.
    return counts.classes if counts.multi_label else 1


def _sensitivity_interval(counts: ClassificationCounts, per_count: float) -> Interval | None:
    # An image of a single-label task is of one class: the classes' images are different ones.
    apart = not counts.multi_label
    return _interval_over_classes(counts, sensitivities(counts, per_count), independent=apart)


def _specificity_interval(counts: ClassificationCounts, per_count: float) -> Interval | None:
    return _interval_over_classes(counts, specificities(counts, per_count))


def _balanced_accuracy_interval(counts: ClassificationCounts, per_count: float) -> Interval | None:
    found = sensitivities(counts, per_count)
    if not counts.multi_label:
        return _mean(found, independent=True)
    pairs = [
        mean_of([one, other], independent=True)
        for one, other in zip(found, specificities(counts, per_count), strict=True)
        if one and other
    ]
    return _mean(pairs, independent=False)


def _f1_interval(counts: ClassificationCounts, per_count: float) -> Interval | None:
    tp, fn, fp, _ = rates(counts)
    shares = [share_interval(a, a + b + c, per_count) for a, b, c in zip(tp, fn, fp, strict=True)]
    # F1 rises with the share of true positives among all but the true negatives.
    parts = [
        None if one is None else (_to_f1(one[0]), (_to_f1(one[1][0]), _to_f1(one[1][1])))
        for one in shares
    ]
    return _interval_over_classes(counts, parts)


def _precision_interval(counts: ClassificationCounts, per_count: float) -> Interval | None:
    tp, _, fp, _ = rates(counts)
    parts = [share_interval(a, a + b, per_count) for a, b in zip(tp, fp, strict=True)]
    # An image of a single-label task has one answer: those of the classes are different images.
    return _interval_over_classes(counts, parts, independent=not counts.multi_label)


def _to_f1(share: float) -> float:
    return 2 * share / (1 + share)


def _ece_interval(counts: ClassificationCounts, per_count: float) -> Interval | None:
    """Twice the standard deviation of a parametric bootstrap of the bins, on either side."""
    decisions, confidence, right = counts.calibration
    n = round(decisions.sum() * per_count / _decisions_per_image(counts))
    value = _ece(counts)
    if n < 1 or value is None:
        return None
    random, there = np.random.default_rng(0), decisions > 0
    share = right[there] / decisions[there]
    drawn = random.multinomial(n, decisions[there] / decisions.sum(), _DRAWS)
    hits = random.binomial(drawn, np.clip(share, 0.0, 1.0))
    sure = confidence[there] / decisions[there]
    again = np.abs(drawn * sure - hits).sum(axis=1) / n
    return widen(value, (value, value), float(again.std()), (0.0, 1.0))


def _loss_interval(counts: ClassificationCounts, per_count: float) -> Interval | None:
    """The spread of the losses is that of the scores' histogram."""
    value = _loss(counts)
    if value is None:
        return None
    p = np.clip(middles(counts.scores.shape[2]), 1e-12, 1 - 1e-12)
    present, absent = -np.log(p), -np.log1p(-p)
    if not counts.multi_label:
        _, spread, n = _spread(counts.scores[1].sum(axis=0), present)
        return _around(value, spread, n * per_count)
    parts = []
    for negative, positive in zip(*counts.scores, strict=True):
        losses = np.concatenate([absent, present])
        middle, spread, n = _spread(np.concatenate([negative, positive]), losses)
        interval = _around(middle, spread, n * per_count)
        parts.append((middle, interval) if interval else None)
    there = [part for part in parts if part]
    if not there:
        return None
    middle, (low, high) = mean_of(there, independent=False)
    # The losses themselves are exact, those of the histogram have the width of its bins.
    return max(0.0, value - (middle - low)), value + (high - middle)


def _spread(weights: NDArray[Any], losses: Floats) -> tuple[float, float, float]:
    n = float(weights.sum())
    if n <= 0:
        return 0.0, 0.0, 0.0
    middle = float(np.dot(weights, losses)) / n
    return middle, float(np.dot(weights, (losses - middle) ** 2)) / n, n


def _around(value: float, spread: float, n: float) -> Interval | None:
    found = mean_interval(value, spread, n)
    return None if found is None else (max(0.0, found[0]), found[1])


# The metrics.

_INFINITE: Final = (0.0, float("inf"))


def _decided(
    name: str, label: str, figure: Any, interval: Any, *arrays: str, **about: Any
) -> MetricSpec:
    arrays = arrays or ("confusion",)
    return MetricSpec(name, label, figure, interval, arrays, table="decisions", **about)


_METRICS: Final = (
    MetricSpec("auc", "AUC", _mean_auc, _auc_interval, ("scores",), table="scores"),
    _decided("accuracy", "accuracy", _accuracy, _accuracy_interval, "calibration", "confusion"),
    _decided(
        "balanced_accuracy", "balanced accuracy", _balanced_accuracy, _balanced_accuracy_interval
    ),
    _decided("sensitivity", "sensitivity", _sensitivity, _sensitivity_interval),
    _decided("specificity", "specificity", _specificity, _specificity_interval),
    _decided("f1", "F1", _f1, _f1_interval),
    _decided("precision", "precision (PPV)", _precision, _precision_interval, implied=True),
    _decided("ece", "calibration error (ECE)", _ece, _ece_interval, "calibration", better="lower"),
    MetricSpec(
        "loss",
        "loss",
        _loss,
        _loss_interval,
        ("loss",),
        table="scores",
        better="lower",
        bounds=_INFINITE,
    ),
)
_PERMISSIONS: Final = permissions(_METRICS, lambda metric: metric.arrays)
_TABLE_PERMISSIONS: Final = permissions(_METRICS, lambda metric: [metric.table or ""])


# Tables for noise: coarser than the counts, so that the noise hides few images.

CONFIDENCE_BINS: Final = 5
_MIDDLES: Final = middles(SCORE_BINS)


class _Parts:
    """Arrays of :class:`ClassificationCounts`, filled from clean tables."""

    def __init__(self, classes: int, several: bool) -> None:
        self.scores: Floats = np.zeros((classes, 2, SCORE_BINS))
        shape = (classes, 2, 2) if several else (classes, classes)
        self.confusion: Floats = np.zeros(shape)
        self.calibration: Floats = np.zeros((3, CALIBRATION_BINS))
        self.loss: Floats = np.zeros(2)

    def take_loss(self, task: Task) -> None:
        p = _MIDDLES
        present = (self.scores[:, 1] * -np.log(p)).sum()
        absent = (self.scores[:, 0] * -np.log1p(-p)).sum()
        share = len(task.classes) if task.multi_label else 1
        seen = self.scores if task.multi_label else self.scores[:, 1]
        total = present + absent if task.multi_label else present
        self.loss = np.array([total / share, seen.sum() / share])

    def decide_from_scores(self) -> None:
        """Two classes, or one decision a class: an answer is a score above 1/2."""
        half = SCORE_BINS // 2
        answers = self.scores.reshape(-1, 2, 2, half).sum(axis=3)  # (K, truth, answer)
        several = self.confusion.ndim == 3
        self.confusion = answers if several else answers[-1]
        rows = self.scores if several else self.scores[-1:]
        confidence = np.maximum(_MIDDLES, 1 - _MIDDLES)
        right = np.stack([rows[:, 0, :half], rows[:, 1, half:]]).sum(axis=1)
        self._calibrate(confidence, rows.sum(axis=(0, 1)), np.concatenate([right[0], right[1]]))

    def take_decisions(self, table: Floats) -> None:
        self.confusion = table.sum(axis=-1)
        middle = (np.arange(CONFIDENCE_BINS) + 0.5) / CONFIDENCE_BINS
        diagonal = np.einsum("kaac->c" if table.ndim == 4 else "aac->c", table)
        self.calibration[:] = 0
        self._calibrate(middle, table.reshape(-1, CONFIDENCE_BINS).sum(axis=0), diagonal)

    def counts(self) -> ClassificationCounts:
        scores = np.ascontiguousarray(self.scores.transpose(1, 0, 2))
        return ClassificationCounts(scores, self.confusion, self.calibration, self.loss)  # type: ignore[arg-type]

    def _calibrate(self, confidence: Floats, n: Floats, right: Floats) -> None:
        place = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        for row, values in enumerate((n, n * confidence, right)):
            np.add.at(self.calibration[row], place, values)


def _scores(task: Task, p: Floats, truth: NDArray[np.bool_], weights: Ints) -> Ints:
    if _is_binary(task):
        p, truth = p[:, -1:], truth[:, -1:]
    table = np.zeros((p.shape[1], 2, SCORE_BINS), np.int64)
    classes = np.broadcast_to(np.arange(p.shape[1]), p.shape)
    np.add.at(table, (classes, truth.astype(int), bin_of(p, SCORE_BINS)), weights[:, None])
    return table


def _decisions(task: Task, p: Floats, truth: NDArray[np.bool_], weights: Ints) -> Ints:
    k = p.shape[1]
    if task.multi_label:
        answer, confidence = (p >= 0.5).astype(int), np.maximum(p, 1 - p)
        table = np.zeros((k, 2, 2, CONFIDENCE_BINS), np.int64)
        classes = np.broadcast_to(np.arange(k), p.shape)
        place = (classes, truth.astype(int), answer, _confidence_bin(confidence))
        np.add.at(table, place, weights[:, None])
        return table
    table = np.zeros((k, k, CONFIDENCE_BINS), np.int64)
    surest = _confidence_bin(p.max(axis=1, initial=0.0))
    np.add.at(table, (truth.argmax(axis=1), p.argmax(axis=1), surest), weights)
    return table


def _confidence_bin(confidence: Floats) -> Ints:
    return np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)


def _all_classes(one: Floats) -> Floats:
    """Tables of both of two classes from that of the last one: p of the first is 1 - p."""
    return np.stack([one[0, ::-1, ::-1], one[0]])


def _is_binary(task: Task) -> bool:
    return len(task.classes) == 2 and not task.multi_label


def _scores_tell_decisions(task: Task) -> bool:
    return task.multi_label or _is_binary(task)


class _Classification(TaskSpec):
    kind = "classification"
    target = "labels"
    background = False
    dense = False
    pooled = True
    losses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "classification": ("cross_entropy", "focal"),
        "multi-label": ("bce",),
    }
    metrics = _METRICS
    counts = ClassificationCounts
    answer_axis = 0
    unit = 1
    bundle = BundleSpec(
        type="probabilities",
        format="classes",
        files="`output/predictions.csv`, a row for each image",
        handlers=(
            {
                "_target_": "ClassificationSaver",
                "output_dir": "@output_dir",
                "filename": "predictions.csv",
                "batch_transform": "$lambda batch: [item['image'].meta for item in batch]",
                "output_transform": "$lambda output: [item['pred'] for item in output]",
            },
        ),
    )

    def name(self, task: Task) -> str:
        return "multi-label" if task.multi_label else self.kind

    def rules(self, classes: Sequence[str], multi_label: bool) -> Iterator[tuple[str, str, str]]:
        if not multi_label and len(classes) < 2:
            yield "classes", "classification needs at least two classes", "Name the other one too"

    def goal(self, task: Task, classes: str, images: str, names: str) -> str:
        if task.multi_label:
            return f"which of {classes} an image shows, several at once, on {images}: {names}"
        text = f"to tell {classes} apart on {images}: {names}"
        two = len(task.classes) == 2
        return f"{text}; {task.classes[-1]} is the positive one" if two else text

    def target_bytes(self, task: Task, pixels: int) -> int:
        return 4 * len(task.classes) if task.multi_label else 8

    def strata(self, task: Task, labels: Sequence[Sequence[int]]) -> list[int] | None:
        # Multi-label: whether there is any finding; each combination by itself would be too rare.
        return [max(label) if task.multi_label else label[0] for label in labels]

    def class_counts(
        self, task: Task, targets: NDArray[Any], indices: NDArray[np.int64]
    ) -> tuple[int, ...]:
        chosen = np.asarray(targets[indices])
        if task.multi_label:
            return tuple(int(count) for count in chosen.sum(axis=0))
        return tuple(int(n) for n in np.bincount(chosen, minlength=len(task.classes)))

    def classes_seen(self, task: Task, targets: NDArray[Any]) -> set[int]:
        if task.multi_label:
            return set(np.flatnonzero(np.asarray(targets).any(axis=0)).tolist())
        return set(np.unique(targets).tolist())

    def probabilities(self, task: Task, logits: Tensor) -> Tensor:
        logits = logits.double()
        finite = logits.isfinite().all(dim=1, keepdim=True)
        logits = logits.where(finite, 0.0)
        return logits.sigmoid() if task.multi_label else logits.softmax(dim=1)

    def answers(
        self,
        task: Task,
        logits: Tensor,
        targets: NDArray[Any],
        spacing: NDArray[Any],
        *,
        surface: bool,
    ) -> Floats:
        """``(n, K)`` probabilities."""
        values: Floats = self.probabilities(task, logits).cpu().numpy()
        return values

    def confidence(self, task: Task, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        """Log-odds of the true class, of several labels their mean.

        Carlini et al., 2022, arXiv:2112.03570, section IV-C.
        """
        if task.multi_label:
            return ((2.0 * targets - 1.0) * logits).mean(dim=1)
        place = targets.long()[:, None]
        others = logits.scatter(1, place, -math.inf).logsumexp(dim=1)
        return logits.gather(1, place)[:, 0] - others

    def count(self, answers: Floats, targets: NDArray[Any]) -> Counts:
        return ClassificationCounts.from_scores(answers, targets)

    def table_shapes(self, task: Task) -> dict[str, tuple[int, ...]]:
        k = len(task.classes)
        decided = (k, 2, 2) if task.multi_label else (k, k)
        return {
            "scores": (1 if _is_binary(task) else k, 2, SCORE_BINS),
            "decisions": (*decided, CONFIDENCE_BINS),
        }

    def parts_for(
        self, task: Task, wanted: Collection[str], allowed: Collection[str], *, surface: bool
    ) -> tuple[str, ...]:
        ranked, decided = (_TABLE_PERMISSIONS[name] for name in ("scores", "decisions"))
        whole = _scores_tell_decisions(task)
        tells = {"scores": ranked | decided if whole else ranked, "decisions": decided}
        found: list[str] = []
        for table, needed in tells.items():
            # Where scores tell the decisions, these would cost more noise for nothing.
            if whole and found:
                break
            gives = {name for name in wanted if table in self._tables(task, name)}
            implied = {name for name in gives if self.metric(name).implied}
            if gives & {*allowed, *implied} and needed <= set(allowed):
                found.append(table)
        return tuple(found)

    def sensitivity(self, task: Task, parts: Collection[str]) -> int:
        classes = len(task.classes)
        each = classes if task.multi_label else 1
        of = {"scores": 1 if _is_binary(task) else classes, "decisions": each}
        return sum(of[part] for part in set(parts))

    def tables(
        self,
        task: Task,
        answers: Floats,
        targets: NDArray[Any],
        weights: Ints,
        parts: Collection[str],
    ) -> Tables:
        """Weights of images by score, and by decision and confidence.

        ``scores`` ``(K', 2, SCORE_BINS)``: images without and with a class by score, for the last
        of two classes alone; ``decisions`` ``(K, K, CONFIDENCE_BINS)``, truth by answer by
        confidence, multi-label ``(K, 2, 2, CONFIDENCE_BINS)``.
        """
        truth = truth_flags(np.asarray(targets), answers)
        makers = {"scores": _scores, "decisions": _decisions}
        return {name: makers[name](task, answers, truth, weights) for name in parts}

    def withhold(self, tables: Tables, least: int) -> Tables:
        """The same without small classes, neighbouring scores merged; see the base class."""
        made = dict(tables)
        if "scores" in made:
            # Rounded so that each row keeps its sum.
            below = np.rint(np.cumsum(project(made["scores"]), axis=2)).astype(np.int64)
            whole = np.diff(below, axis=2, prepend=0)
            merged = coarse_scores(whole.transpose(1, 0, 2), least).transpose(1, 0, 2)
            small = merged.sum(axis=2).min(axis=1) < least
            made["scores"] = np.where(small[:, None, None], 0, merged)
        if "decisions" in made:
            table = made["decisions"]
            sizes = table.sum(axis=(-2, -1))
            small = (sizes.min(axis=1) if sizes.ndim == 2 else sizes) < least
            made["decisions"] = np.where(np.expand_dims(small, (*range(1, table.ndim),)), 0, table)
        return made

    def tables_of(self, task: Task, counts: ClassificationCounts) -> Tables:
        coarse = bin_of(middles(), SCORE_BINS)
        scores = np.zeros((counts.classes, 2, SCORE_BINS), np.int64)
        for fine, place in enumerate(coarse):
            scores[:, :, place] += counts.scores[:, :, fine].T
        decisions = np.zeros((*counts.confusion.shape, CONFIDENCE_BINS), np.int64)
        decisions[..., CONFIDENCE_BINS // 2] = counts.confusion
        return {"scores": scores[-1:] if _is_binary(task) else scores, "decisions": decisions}

    def view(self, task: Task, tables: Mapping[str, Ints]) -> ClassificationCounts:
        k, several = len(task.classes), task.multi_label
        made = _Parts(k, several)
        if "scores" in tables:
            clean = project(tables["scores"])
            made.scores = _all_classes(clean) if _is_binary(task) else clean
            made.take_loss(task)
            if _scores_tell_decisions(task):
                made.decide_from_scores()
        if "decisions" in tables:
            flat = tables["decisions"].reshape(k, -1)
            made.take_decisions(project(flat).reshape(tables["decisions"].shape))
        return made.counts()

    def tables_give(self, task: Task, tables: Collection[str], name: str) -> bool:
        return not self._tables(task, name).isdisjoint(tables)

    def _tables(self, task: Task, name: str) -> set[str]:
        """The tables of which each gives a metric."""
        return {self.metric(name).table or ""} | (
            {"scores"} if _scores_tell_decisions(task) else set()
        )


CLASSIFICATION: Final = _Classification()
ClassificationCounts.spec = CLASSIFICATION
