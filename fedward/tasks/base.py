"""What a kind of task and a metric are, and checks of count arrays that come from outside.

Nothing here imports torch or scipy: reading a plan needs this module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from fedward.errors import ModelError, PlanError, ProtocolError
from fedward.rule_codes import RuleCode
from fedward.tasks.intervals import Interval

if TYPE_CHECKING:
    from torch import Tensor

    from fedward.plan.schema import Task

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Tables = dict[str, Ints]
Boxes = tuple[Floats, Floats, Ints]
Target = Literal["labels", "masks", "boxes"]
Released = tuple[dict[str, NDArray[Any]], tuple[str, ...]]


@dataclass(frozen=True)
class MetricSpec:
    """A metric: all that plans, policies, reports and documentation say of it follows from here.

    Attributes
    ----------
    name : str
        As in a plan's ``metrics.report``.
    label : str
        In reports.
    figure : callable
        From a task's counts to the value; None where the counts do not define one.
    interval : callable
        From the counts and the patients that one count stands for to the interval of 95 %.
    arrays : tuple of str
        The arrays of the exact counts that tell this metric; the first is the one it is computed
        from. An array leaves a site only if the site's policy allows every metric that it tells.
    table : str or None
        The noisy table of private counts that gives the metric; the same rule holds for it.
    better : str
        "higher" or "lower".
    bounds : tuple of float
        Least and largest value.
    digits : int
        Decimals in reports.
    implied : bool
        Whether the metric follows from others of its arrays, so that a policy that lists those
        allows it too. A metric that a release adds must not withhold what a site lets out today.
    by_class : bool
        Whether reports show a value for each class.
    since : int
        The plan schema version that added it (see :mod:`fedward.plan.versions`).
    """

    name: str
    label: str
    figure: Callable[[Any], float | None]
    interval: Callable[[Any, float], Interval | None]
    arrays: tuple[str, ...]
    table: str | None
    better: Literal["higher", "lower"] = "higher"
    bounds: Interval = (0.0, 1.0)
    digits: int = 3
    implied: bool = False
    by_class: bool = False
    since: int = 1


def permissions(
    metrics: Iterable[MetricSpec], places: Callable[[MetricSpec], Iterable[str]]
) -> dict[str, frozenset[str]]:
    """By array or table, the metrics that a policy must allow before it leaves."""
    needed: dict[str, set[str]] = {}
    for metric in metrics:
        for place in places(metric):
            needed.setdefault(place, set()).update(() if metric.implied else (metric.name,))
    return {place: frozenset(names) for place, names in needed.items()}


class Measured(ABC):
    """What gives the metrics of a task: exact counts, or the view of noisy tables."""

    spec: ClassVar[TaskSpec]

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes, K; in segmentation of foreground classes."""

    def figures(self, names: Sequence[str]) -> dict[str, float | None]:
        """The figures by name; None where the images do not define one.

        Raises
        ------
        PlanError
            A name is not a metric of the task.
        """
        self.spec.known(names)
        return {name: self.spec.metric(name).figure(self) for name in names}

    def intervals(self, names: Sequence[str], per_image: float = 1.0) -> dict[str, Interval]:
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
        found = {name: self.spec.metric(name).interval(self, per_image) for name in given}
        return {name: interval for name, interval in found.items() if interval is not None}

    def per_class(self, name: str) -> list[float | None]:
        """The figure of each class, where the task has such figures."""
        return [None] * self.classes

    def class_intervals(self, name: str, per_image: float = 1.0) -> list[Interval | None]:
        """Intervals of 95 % of :meth:`per_class`; None where there is none."""
        return [None] * self.classes


