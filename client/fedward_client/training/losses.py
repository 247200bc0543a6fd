"""Losses that give one value per image, so that privacy can bound each patient's share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.losses import DiceLoss, FocalLoss
from torch import Tensor
from torch.nn import functional

from fedward.plan.schema import Plan

Loss = Callable[[Tensor, Tensor], Tensor]


def build_loss(plan: Plan, device: torch.device) -> Loss:
    """The plan's loss.

    Returns
    -------
    callable
        Maps logits ``(N, K, *S)`` and targets (see :class:`PreparedSite`) to
        ``(N,)`` losses. No image's value depends on another image, weights included.
    """
    weights = plan.training.class_weights
    weight = None if weights is None else torch.tensor(weights, device=device)
    name = plan.training.loss
    if name == "cross_entropy":
        return _CrossEntropy(weight, plan.training.label_smoothing)
    if name == "bce":
        return _BinaryCrossEntropy(weight)
    if name == "focal":
        return _Focal(weight)
    return _Segmentation(weight, focal=name == "dice_focal")


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
