"""Differentially private counts of an evaluation, and metrics from them.

Every image adds its weight to one cell of each table, and a patient's images together weigh at most
one unit. So a patient changes a table by at most a unit in L1 norm, and integer Laplace noise on
each cell (:mod:`fedward.dp.discrete_laplace`) makes the tables ε-differentially private, whatever
the model is that was evaluated. Figures are computed from the sum of all sites' tables. Negative
cells are removed only there: removing them earlier would bias every figure.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward.dp.discrete_laplace import discrete_laplace, variance
from fedward.metrics import histogram
from fedward.metrics.answers import CALIBRATION_BINS
from fedward.metrics.checks import (
    Floats,
    Ints,
    agree,
    mean,
    ratio,
    refuse,
    same_names,
)
from fedward.metrics.classification import ClassificationCounts
from fedward.metrics.intervals import Interval, mean_of, widen, wilson
from fedward.metrics.rate_intervals import INTERVALS
from fedward.metrics.rates import FIGURES
from fedward.metrics.segmentation import SegmentationCounts
from fedward.plan.schema import CLASSIFICATION_METRICS, MetricName, Task

Tables = dict[str, Ints]

SCORE_BINS: Final = histogram.COARSE_BINS
CONFIDENCE_BINS: Final = 5
DICE_STEPS: Final = 1000  # a Dice is counted in thousandths
MOST_DISTANCE: Final = 64.0  # mm; HD95 is cut there
_RANKED: Final = frozenset({"auc", "loss"})
_DECIDED: Final = CLASSIFICATION_METRICS - _RANKED
_OVERLAPS: Final = ("dice", "iou", "hd95")
MOST_COUNT_NOISE: Final = 1000.0
"""Largest scale of noise without ε that a policy can ask for, in images."""

TABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "classification": ("scores", "decisions"),
    "segmentation": _OVERLAPS,
}
"""Names of the tables of each kind of task."""

# Noisy cells must fit int64 sums over many sites.
_LARGEST: Final = 1 << 50


@dataclass(frozen=True)
class NoisyTables:
    """How an evaluation is counted where no exact count may leave.

    Attributes
    ----------
    parts : tuple of str
        The tables (see :func:`parts_for`).
    scale : Fraction
        Of the Laplace noise on each cell.
    unit : int
        What a patient weighs; without ``by_patient``, an image.
    images_per_patient : int
        Images of a patient that count.
    by_patient : bool
        Whether a patient weighs one unit however many images there are.
    least : int
        Noisy cells below so many units are set to 0.
    """

    parts: tuple[str, ...]
    scale: Fraction
    unit: int
    images_per_patient: int = 1
    by_patient: bool = True
    least: int = 0


def parts_for(
    task: Task, wanted: Collection[MetricName], allowed: Collection[MetricName], *, surface: bool
) -> tuple[str, ...]:
    """The tables that give the wanted figures and no figure that is not allowed.

    Parameters
    ----------
    wanted : collection of str
        Figures of the plan's report.
    allowed : collection of str
        Figures that the site's policy lets out.
    surface : bool
        Whether HD95 is measured.
    """
    figures = set(wanted) & set(allowed)
    if task.kind == "segmentation":
        return tuple(name for name in _OVERLAPS if name in figures and (surface or name != "hd95"))
    whole = _scores_tell_decisions(task)
    scores_give = CLASSIFICATION_METRICS if whole else _RANKED
    found = []
    if figures & scores_give and scores_give <= set(allowed):
        found.append("scores")
    if figures & _DECIDED and set(allowed) >= _DECIDED and not (whole and found):
        found.append("decisions")
    return tuple(found)


def sensitivity(task: Task, parts: Collection[str]) -> int:
    """L1 norm of what one patient adds to these tables, in patients' units."""
    classes = len(task.classes)
    if task.kind == "segmentation":
        return classes * len(set(parts))
    each = classes if task.multi_label else 1
    of = {"scores": 1 if _is_binary(task) else classes, "decisions": each}
    return sum(of[part] for part in set(parts))


def unit_of(task: Task, images_per_patient: int) -> int:
    """What one patient weighs in a table."""
    return images_per_patient * (DICE_STEPS if task.kind == "segmentation" else 1)


def noise_scale(task: Task, parts: Collection[str], unit: int, epsilon: float) -> Fraction:
    """Scale of the Laplace noise on each cell that makes all tables together ε-private."""
    return Fraction(unit * sensitivity(task, parts)) / Fraction(epsilon)


