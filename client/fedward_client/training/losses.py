"""Losses that give one value per image, so that privacy can bound each patient's share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from monai.losses import DiceLoss, FocalLoss
from torch import Tensor
from torch.nn import functional

from fedward.plan.schema import Plan
from fedward.tasks.detection import anchors, levels

Loss = Callable[[Tensor, Tensor], Tensor]


def build_loss(plan: Plan, device: torch.device) -> Loss:
    """The plan's loss.

    Returns
    -------
    callable
        Maps logits ``(N, K, *S)`` and targets (see :class:`PreparedSite`) to
        ``(N,)`` losses. No image's value depends on another image, weights included.
    """
    loss = _loss(plan, device)
    return _DeepSupervision(loss) if plan.model.deep_supervision else loss


def _loss(plan: Plan, device: torch.device) -> Loss:
    weights = plan.training.class_weights
    weight = None if weights is None else torch.tensor(weights, device=device)
    name = plan.training.loss
    if name == "cross_entropy":
        return _CrossEntropy(weight, plan.training.label_smoothing)
    if name == "bce":
        return _BinaryCrossEntropy(weight)
    if name == "focal":
        return _Focal(weight)
    if name == "focal_giou":
        return _Detection(weight, plan.preprocessing.size, device)
    return _Segmentation(weight, focal=name == "dice_focal")


class _DeepSupervision:
    """A loss over the answers of several levels ``(N, L, K, *S)``, the finest first.

    Each counts half as much as the one before; together they count 1. In evaluation the network
    gives the first alone.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim == targets.ndim + 1:
            return self.loss(logits, targets)
        weights = [0.5**level for level in range(logits.shape[1])]
        levels = zip(weights, logits.unbind(dim=1), strict=True)
        parts = [weight * self.loss(one, targets) for weight, one in levels]
        return torch.stack(parts).sum(dim=0) / sum(weights)


class _CrossEntropy:
    def __init__(self, weight: Tensor | None, smoothing: float) -> None:
        self.weight, self.smoothing = weight, smoothing

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits, targets.long(), self.weight, reduction="none", label_smoothing=self.smoothing
        )


class _BinaryCrossEntropy:
    def __init__(self, weight: Tensor | None) -> None:
        self.weight = weight

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        values = functional.binary_cross_entropy_with_logits(
            logits, targets.float(), self.weight, reduction="none"
        )
        return values.mean(dim=1)


class _Focal:
    def __init__(self, weight: Tensor | None) -> None:
        self.weight, self.loss = weight, FocalLoss(use_softmax=True, reduction="none")

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        hot = functional.one_hot(targets.long(), logits.shape[1]).to(logits.dtype)
        values: Tensor = self.loss(logits, hot).sum(dim=1)
        return values if self.weight is None else values * self.weight[targets.long()]


