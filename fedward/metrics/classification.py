"""Counts of a classifier's answers, single-label or multi-label, and metrics from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.metrics import answers, histogram
from fedward.metrics.answers import CALIBRATION_BINS
from fedward.metrics.checks import (
    Floats,
    Ints,
    agree,
    frozen,
    known,
    loss_sum,
    numbers,
    same_names,
    whole,
)
from fedward.metrics.intervals import Interval
from fedward.metrics.rate_intervals import INTERVALS
from fedward.metrics.rates import FIGURES, rates
from fedward.plan.schema import MetricName


@dataclass(frozen=True, eq=False)
class ClassificationCounts:
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
        p = answers.probabilities(probabilities)
        truth = answers.truth(np.asarray(targets), p)
        several = np.ndim(targets) == 2
        count = answers.multi_label if several else answers.single_label
        confusion, confidence, right = count(p, truth)
        each = answers.cross_entropy(p, truth, several) if losses is None else losses
        return cls(
            frozen(histogram.histograms(p, truth)),
            frozen(confusion),
            frozen(answers.calibration(confidence, right)),
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
        scores = whole("scores", arrays["scores"], (2, None, histogram.BINS))
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

    __add__ = merge

    def figures(self, names: Sequence[MetricName]) -> dict[str, float | None]:
        """The figures by name; None where the images do not define one.

        With two classes AUC, sensitivity, specificity and F1 are those of the last one; with more,
        and in multi-label tasks, the plain mean over the classes for which they are defined.

        Raises
        ------
        PlanError
            A name is not a metric of classification.
        """
        known("classification", names, FIGURES)
        return {name: FIGURES[name](self) for name in names}

    def intervals(self, names: Sequence[MetricName], per_image: float = 1.0) -> dict[str, Interval]:
        """Intervals of 95 % of the figures that are defined.

        Parameters
        ----------
        names : sequence of str
            Figures.
        per_image : float
            Patients that one image stands for, at most 1. Images of one patient are taken as
            alike: more images than patients make no interval narrower.
        """
        given = [name for name, value in self.figures(names).items() if value is not None]
        found = {name: INTERVALS[name](self, per_image) for name in given}
        return {name: interval for name, interval in found.items() if interval is not None}

    def gives(self, name: str) -> bool:
        """Whether the part that gives a figure is here for every class, so was not withheld."""
        part = {"auc": self.scores.sum(axis=(0, 2)), "loss": self.loss[1:]}.get(name)
        if part is None and name in ("accuracy", "ece"):
            part = self.calibration[0].sum(keepdims=True)
        if part is None:
            several = self.multi_label
            part = self.confusion.sum(axis=(1, 2)) if several else self.confusion.sum()[None]
        return bool((part > 0).all())


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
