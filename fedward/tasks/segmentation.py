"""Segmentation: masks of foreground classes; sums of figures over images, and their means."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    Measured,
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
    bounded_mean_interval,
    mean_interval,
    mean_of,
    wilson,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fedward.plan.schema import Task

Mask = NDArray[np.bool_]
DICE_STEPS: Final = 1000  # a Dice is counted in thousandths
MOST_DISTANCE: Final = 64.0  # mm; HD95 is cut there
_SLACK: Final = 1 + 1e-9
_AT_ONCE: Final = 1 << 22  # pixels of an image; all pixels of a volume at once take much memory


# The metrics. What each has a row for in the arrays of counts, in their order, comes first.


def _mean_over_classes(counts: Measured, name: str) -> float | None:
    return mean(counts.per_class(name))


def _interval_over_classes(counts: Measured, per_image: float, name: str) -> Interval | None:
    # The classes are of the same images: their distances to the limits are averaged.
    pairs = zip(counts.per_class(name), counts.class_intervals(name, per_image), strict=True)
    parts = [(value, own) for value, own in pairs if value is not None]
    there = [(value, own) for value, own in parts if own is not None]
    if not there or len(there) < len(parts):
        return None
    return mean_of(there, independent=False)[1]


def _row(name: str, label: str, *more: str, **about: Any) -> MetricSpec:
    figure = partial(_mean_over_classes, name=name)
    interval = partial(_interval_over_classes, name=name)
    return MetricSpec(
        name, label, figure, interval, (name, *more), table=name, by_class=True, **about
    )


def _loss(counts: Measured) -> float | None:
    return ratio(*counts.loss) if isinstance(counts, SegmentationCounts) else None


_INFINITE: Final = (0.0, float("inf"))
# An image's IoU follows from its Dice: the two leave together.
_METRICS: Final = (
    _row("dice", "Dice", "iou"),
    _row("iou", "IoU", "dice"),
    _row("hd95", "HD95 in mm", better="lower", bounds=_INFINITE, digits=2),
    MetricSpec(
        "loss",
        "loss",
        figure=_loss,
        interval=lambda counts, per_image: None,
        arrays=("loss",),
        table=None,
        better="lower",
        bounds=_INFINITE,
    ),
)
_ROWS: Final = tuple(metric.name for metric in _METRICS if metric.by_class)
_PERMISSIONS: Final = permissions(_METRICS, lambda metric: metric.arrays)


@dataclass(frozen=True, eq=False)
class SegmentationCounts(Counts):
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

    def per_class(self, name: str) -> list[float | None]:
        """Mean over images, for each class; None where no image counts."""
        row = self._row(name)
        return [ratio(s, n) for s, n in zip(self.sums[row], self.counts[row], strict=True)]

    def spread(self, name: str) -> list[float | None]:
        """Standard deviation over images (of the population), for each class."""
        row = self._row(name)
        means = self.per_class(name)
        squares = [ratio(s, n) for s, n in zip(self.squares[row], self.counts[row], strict=True)]
        return [
            None if m is None or s is None else float(np.sqrt(max(0.0, s - m * m)))
            for m, s in zip(means, squares, strict=True)
        ]

    def class_intervals(self, name: str, per_image: float = 1.0) -> list[Interval | None]:
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

    def gives(self, name: str) -> bool:
        """Whether images count for a figure."""
        return bool(self.loss[1] if name == "loss" else self.counts[self._row(name)].any())

    def held_to(self, task: Task) -> None:
        """Raise ProtocolError unless the classes are the task's."""
        agree(self.classes == len(task.classes), "counts must have the plan's classes")

    def are_of(self, images: int) -> bool:
        """Whether no part counts more images; an image without a class counts nowhere."""
        return self.images <= images

    def release(self, allowed: Collection[str], least: int, digits: int) -> Released:
        """The sums as they may leave; see :meth:`Counts.release`."""
        arrays = {name: np.array(array) for name, array in self.to_arrays().items()}
        withheld = self._withhold_rows(arrays, allowed)
        n = arrays["counts"]
        small = (n > 0) & (n < least)
        small[:, small[0]] = True  # HD95 counts no image that Dice does not
        if small.any():
            withheld.add("classes")
        for name in ("counts", "sums", "squares"):
            arrays[name][small] = 0
        if not _PERMISSIONS["loss"] <= set(allowed) or arrays["loss"][1] < least:
            withheld |= {"loss"} if arrays["loss"][1] else set()
            arrays["loss"][:] = 0
        _round(arrays, digits)
        return arrays, tuple(sorted(withheld))

    @staticmethod
    def _withhold_rows(arrays: dict[str, NDArray[Any]], allowed: Collection[str]) -> set[str]:
        gone = [row for row, name in enumerate(_ROWS) if not _PERMISSIONS[name] <= set(allowed)]
        if 0 in gone:  # no figure counts an image that Dice does not
            gone = list(range(len(_ROWS)))
        for name in ("counts", "sums", "squares"):
            arrays[name][gone] = 0
        return {_ROWS[row] for row in gone}

    def _row(self, name: str) -> int:
        SEGMENTATION.known([name], _ROWS)
        return _ROWS.index(name)