def patient_weights(
    patients: NDArray[np.int64], images: int, unit: int, randbelow: Callable[[int], int]
) -> Ints:
    """The weight of each image, ``(N,)``; a patient's images weigh at most `unit` together.

    Parameters
    ----------
    patients : NDArray
        ``(N,)`` the patient of each image.
    images : int
        Images of a patient that count; of more, so many are drawn at random.
    unit : int
        What a patient weighs.
    randbelow : callable
        Source of the draw.
    """
    weights = np.zeros(len(patients), np.int64)
    order = np.argsort(patients, kind="stable")
    _, starts = np.unique(patients[order], return_index=True)
    for own in np.split(order, starts[1:]) if len(order) else []:
        left = list(own)
        chosen = [left.pop(randbelow(len(left))) for _ in range(min(images, len(own)))]
        weights[chosen] = unit // len(chosen)
    return weights


def score_tables(
    task: Task,
    probabilities: Floats,
    truth: NDArray[np.bool_],
    weights: Ints,
    parts: Collection[str],
) -> Tables:
    """A classifier's exact tables.

    Parameters
    ----------
    probabilities, truth : NDArray
        ``(N, K)`` in 0 to 1, and whether the image has the class.
    weights : NDArray
        ``(N,)`` int64.

    Returns
    -------
    dict
        ``scores`` ``(K', 2, SCORE_BINS)``: images without and with a class by score, for the last
        of two classes alone; ``decisions`` ``(K, K, CONFIDENCE_BINS)``, truth by answer by
        confidence, multi-label ``(K, 2, 2, CONFIDENCE_BINS)``.
    """
    makers = {"scores": _scores, "decisions": _decisions}
    return {name: makers[name](task, probabilities, truth, weights) for name in parts}


def overlap_tables(values: Floats, weights: Ints, parts: Collection[str]) -> Tables:
    """A segmenter's exact tables.

    Parameters
    ----------
    values : NDArray
        ``(3, N, K)`` Dice, IoU and HD95 (mm) of each image; NaN where undefined.
    weights : NDArray
        ``(N,)`` int64.

    Returns
    -------
    dict
        For each part ``(K, 2)``: the weight that is missing from 1 and the weight that is there, so
        that their sum counts images and the second over the sum is the mean. HD95 in units of
        ``MOST_DISTANCE``.
    """
    tables = {}
    for name in parts:
        own = values[_OVERLAPS.index(name)] / (MOST_DISTANCE if name == "hd95" else 1.0)
        there = np.isfinite(own)
        full = there * weights[:, None]
        share = np.rint(np.where(there, np.clip(own, 0.0, 1.0), 0.0) * full).astype(np.int64)
        tables[name] = np.stack([(full - share).sum(axis=0), share.sum(axis=0)], axis=1)
    return tables


def add_noise(
    tables: Tables, scale: Fraction, randbelow: Callable[[int], int] = secrets.randbelow
) -> Tables:
    """The tables with independent discrete Laplace noise on every cell, empty ones included."""
    return {
        name: table + discrete_laplace(table.shape, scale, randbelow)
        for name, table in tables.items()
    }


