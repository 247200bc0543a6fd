"""Apply a model to one part of a site's patients, and count its answers."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedward.metrics import ClassificationCounts, Counts, SegmentationCounts
from fedward.metrics.answers import truth
from fedward.metrics.private_counts import (
    NoisyTables,
    add_noise,
    overlap_tables,
    patient_weights,
    score_tables,
)
from fedward.metrics.segmentation import overlaps
from fedward.plan.schema import Plan
from fedward_client.data.sample import PreparedSite
from fedward_client.training.batches import FILLER
from fedward_client.training.device import autocast
from fedward_client.training.runtime import Runtime
from fedward_client.training.source import Source

_BATCH: Final = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True)
class Answers:
    """What a model answered, image by image; it never leaves the trainer.

    Attributes
    ----------
    plan : Plan
        The study.
    values : NDArray
        Classification: ``(N, K)`` probabilities. Segmentation: ``(3, N, K)`` Dice, IoU and HD95.
    targets : NDArray
        Classification: ``(N,)`` class indices or ``(N, K)`` flags.
    patients : NDArray
        ``(N,)`` the patient of each image.
    """

    plan: Plan
    values: NDArray[np.float64]
    targets: NDArray[Any]
    patients: NDArray[np.int64]

    def exact(self) -> Counts:
        """Counts over all images."""
        if self.plan.task.kind == "segmentation":
            return SegmentationCounts.from_values(self.values)
        return ClassificationCounts.from_scores(self.values, self.targets)

    def noisy(
        self, how: NoisyTables, randbelow: Callable[[int], int] = secrets.randbelow
    ) -> dict[str, NDArray[np.int64]]:
        """Tables with noise; nothing exact is in them."""
        weights = np.full(len(self.patients), how.unit, np.int64)
        if how.by_patient:
            weights = patient_weights(self.patients, how.images_per_patient, how.unit, randbelow)
        task = self.plan.task
        if task.kind == "segmentation":
            tables = overlap_tables(self.values, weights, how.parts)
        else:
            flags = truth(np.asarray(self.targets), self.values)
            tables = score_tables(task, self.values, flags, weights, how.parts)
        noisy = add_noise(tables, how.scale, randbelow)
        return {
            name: np.where(table < how.least, 0, table) if how.least else table
            for name, table in noisy.items()
        }


@torch.no_grad()
def evaluate(
    plan: Plan,
    module: nn.Module,
    source: Source,
    site: PreparedSite,
    indices: NDArray[np.int64],
    runtime: Runtime,
    *,
    surface: bool,
) -> Answers:
    """The model's answers on the given images.

    An image on which the model gives no finite number counts as answered by chance: whether an
    evaluation succeeds must not depend on a single patient.

    Parameters
    ----------
    module : nn.Module
        Takes what ``source`` gives.
    indices : NDArray
        ``(n,)`` images; at least one.
    surface : bool
        Segmentation: whether to measure HD95 too, which takes most of the time.
    """
    module.eval()
    found = []
    # All batches have one size: kernels round by it, and an answer must not depend on how many
    # other images there are. Fewer where memory ran out.
    most = min(_BATCH[runtime.torch_device.type], runtime.physical_batch)
    starts = range(0, len(indices), most)
    for part, start in enumerate(starts, 1):
        batch = indices[start : start + most]
        filled = np.full(most, FILLER)
        filled[: len(batch)] = batch
        inputs, _ = source.plain(filled)
        with autocast(runtime.torch_device, private=False):
            logits = module(inputs).float()[: len(batch)]
        found.append(_values(plan, logits, site, batch, surface=surface))
        if runtime.watch is not None:
            runtime.watch(part, len(starts))
    if not found:
        raise ValueError("nothing to evaluate on")
    axis = 1 if plan.task.kind == "segmentation" else 0
    values = np.concatenate(found, axis=axis)
    return Answers(plan, values, np.asarray(site.targets[indices]), site.patients[indices])


def _values(
    plan: Plan, logits: torch.Tensor, site: PreparedSite, batch: NDArray[np.int64], *, surface: bool
) -> NDArray[np.float64]:
    if plan.task.kind == "segmentation":
        targets = np.asarray(site.targets[batch])
        guess = logits.nan_to_num(nan=0.0).argmax(dim=1).to(torch.uint8).cpu().numpy()
        classes = len(plan.task.classes)
        return overlaps(guess, targets, classes, site.spacing[batch], hd95=surface)
    logits = logits.double()
    finite = torch.isfinite(logits).all(dim=1, keepdim=True)
    logits = torch.where(finite, logits, 0.0)  # all classes alike
    scores = torch.sigmoid(logits) if plan.task.multi_label else torch.softmax(logits, dim=1)
    values: NDArray[np.float64] = scores.cpu().numpy()
    return values
