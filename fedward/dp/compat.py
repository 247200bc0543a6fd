"""Make MONAI networks compatible with per-sample gradients.

Differentially private training needs every sample's gradient on its own. Four habits of image
networks stand against that, and each has its replacement here:

========================================  =============================================
statistics over the batch (BatchNorm)     GroupNorm: statistics of the one sample
in-place activations and residual sums    out of place: the hooks still need the values
custom autograd (memory-efficient swish)  plain SiLU
activations with parameters (PReLU)       ReLU: one shared slope is all noise and no gain
========================================  =============================================
"""

from __future__ import annotations

from collections.abc import Callable

from monai.networks.blocks import MemoryEfficientSwish
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck
from torch import Tensor, nn

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_MOST_GROUPS, _LEAST_WIDTH = 32, 4


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm for any number of channels.

    At most 32 groups (Wu and He 2018, arXiv:1803.08494) and at least 4 channels in each, so that
    the last level still has something to normalise over when it is one pixel wide.
    """
    widest = max(1, min(_MOST_GROUPS, channels // _LEAST_WIDTH))
    groups = max(g for g in range(1, widest + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def make_private(model: nn.Module) -> nn.Module:
    """Replace, in place, whatever keeps `model` from per-sample gradients; returns `model`."""
    replace(model, _private_layer)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return model


def replace(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> None:
    """Put ``change(layer)`` in the place of every descendant of `model`, children first."""
    for name, child in model.named_children():
        replace(child, change)
        if (new := change(child)) is not child:
            setattr(model, name, new)


def _private_layer(layer: nn.Module) -> nn.Module:
    if isinstance(layer, _BATCH + _INSTANCE):
        return group_norm(layer.num_features)
    if isinstance(layer, MemoryEfficientSwish):
        return nn.SiLU()
    if isinstance(layer, nn.PReLU):
        return nn.ReLU()
    return PlainResBlock(layer) if isinstance(layer, ResBlock) else layer


class PlainResBlock(nn.Module):
    """MONAI's pre-activated residual block with its sum out of place.

    Parameters
    ----------
    block : ResBlock
        The block whose layers, and so parameter names, are taken over.
    """

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        self.norm1, self.norm2, self.act = block.norm1, block.norm2, block.act
        self.conv1, self.conv2 = block.conv1, block.conv2

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.conv1(self.act(self.norm1(x)))
        out: Tensor = x + self.conv2(self.act(self.norm2(inner)))
        return out


class PlainBasicBlock(ResNetBlock):  # type: ignore[misc]
    """The block of ResNet-18 and -34 with its sum out of place."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.bn1(self.conv1(x)))
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.act(shortcut + self.bn2(self.conv2(inner)))
        return out


class PlainBottleneck(ResNetBottleneck):  # type: ignore[misc]
    """The block of ResNet-50 with its sum out of place."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.bn1(self.conv1(x)))
        inner = self.act(self.bn2(self.conv2(inner)))
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.act(shortcut + self.bn3(self.conv3(inner)))
        return out
