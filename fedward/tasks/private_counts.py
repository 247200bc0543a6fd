"""Counts of an evaluation that are differentially private for each patient, and their figures.

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
from fedward.plan.schema import Task
from fedward.tasks.base import Counts, Ints, Measured, Tables, agree, refuse, same_names
from fedward.tasks.intervals import Interval, widen

MOST_COUNT_NOISE: Final = 1000.0
"""Largest scale of noise without ε that a policy can ask for, in images."""

# Noisy cells must fit int64 sums over many sites.
_LARGEST: Final = 1 << 50


@dataclass(frozen=True)
class NoisyTables:
    """How an evaluation is counted where no exact count may leave.

    Attributes
    ----------
    parts : tuple of str
        The tables (see :meth:`fedward.tasks.base.TaskSpec.parts_for`).
    scale : Fraction
        Of the Laplace noise on each cell.
    unit : int
        What a patient weighs; without ``by_patient``, an image.
    images_per_patient : int
        Images of a patient that count.
    by_patient : bool
        Whether a patient weighs one unit however many images there are.
    least : int
        What is about fewer units than this is withheld or merged; see
        :meth:`fedward.tasks.base.TaskSpec.withhold`.
    """

    parts: tuple[str, ...]
    scale: Fraction
    unit: int
    images_per_patient: int = 1
    by_patient: bool = True
    least: int = 0


def noise_scale(task: Task, parts: Collection[str], unit: int, epsilon: float) -> Fraction:
    """Scale of the Laplace noise on each cell that makes all tables together ε-private."""
    return Fraction(unit * task.spec.sensitivity(task, parts)) / Fraction(epsilon)


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
        shapes = task.spec.table_shapes(task)
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
    def of(cls, task: Task, counts: Counts) -> PrivateCounts:
        """Exact counts as tables without noise, to be added to others; one image is one unit."""
        return cls(task, task.spec.tables_of(task, counts), task.spec.unit, 0.0)

    @property
    def images(self) -> int:
        """About how many patients were counted, noise included."""
        shares = [
            int(table.sum()) / self.task.spec.sensitivity(self.task, [name])
            for name, table in self.tables.items()
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

    def view(self) -> Measured:
        """What the tables measure, in units (see :attr:`unit`); without negative cells."""
        return self.task.spec.view(self.task, self.tables)

    def figures(self, names: Sequence[str]) -> dict[str, float | None]:
        """The figures by name; None where these tables do not give one."""
        return self.view().figures(names)

    def per_class(self, name: str) -> list[float | None]:
        """The figure of each class; see :meth:`Measured.per_class`."""
        return self.view().per_class(name)

    def standard_errors(self, names: Sequence[str], draws: int = 100) -> dict[str, float]:
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
        names: Sequence[str],
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
        view = self.view()
        values, found = view.figures(names), view.intervals(names, self._per_count(per_image))
        errors = self.standard_errors(names) if errors is None else errors
        return {
            name: widen(value, interval, errors.get(name, 0.0), self.task.spec.metric(name).bounds)
            for name, interval in found.items()
            if (value := values[name]) is not None
        }

    def class_intervals(self, name: str, per_image: float = 1.0) -> list[Interval | None]:
        """Intervals of 95 % of :meth:`per_class`, without the noise."""
        return self.view().class_intervals(name, self._per_count(per_image))

    def gives(self, name: str) -> bool:
        """Whether the table that gives a figure is here."""
        return self.task.spec.tables_give(self.task, self.tables, name)

    def _per_count(self, per_image: float) -> float:
        """Patients that a weight of 1 stands for; tables with ε weigh patients, not images."""
        return (per_image if self.epsilon is None else 1.0) / self.unit


AnyCounts = Counts | PrivateCounts
