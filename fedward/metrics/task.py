"""The type of counts for each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from fedward.metrics.checks import agree
from fedward.metrics.classification import ClassificationCounts
from fedward.metrics.private_counts import PrivateCounts
from fedward.metrics.segmentation import SegmentationCounts
from fedward.plan.schema import Task

Counts = ClassificationCounts | SegmentationCounts
AnyCounts = Counts | PrivateCounts


def counts_for(task: Task) -> type[ClassificationCounts] | type[SegmentationCounts]:
    """The kind of counts that a task's figures come from."""
    return SegmentationCounts if task.kind == "segmentation" else ClassificationCounts


def counts_from_arrays(task: Task, arrays: Mapping[str, NDArray[Any]]) -> Counts:
    """Take counts from outside and hold them against the task.

    Raises
    ------
    ProtocolError
        They are not possible counts, or those of another task.
    """
    counts: Counts = counts_for(task).from_arrays(arrays)
    agree(counts.classes == len(task.classes), "counts must have the plan's classes")
    if isinstance(counts, ClassificationCounts):
        agree(counts.multi_label == task.multi_label, "counts must be multi-label as the plan is")
    return counts
