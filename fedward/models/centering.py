"""Features without what all images share: the mean is subtracted before the head reads them.

Pooled features of a frozen network share one long vector. It says nothing of an image, but private
steps spend their clipping norm and their noise on it. Centring and bringing to one length is the
transform CL2N of Wang et al. (2019, "SimpleShot", arXiv:1911.04623).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from fedward.errors import PlanError
from fedward.models.prefix import Chain, steps_of
from fedward.plan.schema import FEATURE_MEAN
from fedward.rule_codes import RuleCode

FEATURE_LENGTH: Final = 4.0
"""Length of every feature vector, before the mean is subtracted and after."""
_SHORTEST: Final = 1e-6


class FeatureCentering(nn.Module):
    """Features ``(N, d)`` of one length around a mean, which is no parameter.

    Parameters
    ----------
    width : int
        Features d.
    """

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return of_one_length(of_one_length(x) - self.mean)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{self.mean.numel()}"


def of_one_length(features: Tensor) -> Tensor:
    """Each row with the norm :data:`FEATURE_LENGTH`; zeros stay zeros."""
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    scaled: Tensor = features * (FEATURE_LENGTH / norms.clamp(min=_SHORTEST))
    return scaled


def with_centering(model: nn.Module) -> Chain:
    """The same network, whose last layer reads centred features.

    Parameters
    ----------
    model : nn.Module
        A chain of blocks that ends in a linear layer; its blocks are used, not copied, under the
        names that they have.

    Raises
    ------
    PlanError
        It is no such chain.
    """
    steps = steps_of(model)
    head = _linear(steps[-1][1]) if steps else None
    if head is None:
        raise PlanError(
            RuleCode.FEATURE_CENTERING,
            fix="Choose another model, or leave feature_centering out",
            where="model.feature_centering",
        )
    name, _, _ = FEATURE_MEAN.partition(".")
    return Chain([*steps[:-1], (name, FeatureCentering(head.in_features)), steps[-1]])


def _linear(module: nn.Module) -> nn.Linear | None:
    return next((m for m in module.modules() if isinstance(m, nn.Linear)), None)
