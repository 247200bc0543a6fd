"""MONAI's DynUNet with deep supervision, of which nothing of a batch stays behind."""

from __future__ import annotations

import torch
from monai.networks.nets import DynUNet
from monai.networks.nets.dynunet import DynUNetSkipLayer
from torch import Tensor


class SupervisedDynUNet(DynUNet):  # type: ignore[misc]
    """In training ``(N, 1 + levels, K, *S)``, the finest answer first; else that one alone.

    MONAI's network computes the levels' answers in evaluation as well, and keeps those of the last
    batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *S)`` to the answers."""
        layers = [one for one in self.modules() if isinstance(one, DynUNetSkipLayer)]
        for layer in layers:
            layer.heads = self.heads if self.training else None
        found: Tensor = super().forward(x)
        self.heads[:] = [torch.empty(0)] * len(self.heads)
        return found
