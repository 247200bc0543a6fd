"""Measure a model on one part of a site's patients, as counts that can be added up."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.data.types import PreparedSite
from client.training.device import autocast
from client.training.runtime import Runtime
from client.training.source import Source
from fedward.metrics import ClassificationCounts, Counts, SegmentationCounts
from fedward.plan.schema import Plan

_BATCH = 128


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
) -> Counts:
    """Counts over the given images.

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
    total: Counts | None = None
    # Without gradients twice as many fit; fewer where memory ran out.
    most = min(_BATCH, 2 * runtime.physical_batch)
    starts = range(0, len(indices), most)
    for part, start in enumerate(starts, 1):
        batch = indices[start : start + most]
        inputs, _ = source.plain(batch)
        with autocast(runtime.torch_device, private=False):
            logits = module(inputs).float()
        counts = _count(plan, logits, site, batch, surface=surface)
        total = counts if total is None else total + counts  # type: ignore[operator, arg-type]
        if runtime.watch is not None:
            runtime.watch(part, len(starts))
    if total is None:
        raise ValueError("nothing to evaluate on")
    return total


def _count(
    plan: Plan, logits: torch.Tensor, site: PreparedSite, batch: NDArray[np.int64], *, surface: bool
) -> Counts:
    targets = np.asarray(site.targets[batch])
    if plan.task.kind == "segmentation":
        guess = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
        return SegmentationCounts.from_masks(
            guess, targets, len(plan.task.classes), site.spacing[batch], hd95=surface
        )
    scores = (
        torch.sigmoid(logits) if plan.task.multi_label else torch.softmax(logits.double(), dim=1)
    )
    return ClassificationCounts.from_scores(scores.double().cpu().numpy(), targets)