def _round(arrays: dict[str, NDArray[Any]], digits: int) -> None:
    """Round sums and squares so that they stay possible: n q >= s^2, and q <= s for shares."""
    n, limit = arrays["counts"], np.full_like(arrays["sums"], np.inf)
    limit[:2] = n[:2]
    sums = np.minimum(arrays["sums"].round(digits), limit)
    lowest = np.divide(sums**2, n, out=np.zeros_like(sums), where=n > 0)
    highest = np.where(np.isfinite(limit), sums, np.inf)
    squares = np.clip(arrays["squares"].round(digits), lowest, highest)
    arrays["sums"], arrays["squares"] = sums, np.where(n > 0, squares, 0.0)
    arrays["loss"][0] = arrays["loss"][0].round(digits)


@dataclass(frozen=True, eq=False)
class OverlapTables(Measured):
    """Noisy tables of overlaps without negative cells, ``(K, 2)`` each (see ``tables``)."""

    k: int
    tables: Mapping[str, Floats]

    @property
    def classes(self) -> int:
        """Number of foreground classes, K."""
        return self.k

    def per_class(self, name: str) -> list[float | None]:
        """Mean over images, for each class; None where no image counts."""
        if name not in self.tables:
            return [None] * self.classes
        scale = _scale(name)
        means = [ratio(there, missing + there) for missing, there in self.tables[name]]
        return [None if one is None else one * scale for one in means]

    def class_intervals(self, name: str, per_image: float = 1.0) -> list[Interval | None]:
        """Intervals of 95 % of :meth:`per_class`, without the noise.

        The tables tell no spread: it is taken to be the largest that a mean admits.
        """
        if name not in self.tables:
            return [None] * self.classes
        scale, found = _scale(name), list[Interval | None]()
        for missing, there in self.tables[name]:
            share = ratio(there, missing + there)
            own = None if share is None else wilson(share, (missing + there) * per_image)
            found.append(None if own is None else (own[0] * scale, own[1] * scale))
        return found