class Counts(Measured):
    """Exact counts over images; those of several sites add up to those of all images."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Take counts from outside, trusting nothing (see :meth:`to_arrays`).

        Raises
        ------
        ProtocolError
            A name, a shape, a value or a sum is not that of any possible counts.
        """

    @abstractmethod
    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The counts as named arrays, ready to be sent."""

    @property
    @abstractmethod
    def images(self) -> int:
        """Fewest images that these counts can be of; a site may withhold parts."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """The counts of both together.

        Raises
        ------
        ProtocolError
            They are of different tasks.
        """

    def __add__(self, other: Self) -> Self:
        return self.merge(other)

    @abstractmethod
    def gives(self, name: str) -> bool:
        """Whether the part that gives a figure is here, so was not withheld."""

    @abstractmethod
    def held_to(self, task: Task) -> None:
        """Raise ProtocolError unless these are counts of this task."""

    @abstractmethod
    def are_of(self, images: int) -> bool:
        """Whether these can be all counts of so many images."""

    @abstractmethod
    def release(self, allowed: Collection[str], least: int, digits: int) -> Released:
        """The counts as they may leave a site.

        Parameters
        ----------
        allowed : collection of str
            Metrics that may be worked out from what leaves.
        least : int
            Counts of a class with fewer images are withheld, bins with fewer are merged.
        digits : int
            Decimals that sums keep.

        Returns
        -------
        tuple
            Arrays in which what is withheld is 0, and the names of what was withheld.
        """


@dataclass(frozen=True)
class BundleSpec:
    """What a MONAI bundle says of the task's output.

    Attributes
    ----------
    type, format : str
        Of the network's output, in the words of MONAI's bundle specification.
    files : str
        What a run over a folder writes.
    postprocessing : tuple of dict
        Transforms after the activation.
    handlers : tuple of dict
        Handlers of the evaluator.
    activated : bool
        Whether logits become probabilities before these transforms; else they do it themselves.
    channels_last : bool
        Whether the network's last axis holds the channels, which MONAI wants second.
    scripts : tuple of str
        Files of ``artifacts/scripts`` that the transforms are in, besides the preprocessing.
    besides : tuple of str
        Channels of the output after those of the classes.
    output : str
        What the output is, where it is not logits of each class; ``{rest}`` stands for its sides
        after the channels.
    """

    type: str
    format: str
    files: str
    postprocessing: tuple[dict[str, Any], ...] = ()
    handlers: tuple[dict[str, Any], ...] = ()
    activated: bool = True
    channels_last: bool = False
    scripts: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    output: str = ""


class TaskSpec(ABC):
    """A kind of task; what differs between kinds is here and nowhere else.

    Attributes
    ----------
    kind : str
        As in a plan's ``task.kind``.
    target : str
        What readers must give for each image: "labels", "masks" or "boxes".
    background : bool
        Whether the model has an output, the first, for what is of no class.
    dense : bool
        Whether the model answers for each pixel.
    pooled : bool
        Whether the model ends in one vector of features of an image.
    drafted : bool
        Whether a simulation writes synthetic patients and first plans for it.
    losses : mapping
        By what a plan's task is called in messages, the losses that it takes.
    metrics : tuple of MetricSpec
        What can be measured.
    counts : type of Counts
        What sites send.
    answer_axis : int
        The axis of images in the array of :meth:`answers`.
    unit : int
        What an image weighs in a noisy table.
    bundle : BundleSpec
        For exported models.
    since : int
        The plan schema version that added it (see :mod:`fedward.plan.versions`).
    """

    kind: ClassVar[str]
    target: ClassVar[Target]
    background: ClassVar[bool]
    dense: ClassVar[bool]
    pooled: ClassVar[bool] = False
    drafted: ClassVar[bool] = True
    losses: ClassVar[Mapping[str, tuple[str, ...]]]
    metrics: ClassVar[tuple[MetricSpec, ...]]
    counts: ClassVar[type[Counts]]
    answer_axis: ClassVar[int]
    unit: ClassVar[int]
    bundle: ClassVar[BundleSpec]
    since: ClassVar[int] = 1

    def metric(self, name: str) -> MetricSpec:
        """A metric of the task by its name; raises PlanError for one that it does not have."""
        self.known([name])
        return next(metric for metric in self.metrics if metric.name == name)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(metric.name for metric in self.metrics)

    def known(self, names: Iterable[str], have: Iterable[str] | None = None) -> None:
        """Raise PlanError for a metric that the task does not have, or that is not in `have`."""
        if unknown := sorted(set(names) - set(self.metric_names if have is None else have)):
            raise PlanError(
                f"{self.kind} has no such metric",
                value=unknown[0],
                fix="Remove it from the plan",
                code=RuleCode.METRIC,
            )

    # What a plan says and what is said of it.

    def name(self, task: Task) -> str:
        """What the task is called where losses are chosen; a key of :attr:`losses`."""
        return self.kind

    @abstractmethod
    def rules(self, classes: Sequence[str], multi_label: bool) -> Iterator[tuple[str, str, str]]:
        """Key, rule and next step of what no such task can have."""

    @abstractmethod
    def goal(self, task: Task, classes: str, images: str, names: str) -> str:
        """What the model learns, in words: of ``2 classes``, in ``2D images``, these names."""

    def output_shape(self, task: Task, size: Sequence[int]) -> tuple[int, ...]:
        """The shape of the model's output for one image."""
        return (task.outputs, *(size if self.dense else ()))

    # Targets.

    @abstractmethod
    def target_bytes(self, task: Task, pixels: int) -> int:
        """Bytes that the target of a prepared image takes at most."""

    @abstractmethod
    def strata(self, task: Task, labels: Sequence[Sequence[int]]) -> list[int] | None:
        """What the division by patient keeps balanced, for each image; None: nothing."""

    @abstractmethod
    def class_counts(
        self, task: Task, targets: NDArray[Any], indices: NDArray[np.int64]
    ) -> tuple[int, ...]:
        """Those of these images that are of each class; empty where a site tells none."""

    @abstractmethod
    def classes_seen(self, task: Task, targets: NDArray[Any]) -> set[int]:
        """The classes that occur in targets, from 0."""

    # Answers of a model and their counts.

    @abstractmethod
    def probabilities(self, task: Task, logits: Tensor) -> Tensor:
        """A model's output ``(n, *output_shape)`` as float64 probabilities of the same shape.

        Not finite numbers are taken as all classes alike.
        """

    @abstractmethod
    def answers(
        self,
        task: Task,
        logits: Tensor,
        targets: NDArray[Any],
        spacing: NDArray[Any],
        *,
        surface: bool,
    ) -> Floats:
        """What a model's output on a batch says, image by image; it never leaves the site.

        An image on which the model gives no finite number counts as answered by chance.

        Parameters
        ----------
        logits : Tensor
            ``(n, *output_shape)``.
        targets : NDArray
            Of the same images.
        spacing : NDArray
            ``(n, D)`` mm per axis.
        surface : bool
            Whether to measure distances between surfaces, which take most of the time.
        """

    def boxes(self, task: Task, output: Tensor) -> list[Boxes]:
        """What the model found on each image; of a task with boxes alone.

        Parameters
        ----------
        output : Tensor
            ``(n, *output_shape)``.

        Returns
        -------
        list of tuple
            For each image the corners ``(m, 2 D)``, lower ones first, in pixels of the prepared
            image; the ``(m,)`` scores, falling; and the ``(m,)`` classes, from 0.
        """
        raise NotImplementedError(self.kind)

    def answers_of_masks(
        self,
        task: Task,
        masks: NDArray[np.uint8],
        targets: NDArray[Any],
        spacing: NDArray[Any],
        *,
        surface: bool,
    ) -> Floats:
        """The same of ``(n, *S)`` label maps; of a dense task alone."""
        raise NotImplementedError(self.kind)

    @abstractmethod
    def confidence(self, task: Task, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        """``(n,)`` how sure the model is of the true answer: what membership attacks score."""

    @abstractmethod
    def count(self, answers: Floats, targets: NDArray[Any]) -> Counts:
        """Exact counts over all images."""

    # Noisy tables, each cell of which gets Laplace noise (fedward.tasks.private_counts).

    @abstractmethod
    def table_shapes(self, task: Task) -> dict[str, tuple[int, ...]]:
        """The tables and their shapes."""

    @abstractmethod
    def parts_for(
        self, task: Task, wanted: Collection[str], allowed: Collection[str], *, surface: bool
    ) -> tuple[str, ...]:
        """The tables that give the wanted metrics and none that is not allowed."""

    @abstractmethod
    def sensitivity(self, task: Task, parts: Collection[str]) -> int:
        """L1 norm of what one patient adds to these tables, in patients' units."""

    @abstractmethod
    def tables(
        self,
        task: Task,
        answers: Floats,
        targets: NDArray[Any],
        weights: Ints,
        parts: Collection[str],
    ) -> Tables:
        """Exact tables of answers.

        Parameters
        ----------
        answers : NDArray
            See :meth:`answers`.
        targets : NDArray
            Of the same images; not used where the answers say all.
        weights : NDArray
            ``(N,)`` int64.
        parts : collection of str
            The tables to fill.
        """

    def withhold(self, tables: Tables, least: int) -> Tables:
        """Noisy tables without what is about fewer images than `least`, in their unit.

        Setting single cells to 0 would drop a model's few errors, and the figures of what is left
        would be too good: a class, a row of ``(K, cells)``, goes as a whole.
        """
        return {
            name: np.where(table.sum(axis=1, keepdims=True) < least, 0, table)
            for name, table in tables.items()
        }

    @abstractmethod
    def tables_of(self, task: Task, counts: Any) -> Tables:
        """Exact counts as tables, to be added to noisy ones; an image weighs :attr:`unit`."""

    @abstractmethod
    def view(self, task: Task, tables: Mapping[str, Ints]) -> Measured:
        """What noisy tables measure, in their unit; negative cells are removed here."""

    def tables_give(self, task: Task, tables: Collection[str], name: str) -> bool:
        """Whether these tables give a metric; one of another task they do not."""
        return name in self.metric_names and self.metric(name).table in tables


# Above this a float64 no longer tells neighbouring whole numbers apart.
LARGEST = float(2**53)
_RESEND = "Send counts that this release has made"


def refuse(rule: str, value: object = None) -> ProtocolError:
    """The error for counts that are not what they should be."""
    return ProtocolError(rule, value=value, fix=_RESEND, where="counts", code=RuleCode.COUNTS)


def same_names(arrays: Mapping[str, NDArray[Any]], names: Iterable[str]) -> None:
    """Raise ProtocolError unless the arrays bear exactly these names."""
    if set(arrays) != set(names):
        raise refuse(f"the arrays must be {', '.join(sorted(names))}", len(arrays))


def numbers(name: str, array: object, shape: tuple[int | None, ...]) -> Floats:
    """A finite, non-negative float64 copy of an array of this shape (None: any length).

    Raises
    ------
    ProtocolError
        It is no array of numbers, has another shape, or holds a value that no count can have.
    """
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise refuse(f"`{name}` must be an array of numbers")
    if len(array.shape) != len(shape) or any(
        want is not None and have != want for have, want in zip(array.shape, shape, strict=True)
    ):
        wanted = " x ".join("any" if side is None else str(side) for side in shape)
        raise refuse(f"`{name}` must have the shape {wanted}", array.shape)
    if not np.isfinite(array).all() or (array < 0).any() or (array > LARGEST).any():
        raise refuse(f"`{name}` must be finite and not negative")
    return array.astype(np.float64)


def whole(name: str, array: object, shape: tuple[int | None, ...]) -> Ints:
    """Like :func:`numbers`, for whole numbers; int64."""
    values = numbers(name, array, shape)
    if (values != np.floor(values)).any():
        raise refuse(f"`{name}` must hold whole numbers")
    return values.astype(np.int64)


def agree(holds: bool, rule: str) -> None:
    """Raise ProtocolError when a relation between counts does not hold."""
    if not holds:
        raise refuse(rule)


def loss_sum(losses: NDArray[Any], n: int) -> Floats:
    """Summed loss and number of images, ``(2,)``.

    Raises
    ------
    ModelError
        There is not one finite loss of 0 or more for each of ``n`` images.
    """
    each = np.asarray(losses, dtype=np.float64)
    if each.shape != (n,) or not np.isfinite(each).all() or (each < 0).any():
        raise ModelError(RuleCode.LOSSES)
    return np.array([each.sum(), n], dtype=np.float64)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is defined; None when nothing is."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def ratio(part: float, all_: float) -> float | None:
    """A share; None of nothing."""
    return float(part / all_) if all_ > 0 else None


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """The array, made read-only."""
    array.flags.writeable = False
    return array


def project(table: NDArray[Any]) -> Floats:
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
