"""All kinds of task, and all metrics."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from numpy.typing import NDArray

from fedward.tasks.base import Counts, MetricSpec, TaskSpec
from fedward.tasks.classification import CLASSIFICATION
from fedward.tasks.detection import DETECTION
from fedward.tasks.segmentation import SEGMENTATION

if TYPE_CHECKING:
    from fedward.plan.schema import Task

TASKS: Final[Mapping[str, TaskSpec]] = MappingProxyType(
    {spec.kind: spec for spec in (CLASSIFICATION, SEGMENTATION, DETECTION)}
)
"""The kinds of task by name."""

DRAFTED: Final = tuple(kind for kind, spec in TASKS.items() if spec.drafted)
"""Kinds of task for which a simulation writes synthetic patients and first plans."""


def _metrics() -> dict[str, MetricSpec]:
    found: dict[str, MetricSpec] = {}
    for spec in TASKS.values():
        for metric in spec.metrics:
            found.pop(metric.name, None)  # what several tasks have stands where the last has it
            found[metric.name] = metric
    return found


METRICS: Final[Mapping[str, MetricSpec]] = MappingProxyType(_metrics())
"""The metrics by name; what a report says of one of this name is the same for every task."""

LOSSES: Final = tuple(
    dict.fromkeys(
        loss for spec in TASKS.values() for names in spec.losses.values() for loss in names
    )
)
"""Names of the losses of all tasks."""


def kinds_of(target: str) -> str:
    """The kinds of task whose images come with labels, masks or boxes; as in a sentence."""
    return " or ".join(kind for kind, spec in TASKS.items() if spec.target == target)


def counts_from_arrays(task: Task, arrays: Mapping[str, NDArray[Any]]) -> Counts:
    """Take counts from outside and hold them against the task.

    Raises
    ------
    ProtocolError
        They are not possible counts, or those of another task.
    """
    counts = task.spec.counts.from_arrays(arrays)
    counts.held_to(task)
    return counts