def _scale(name: str) -> float:
    return MOST_DISTANCE if name == "hd95" else 1.0


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
    counts = np.zeros(labels * labels, np.int64)
    for start in range(0, truth.size, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        pairs = truth.ravel()[part].astype(np.intp) * labels + prediction.ravel()[part]
        counts += np.bincount(pairs, minlength=labels * labels)
    joint = counts.reshape(labels, labels)
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


def surface_distance(prediction: Mask, truth: Mask, spacing: Sequence[float]) -> float | None:
    """95th percentile Hausdorff distance: the larger one of the two directions.

    Parameters
    ----------
    prediction, truth : NDArray
        Masks of one shape, ``(H, W)`` or ``(H, W, D)``.
    spacing : sequence of float
        mm per axis.

    Returns
    -------
    float or None
        In mm; None unless both masks have a pixel.

    Notes
    -----
    A surface pixel is one of the mask with a neighbour across a face that is outside it, or
    outside the image (as in MONAI).
    """
    if not prediction.any() or not truth.any():
        return None
    box = _box(prediction | truth)
    a, b = _surface(prediction[box]), _surface(truth[box])
    return max(_directed(a, b, spacing), _directed(b, a, spacing))


def _box(mask: Mask) -> tuple[slice, ...]:
    from scipy import ndimage

    # Beyond the box that holds both masks there is nothing to measure.
    found: tuple[slice, ...] = ndimage.find_objects(mask.astype(np.uint8))[0]
    return found


def _surface(mask: Mask) -> Mask:
    from scipy import ndimage

    surface: Mask = mask & ~ndimage.binary_erosion(mask)
    return surface


def _directed(of: Mask, to: Mask, spacing: Sequence[float]) -> float:
    from scipy import ndimage

    # The distances of all pixels would take several times the memory of the nearest pixels.
    nearest = ndimage.distance_transform_edt(
        ~to, sampling=tuple(spacing), return_distances=False, return_indices=True
    ).reshape(of.ndim, -1)
    places = np.flatnonzero(of)
    found = np.empty(len(places))
    for start in range(0, len(places), _AT_ONCE):
        part = places[start : start + _AT_ONCE]
        own = np.stack(np.unravel_index(part, of.shape))
        away = (nearest[:, part] - own) * np.reshape(spacing, (-1, 1))
        found[start : start + _AT_ONCE] = np.sqrt((away**2).sum(axis=0))
    return float(np.percentile(found, 95))


class _Segmentation(TaskSpec):
    kind = "segmentation"
    target = "masks"
    background = True
    dense = True
    losses: ClassVar[Mapping[str, tuple[str, ...]]] = {"segmentation": ("dice_ce", "dice_focal")}
    metrics = _METRICS
    counts = SegmentationCounts
    answer_axis = 1
    unit = DICE_STEPS
    bundle = BundleSpec(
        type="image",
        format="labels",
        files="a mask for each image in `output/`, on the image's own grid",
        postprocessing=(
            {
                "_target_": "Invertd",
                "keys": "pred",
                "transform": "@preprocessing",
                "orig_keys": "image",
                "nearest_interp": False,
                "to_tensor": True,
            },
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {
                "_target_": "SaveImaged",
                "keys": "pred",
                "output_dir": "@output_dir",
                "output_postfix": "mask",
                "output_dtype": "$__import__('numpy').uint8",
                "separate_folder": False,
                "resample": False,
                "print_log": False,
            },
        ),
    )

    def rules(self, classes: Sequence[str], multi_label: bool) -> Iterator[tuple[str, str, str]]:
        if multi_label:
            yield "multi_label", "multi_label belongs to classification", "Remove it"

    def goal(self, task: Task, classes: str, images: str, names: str) -> str:
        return f"to outline {classes} in {images}: {names}"

    def target_bytes(self, task: Task, pixels: int) -> int:
        return pixels

    def strata(self, task: Task, labels: Sequence[Sequence[int]]) -> list[int] | None:
        return None

    def class_counts(
        self, task: Task, targets: NDArray[Any], indices: NDArray[np.int64]
    ) -> tuple[int, ...]:
        return ()

    def classes_seen(self, task: Task, targets: NDArray[Any]) -> set[int]:
        # One after another: all of them may be larger than the memory.
        found: set[int] = set()
        for mask in targets:
            found.update(np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist())
        return {value - 1 for value in found if value}

    def probabilities(self, task: Task, logits: Tensor) -> Tensor:
        logits = logits.double()
        finite = logits.isfinite().all(dim=1, keepdim=True)
        return logits.where(finite, 0.0).softmax(dim=1)

    def answers(
        self,
        task: Task,
        logits: Tensor,
        targets: NDArray[Any],
        spacing: NDArray[Any],
        *,
        surface: bool,
    ) -> Floats:
        """``(3, n, K)`` Dice, IoU and HD95 of each image; NaN where one is undefined."""
        guess = logits.nan_to_num(nan=0.0).argmax(dim=1).byte().cpu().numpy()
        return self.answers_of_masks(task, guess, targets, spacing, surface=surface)

    def answers_of_masks(
        self,
        task: Task,
        masks: NDArray[np.uint8],
        targets: NDArray[Any],
        spacing: NDArray[Any],
        *,
        surface: bool,
    ) -> Floats:
        """The same of ``(n, *S)`` label maps."""
        return overlaps(masks, targets, len(task.classes), spacing, hd95=surface)

    def confidence(self, task: Task, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        """The loss with its sign changed."""
        return -loss.double()

    def count(self, answers: Floats, targets: NDArray[Any]) -> Counts:
        return SegmentationCounts.from_values(answers)

    def table_shapes(self, task: Task) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(_ROWS, (len(task.classes), 2))

    def parts_for(
        self, task: Task, wanted: Collection[str], allowed: Collection[str], *, surface: bool
    ) -> tuple[str, ...]:
        figures = set(wanted) & set(allowed)
        return tuple(name for name in _ROWS if name in figures and (surface or name != "hd95"))

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
        """For each part ``(K, 2)``: the weight that is missing from 1 and the weight that is there.

        Their sum counts images and the second over the sum is the mean. HD95 is in units of
        ``MOST_DISTANCE``.
        """
        tables = {}
        for name in parts:
            own = answers[_ROWS.index(name)] / _scale(name)
            there = np.isfinite(own)
            full = there * weights[:, None]
            share = np.rint(np.where(there, np.clip(own, 0.0, 1.0), 0.0) * full).astype(np.int64)
            tables[name] = np.stack([(full - share).sum(axis=0), share.sum(axis=0)], axis=1)
        return tables

    def tables_of(self, task: Task, counts: SegmentationCounts) -> Tables:
        n, steps = counts.counts * DICE_STEPS, float(DICE_STEPS)
        sums = counts.sums * steps / np.array([[_scale(name)] for name in _ROWS])
        there = np.minimum(np.rint(sums).astype(np.int64), n)
        return {
            name: np.stack([n[row] - there[row], there[row]], axis=1)
            for row, name in enumerate(_ROWS)
        }

    def view(self, task: Task, tables: Mapping[str, Ints]) -> OverlapTables:
        clean = {name: project(table) for name, table in tables.items()}
        return OverlapTables(len(task.classes), clean)


SEGMENTATION: Final = _Segmentation()
SegmentationCounts.spec = OverlapTables.spec = SEGMENTATION