@dataclass(frozen=True, eq=False)
class PrivateCounts:
    """Noisy tables of one site, or of several added up.

    Attributes
    ----------
    task : Task
        What they are about.
    tables : mapping
        Name to int64 table; cells may be negative.
    unit : int
        What one patient weighs.
    variance : float
        Of the noise on each cell.
    epsilon : float or None
        What the tables cost a patient; None where that has no bound.
    """

    task: Task
    tables: Mapping[str, Ints]
    unit: int
    variance: float
    epsilon: float | None = None

    @classmethod
    def from_arrays(
        cls,
        task: Task,
        arrays: Mapping[str, NDArray[Any]],
        unit: int,
        scale: float,
        epsilon: float | None = None,
    ) -> PrivateCounts:
        """Take tables from outside, trusting nothing.

        Raises
        ------
        ProtocolError
            A name, a shape, a dtype or a value is not that of any possible table.
        """
        shapes = _shapes(task)
        agree(len(arrays) > 0 and set(arrays) <= set(shapes), "counts must be tables of the task")
        same_names(arrays, [name for name in shapes if name in arrays])
        for name, table in arrays.items():
            if table.shape != shapes[name] or table.dtype != np.int64:
                raise refuse(f"`{name}` must be whole numbers of shape {shapes[name]}", table.shape)
            agree(bool((np.abs(table) < _LARGEST).all()), f"`{name}` must hold counts")
        # Beyond these bounds the variance is no float.
        agree(1 <= unit < _LARGEST and 2**-6 <= scale <= 2**40, "noise must be stated")
        tables = {name: np.array(table) for name, table in arrays.items()}
        return cls(task, tables, unit, variance(Fraction(scale)), epsilon)

    @classmethod
    def of(cls, task: Task, counts: ClassificationCounts | SegmentationCounts) -> PrivateCounts:
        """Exact counts as tables without noise, to be added to others; one image is one unit."""
        if isinstance(counts, SegmentationCounts):
            n, steps = counts.counts * DICE_STEPS, float(DICE_STEPS)
            sums = counts.sums * steps / np.array([[1.0], [1.0], [MOST_DISTANCE]])
            there = np.minimum(np.rint(sums).astype(np.int64), n)
            tables = {
                name: np.stack([n[row] - there[row], there[row]], axis=1)
                for row, name in enumerate(_OVERLAPS)
            }
            return cls(task, tables, DICE_STEPS, 0.0)
        coarse = histogram.bin_of(histogram.middles(), SCORE_BINS)
        scores = np.zeros((counts.classes, 2, SCORE_BINS), np.int64)
        for fine, place in enumerate(coarse):
            scores[:, :, place] += counts.scores[:, :, fine].T
        decisions = np.zeros((*counts.confusion.shape, CONFIDENCE_BINS), np.int64)
        decisions[..., CONFIDENCE_BINS // 2] = counts.confusion
        tables = {"scores": scores[-1:] if _is_binary(task) else scores, "decisions": decisions}
        return cls(task, tables, 1, 0.0)

    @property
    def classes(self) -> int:
        """Number of classes, K; in segmentation of foreground classes."""
        return len(self.task.classes)

    @property
    def images(self) -> int:
        """About how many patients were counted, noise included."""
        shares = [
            int(table.sum()) / sensitivity(self.task, [name]) for name, table in self.tables.items()
        ]
        return max(0, round(max(shares, default=0.0) / self.unit))

    @property
    def images_deviation(self) -> float:
        """Standard deviation that the noise gives :attr:`images`, at most."""
        cells = max((table.size for table in self.tables.values()), default=0)
        return math.sqrt(self.variance * cells) / self.unit

    def merge(self, other: PrivateCounts) -> PrivateCounts:
        """The tables of both together; what only one of them has is left out."""
        unit = math.lcm(self.unit, other.unit)
        mine, theirs = unit // self.unit, unit // other.unit
        tables = {
            name: self.tables[name] * mine + other.tables[name] * theirs
            for name in self.tables
            if name in other.tables
        }
        noise = self.variance * mine**2 + other.variance * theirs**2
        known = self.epsilon is not None and other.epsilon is not None
        epsilon = max(self.epsilon or 0.0, other.epsilon or 0.0) if known else None
        return PrivateCounts(self.task, tables, unit, noise, epsilon)

    __add__ = merge

    def figures(self, names: Sequence[MetricName]) -> dict[str, float | None]:
        """The figures by name; None where these tables do not give one."""
        if self.task.kind == "segmentation":
            return {name: mean(self.per_class(name)) for name in names}
        counts = self.as_classification()
        return {name: FIGURES[name](counts) for name in names}

    def per_class(self, name: str) -> list[float | None]:
        """Segmentation: the mean over images for each class."""
        if name not in self.tables:
            return [None] * self.classes
        scale = MOST_DISTANCE if name == "hd95" else 1.0
        rows = _project(self.tables[name])
        means = [ratio(there, missing + there) for missing, there in rows]
        return [None if one is None else one * scale for one in means]

    def spread(self, name: str) -> list[float | None]:
        """Segmentation: not known from these tables."""
        return [None] * self.classes

    def standard_errors(self, names: Sequence[MetricName], draws: int = 100) -> dict[str, float]:
        """Standard deviation that the noise alone gives each figure, by a parametric bootstrap."""
        if not self.variance:
            return {}
        rng, found = np.random.default_rng(0), list[dict[str, float | None]]()
        for _ in range(draws):
            tables = {
                name: table + np.rint(rng.normal(0, math.sqrt(self.variance), table.shape))
                for name, table in self.tables.items()
            }
            again = PrivateCounts(self.task, tables, self.unit, self.variance)
            found.append(again.figures(names))
        columns = {name: [one[name] for one in found] for name in names}
        return {
            name: float(np.std([v for v in column if v is not None]))
            for name, column in columns.items()
            if sum(v is not None for v in column) > 1
        }

    def intervals(
        self,
        names: Sequence[MetricName],
        per_image: float = 1.0,
        errors: Mapping[str, float] | None = None,
    ) -> dict[str, Interval]:
        """Intervals of 95 % of the figures that are defined: of so few patients, and of the noise.

        Parameters
        ----------
        names : sequence of str
            Figures.
        per_image : float
            Patients that one image stands for, at most 1; where the tables count patients, it is
            not used.
        errors : mapping, optional
            What :meth:`standard_errors` gives for these names.
        """
        values = self.figures(names)
        errors = self.standard_errors(names) if errors is None else errors
        per_count = self._per_count(per_image)
        if self.task.kind == "segmentation":
            found = {name: self._overlap_interval(name, per_image) for name in names}
        else:
            counts = self.as_classification()
            given = [name for name in names if values[name] is not None]
            found = {name: INTERVALS[name](counts, per_count) for name in given}
        return {
            name: widen(value, interval, errors.get(name, 0.0), _bounds(name))
            for name, interval in found.items()
            if interval is not None and (value := values[name]) is not None
        }

    def class_intervals(self, name: str, per_image: float = 1.0) -> list[Interval | None]:
        """Segmentation: intervals of :meth:`per_class`, without the noise.

        The tables tell no spread: it is taken to be the largest that a mean admits.
        """
        if name not in self.tables:
            return [None] * self.classes
        scale, per_count = MOST_DISTANCE if name == "hd95" else 1.0, self._per_count(per_image)
        found: list[Interval | None] = []
        for missing, there in _project(self.tables[name]):
            share = ratio(there, missing + there)
            own = None if share is None else wilson(share, (missing + there) * per_count)
            found.append(None if own is None else (own[0] * scale, own[1] * scale))
        return found

    def _overlap_interval(self, name: str, per_image: float) -> Interval | None:
        pairs = zip(self.per_class(name), self.class_intervals(name, per_image), strict=True)
        parts = [(m, i) for m, i in pairs if m is not None and i is not None]
        return mean_of(parts, independent=False)[1] if parts else None

    def _per_count(self, per_image: float) -> float:
        """Patients that a weight of 1 stands for; tables with ε weigh patients, not images."""
        return (per_image if self.epsilon is None else 1.0) / self.unit

    def gives(self, name: str) -> bool:
        """Whether the table that gives a figure is here."""
        if self.task.kind == "segmentation":
            return name in self.tables
        by_scores = name in _RANKED or _scores_tell_decisions(self.task)
        by_decisions = name in _DECIDED and "decisions" in self.tables
        return by_decisions or (by_scores and "scores" in self.tables)

    def as_classification(self) -> ClassificationCounts:
        """Classification: the counts without negative cells, in units (see :attr:`unit`)."""
        k, several = self.classes, self.task.multi_label
        made = _Parts(k, several)
        if "scores" in self.tables:
            clean = _project(self.tables["scores"])
            made.scores = _all_classes(clean) if _is_binary(self.task) else clean
            made.take_loss(self.task)
            if _scores_tell_decisions(self.task):
                made.decide_from_scores()
        if "decisions" in self.tables:
            flat = self.tables["decisions"].reshape(k, -1)
            made.take_decisions(_project(flat).reshape(self.tables["decisions"].shape))
        return made.counts()


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
    np.add.at(
        table, (classes, truth.astype(int), histogram.bin_of(p, SCORE_BINS)), weights[:, None]
    )
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


_MIDDLES: Final = histogram.middles(SCORE_BINS)


def _bounds(name: str) -> Interval:
    return (0.0, math.inf) if name in ("loss", "hd95") else (0.0, 1.0)


def _project(table: NDArray[Any]) -> Floats:
    """The nearest table without negative cells in which each row keeps its sum (0 if below).

    Projection onto a simplex (Duchi et al., 2008, figure 1); post-processing of what was released.
    """
    rows = np.asarray(table, np.float64).reshape(-1, table.shape[-1])
    total = np.maximum(rows.sum(axis=1, keepdims=True), 0.0)
    falling = -np.sort(-rows, axis=1)
    above = (np.cumsum(falling, axis=1) - total) / np.arange(1, rows.shape[1] + 1)
    last = np.maximum((falling > above).sum(axis=1) - 1, 0)
    shift = np.take_along_axis(above, last[:, None], axis=1)
    clean: Floats = np.where(total > 0, np.maximum(rows - shift, 0.0), 0.0)
    return clean.reshape(table.shape)


def _all_classes(one: Floats) -> Floats:
    """Tables of both of two classes from that of the last one: p of the first is 1 - p."""
    return np.stack([one[0, ::-1, ::-1], one[0]])


def _shapes(task: Task) -> dict[str, tuple[int, ...]]:
    k = len(task.classes)
    if task.kind == "segmentation":
        return dict.fromkeys(_OVERLAPS, (k, 2))
    answers = (k, 2, 2) if task.multi_label else (k, k)
    return {
        "scores": (1 if _is_binary(task) else k, 2, SCORE_BINS),
        "decisions": (*answers, CONFIDENCE_BINS),
    }


def _is_binary(task: Task) -> bool:
    return len(task.classes) == 2 and not task.multi_label


def _scores_tell_decisions(task: Task) -> bool:
    return task.multi_label or _is_binary(task)
