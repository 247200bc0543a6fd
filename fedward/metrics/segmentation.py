"""Sums of a segmenter's metrics over images, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedward.errors import DataError, ModelError
from fedward.metrics.checks import (
    Floats,
    Ints,
    agree,
    frozen,
    known,
    loss_sum,
    mean,
    numbers,
    ratio,
    same_names,
    whole,
)
from fedward.metrics.intervals import (
    Interval,
    bounded_mean_interval,
    mean_interval,
    mean_of,
)
from fedward.metrics.surface import hd95 as surface_distance
from fedward.plan.schema import MetricName
from fedward.rule_codes import RuleCode

Overlap = Literal["dice", "iou", "hd95"]
_ROWS: tuple[Overlap, ...] = ("dice", "iou", "hd95")
_SLACK = 1 + 1e-9


@dataclass(frozen=True, eq=False)
class SegmentationCounts:
    """Sums over images for each of K foreground classes; rows are Dice, IoU and HD95 (mm).

    An image in which neither truth nor prediction has a class is left out of that class; one in
    which only one of them has it counts with Dice and IoU 0 and has no HD95.

    Attributes
    ----------
    counts : NDArray
        ``(3, K)`` int64, images that count.
    sums : NDArray
        ``(3, K)`` float64, their summed figure.
    squares : NDArray
        ``(3, K)`` float64, the summed squares of it.
    loss : NDArray
        ``(2,)`` float64: summed loss, and number of images that had one given.
    """

    counts: Ints
    sums: Floats
    squares: Floats
    loss: Floats

    @classmethod
    def from_masks(
        cls,
        prediction: NDArray[Any],
        truth: NDArray[Any],
        classes: int,
        spacing: NDArray[Any],
        hd95: bool,
        losses: NDArray[Any] | None = None,
    ) -> SegmentationCounts:
        """Compare masks; no image at all is fine.

        Parameters
        ----------
        prediction, truth : NDArray
            ``(N, H, W)`` or ``(N, H, W, D)`` uint8 label maps, 0 being background.
        classes : int
            Foreground classes K.
        spacing : NDArray
            ``(N, D)`` mm per axis.
        hd95 : bool
            Whether to measure HD95, which costs some milliseconds an image.
        losses : NDArray, optional
            ``(N,)`` the loss of each image.

        Raises
        ------
        ModelError, DataError
            A prediction, or else a truth or a spacing, does not fit the rest.
        """
        values = overlaps(prediction, truth, classes, spacing, hd95=hd95)
        counts = cls.from_values(values)
        if losses is None:
            return counts
        loss = frozen(loss_sum(losses, len(truth)))
        return cls(counts.counts, counts.sums, counts.squares, loss)

    @classmethod
    def from_values(cls, values: Floats) -> SegmentationCounts:
        """Add up figures of single images (see :func:`overlaps`)."""
        there = np.isfinite(values)
        filled = np.where(there, values, 0.0)
        return cls(
            frozen(there.sum(axis=1).astype(np.int64)),
            frozen(filled.sum(axis=1)),
            frozen((filled**2).sum(axis=1)),
            frozen(np.zeros(2)),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> SegmentationCounts:
        """Take sums from outside, trusting nothing (see :meth:`to_arrays`).

        Raises
        ------
        ProtocolError
            A name, a shape or a value is not that of any possible sums.
        """
        same_names(arrays, ("counts", "sums", "squares", "loss"))
        counts = whole("counts", arrays["counts"], (3, None))
        sums, squares = (numbers(n, arrays[n], counts.shape) for n in ("sums", "squares"))
        loss = numbers("loss", arrays["loss"], (2,))
        whole("loss", loss[1:], (1,))
        agree(bool((sums[:2] <= counts[:2] * _SLACK).all()), "no Dice or IoU can pass 1")
        agree(bool((squares[:2] <= sums[:2] * _SLACK).all()), "squares must not pass sums below 1")
        # Cauchy and Schwarz; also makes an empty count have empty sums.
        agree(bool((sums**2 <= counts * squares * _SLACK).all()), "sums must fit their squares")
        agree(bool((squares[counts == 0] == 0).all()), "sums over no image must be 0")
        agree(bool((counts[1] == counts[0]).all()), "Dice and IoU must count the same images")
        agree(bool((counts[2] <= counts[0]).all()), "HD95 must count no image that Dice does not")
        return cls(frozen(counts), frozen(sums), frozen(squares), frozen(loss))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The sums as named arrays, ready to be sent."""
        return {
            "counts": self.counts,
            "sums": self.sums,
            "squares": self.squares,
            "loss": self.loss,
        }

    @property
    def classes(self) -> int:
        """Number of foreground classes, K."""
        return int(self.counts.shape[1])

    @property
    def images(self) -> int:
        """Fewest images that these sums can be of; a site may withhold parts."""
        return max(int(self.loss[1]), int(self.counts.max(initial=0)))

    def merge(self, other: SegmentationCounts) -> SegmentationCounts:
        """The sums over both.

        Raises
        ------
        ProtocolError
            They are of different tasks.
        """
        agree(self.classes == other.classes, "counts that are merged must be of one task")
        return SegmentationCounts(
            frozen(self.counts + other.counts),
            frozen(self.sums + other.sums),
            frozen(self.squares + other.squares),
            frozen(self.loss + other.loss),
        )

    __add__ = merge

    def per_class(self, name: Overlap) -> list[float | None]:
        """Mean over images, for each class; None where no image counts."""
        row = self._row(name)
        return [ratio(s, n) for s, n in zip(self.sums[row], self.counts[row], strict=True)]

    def spread(self, name: Overlap) -> list[float | None]:
        """Standard deviation over images (of the population), for each class."""
        row = self._row(name)
        means = self.per_class(name)
        squares = [ratio(s, n) for s, n in zip(self.squares[row], self.counts[row], strict=True)]
        return [
            None if m is None or s is None else float(np.sqrt(max(0.0, s - m * m)))
            for m, s in zip(means, squares, strict=True)
        ]

    def figures(self, names: Sequence[MetricName]) -> dict[str, float | None]:
        """The figures by name, means over the classes that occur; None where nothing counts.

        Raises
        ------
        PlanError
            A name is not a metric of segmentation.
        """
        known("segmentation", names, (*_ROWS, "loss"))
        return {name: self._figure(name) for name in names}

    def class_intervals(self, name: Overlap, per_image: float = 1.0) -> list[Interval | None]:
        """Intervals of 95 % of :meth:`per_class`; None where there is none.

        Parameters
        ----------
        name : str
            The figure.
        per_image : float
            Patients that one image stands for, at most 1; images of one patient are taken as alike.
        """
        of = mean_interval if name == "hd95" else bounded_mean_interval
        rows = zip(
            self.per_class(name), self.spread(name), self.counts[self._row(name)], strict=True
        )
        found = [
            None if mean is None or sd is None else of(mean, sd**2, n * per_image)
            for mean, sd, n in rows
        ]
        return [None if one is None else (max(0.0, one[0]), one[1]) for one in found]

    def intervals(self, names: Sequence[MetricName], per_image: float = 1.0) -> dict[str, Interval]:
        """Intervals of 95 % of the figures that are defined, but for the loss.

        The classes are of the same images: their distances to the limits are averaged. Parameters
        as for :meth:`class_intervals`.
        """
        found = {}
        for name in _ROWS:
            pairs = zip(self.per_class(name), self.class_intervals(name, per_image), strict=True)
            parts = [(mean, own) for mean, own in pairs if mean is not None]
            known = [(mean, own) for mean, own in parts if own is not None]
            if name in names and known and len(known) == len(parts):
                found[str(name)] = mean_of(known, independent=False)[1]
        return found

    def gives(self, name: str) -> bool:
        """Whether images count for a figure."""
        return bool(self.loss[1] if name == "loss" else self.counts[self._row(name)].any())  # type: ignore[arg-type]

    def _figure(self, name: MetricName) -> float | None:
        if name == "loss":
            return ratio(self.loss[0], self.loss[1])
        return mean(self.per_class(name))  # type: ignore[arg-type]

    def _row(self, name: Overlap) -> int:
        known("segmentation", [name], _ROWS)
        return _ROWS.index(name)