class _Segmentation:
    """Soft Dice over the foreground plus a voxel-wise term, each averaged within one image."""

    def __init__(self, weight: Tensor | None, *, focal: bool) -> None:
        self.weight = weight
        self.dice = DiceLoss(
            include_background=False, softmax=True, reduction="none", smooth_nr=1.0, smooth_dr=1.0
        )
        self.focal = FocalLoss(use_softmax=True, reduction="none") if focal else None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        hot = functional.one_hot(targets.long(), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        overlap: Tensor = self.dice(logits, hot)
        return torch.add(overlap.flatten(1).mean(dim=1), self._voxels(logits, targets, hot))

    def _voxels(self, logits: Tensor, targets: Tensor, hot: Tensor) -> Tensor:
        if self.focal is None:
            values = functional.cross_entropy(logits, targets.long(), self.weight, reduction="none")
            return values.flatten(1).mean(dim=1)
        values = self.focal(logits, hot)
        if self.weight is not None:
            values = values * self.weight.view(1, -1, *[1] * (values.ndim - 2))
        total: Tensor = values.sum(dim=1).flatten(1).mean(dim=1)
        return total


_CANDIDATES: Final = 9  # nearest anchors of each level that a box may take
_BOX_WEIGHT: Final = 2.0  # of the boxes' term beside that of the classes, as in ATSS
# What an image's sums are divided by: about the anchors that a few boxes take. Were it the number
# that this batch takes, an image's term would depend on the others.
_NORMALISER: Final = 32.0


class _Detection:
    """Focal loss of the classes at each anchor, and GIoU loss of the boxes of those that take one.

    Which anchors take a box is found by ATSS (Zhang et al. 2020, arXiv:1912.02424); a box that
    would have none is taken by the anchor that it overlaps most.
    """

    def __init__(self, weight: Tensor | None, size: Sequence[int], device: torch.device) -> None:
        self.weight = weight
        self.anchors = torch.tensor(anchors(size), dtype=torch.float32, device=device)
        self.level_sizes = [math.prod(one) for one in levels(size)]
        self.focal = FocalLoss(gamma=2.0, alpha=0.25, reduction="none")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        sides = self.anchors.shape[1]
        logits, corners = outputs[..., :-sides], outputs[..., -sides:]
        hot, boxes = torch.zeros_like(logits), []
        for row, (found, truth) in enumerate(zip(corners, targets, strict=True)):
            truth = truth[truth[:, -1] > 0]
            taken = self.match(truth[:, :-1])
            places = torch.nonzero(taken >= 0)[:, 0]
            own = truth[taken[places]]
            hot[row, places, own[:, -1].long() - 1] = 1.0
            boxes.append((1 - paired_giou(found[places], own[:, :-1])).sum())
        values = self.focal(logits.transpose(1, 2), hot.transpose(1, 2))
        if self.weight is not None:
            values = values * self.weight.view(1, -1, 1)
        total: Tensor = values.sum(dim=(1, 2)) + _BOX_WEIGHT * torch.stack(boxes)
        return total / _NORMALISER

    @torch.no_grad()
    def match(self, boxes: Tensor) -> Tensor:
        """The box that each anchor takes, ``(A,)`` places of `boxes` ``(m, 2 D)``; -1: none."""
        count = len(self.anchors)
        if not len(boxes):
            return torch.full((count,), -1, device=boxes.device)
        shared = box_overlap(boxes, self.anchors)
        near = torch.zeros_like(shared, dtype=torch.bool)
        middles = [
            (b[:, : b.shape[1] // 2] + b[:, b.shape[1] // 2 :]) / 2 for b in (boxes, self.anchors)
        ]
        away, start = torch.cdist(middles[0], middles[1]), 0
        for size in self.level_sizes:
            part = away[:, start : start + size]
            places = part.topk(min(_CANDIDATES, size), dim=1, largest=False).indices + start
            near.scatter_(1, places, value=True)
            start += size
        number = near.sum(dim=1, keepdim=True)
        mean = (shared * near).sum(dim=1, keepdim=True) / number
        spread = ((shared - mean).square() * near).sum(dim=1, keepdim=True) / (number - 1).clamp(
            min=1
        )
        d = boxes.shape[1] // 2
        inside = (middles[1] > boxes[:, None, :d]) & (middles[1] < boxes[:, None, d:])
        may = near & (shared >= mean + spread.sqrt()) & inside.all(dim=2)
        best, which = torch.where(may, shared, -1.0).max(dim=0)
        taken = torch.where(best >= 0, which, -1)
        lost = torch.nonzero(~torch.isin(torch.arange(len(boxes), device=taken.device), taken))[
            :, 0
        ]
        taken[shared[lost].argmax(dim=1)] = lost
        return taken


def box_overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of ``(n, 2 D)`` with ``(m, 2 D)`` boxes, ``(n, m)``."""
    d = one.shape[1] // 2
    low = torch.maximum(one[:, None, :d], other[None, :, :d])
    high = torch.minimum(one[:, None, d:], other[None, :, d:])
    both = (high - low).clamp(min=0).prod(dim=2)
    sizes = [(boxes[:, d:] - boxes[:, :d]).prod(dim=1) for boxes in (one, other)]
    return both / (sizes[0][:, None] + sizes[1][None, :] - both)


def paired_giou(one: Tensor, other: Tensor) -> Tensor:
    """Generalised intersection over union of pairs of boxes, ``(n,)`` in -1 to 1.

    Source: Rezatofighi et al. 2019, arXiv:1902.09630. MONAI's raises an error for what is not
    finite; here such a patient counts as nothing in the private step.
    """
    d = one.shape[1] // 2
    low, high = one[:, :d].maximum(other[:, :d]), one[:, d:].minimum(other[:, d:])
    both = (high - low).clamp(min=0).prod(dim=1)
    sizes = [(boxes[:, d:] - boxes[:, :d]).prod(dim=1) for boxes in (one, other)]
    union = sizes[0] + sizes[1] - both
    hull = (one[:, d:].maximum(other[:, d:]) - one[:, :d].minimum(other[:, :d])).prod(dim=1)
    return both / union - (hull - union) / hull
