"""Metrics from counts that can be added over sites and contain no identity.

A mean of the sites' AUCs is not the AUC of all patients. Sites therefore send counts; their sum
gives the figures of the pooled images. A site may withhold a part, which then holds nothing; a
figure is that of the sites that let its part go.
"""

from fedward.metrics.classification import ClassificationCounts
from fedward.metrics.private_counts import PrivateCounts
from fedward.metrics.segmentation import SegmentationCounts
from fedward.metrics.task import AnyCounts, Counts, counts_for, counts_from_arrays

__all__ = [
    "AnyCounts",
    "ClassificationCounts",
    "Counts",
    "PrivateCounts",
    "SegmentationCounts",
    "counts_for",
    "counts_from_arrays",
]