def overlaps(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    classes: int,
    spacing: NDArray[Any],
    *,
    hd95: bool,
) -> Floats:
    """Dice, IoU and HD95 of each image, ``(3, N, K)``; NaN where one is undefined.

    Parameters and errors as in :meth:`SegmentationCounts.from_masks`.
    """
    _check(prediction, truth, classes, spacing)
    values = np.full((3, len(truth), classes), np.nan)
    for i, (p, t) in enumerate(zip(prediction, truth, strict=True)):
        values[:2, i] = _overlap(p, t, classes)
        if hd95:
            values[2, i] = _distances(p, t, classes, spacing[i])
    return values


def _check(
    prediction: NDArray[Any], truth: NDArray[Any], classes: int, spacing: NDArray[Any]
) -> None:
    if truth.ndim not in (3, 4) or truth.dtype != np.uint8 or truth.max(initial=0) > classes:
        raise DataError(RuleCode.MASKS, values={"classes": classes})
    if prediction.shape != truth.shape or prediction.dtype != np.uint8:
        raise ModelError(RuleCode.PREDICTED_MASKS)
    if prediction.max(initial=0) > classes:
        raise ModelError(RuleCode.PREDICTED_LABELS, values={"classes": classes})
    positive = np.isfinite(spacing) & (np.asarray(spacing) > 0)
    if np.shape(spacing) != (len(truth), truth.ndim - 1) or not positive.all():
        raise DataError(RuleCode.SPACING)


def _overlap(prediction: NDArray[Any], truth: NDArray[Any], classes: int) -> Floats:
    """Dice and IoU of one image, ``(2, K)``; NaN where neither has the class."""
    labels = classes + 1
    pairs = truth.ravel().astype(np.intp) * labels + prediction.ravel()
    joint = np.bincount(pairs, minlength=labels * labels).reshape(labels, labels)[:labels]
    both = np.diag(joint)[1:].astype(np.float64)
    sizes = (joint.sum(axis=0) + joint.sum(axis=1))[1:].astype(np.float64)
    sizes[sizes == 0] = np.nan
    return np.stack([2 * both / sizes, both / (sizes - both)])


def _distances(
    prediction: NDArray[Any], truth: NDArray[Any], classes: int, spacing: NDArray[Any]
) -> list[float]:
    found = (
        surface_distance(prediction == k, truth == k, [float(s) for s in spacing])
        for k in range(1, classes + 1)
    )
    return [np.nan if distance is None else distance for distance in found]
