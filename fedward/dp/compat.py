"""Make MONAI networks compatible with per-sample gradients.

Differentially private training needs every sample's gradient on its own. Six habits of image
networks stand against that, and each has its replacement here:

========================================  =============================================
statistics over the batch (BatchNorm)     GroupNorm: statistics of the one sample
in-place activations and residual sums    out of place: the hooks still need the values
custom autograd (memory-efficient swish)  plain SiLU
activations with parameters (PReLU)       ReLU: one shared slope is all noise and no gain
parameters beside layers (transformers)   in layers of their own, one tensor in and one out
windows of all images as rows (Swin)      a row for each image, its windows within
========================================  =============================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from monai.networks.blocks import MemoryEfficientSwish, PatchEmbeddingBlock, TransformerBlock
from monai.networks.blocks.dynunet_block import UnetResBlock
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck
from monai.networks.nets.swin_unetr import (
    SwinTransformerBlock,
    WindowAttention,
    get_window_size,
    window_partition,
    window_reverse,
)
from monai.networks.nets.unetr import UNETR
from torch import Tensor, nn
from torch.nn import functional

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
    if isinstance(layer, TransformerBlock) and not layer.with_cross_attention:
        layer.norm_cross_attn = nn.Identity()  # MONAI never calls it, so it has no gradient
    for kind, plain in _PLAIN.items():
        if isinstance(layer, kind):
            return plain(layer)
    return layer


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


# MONAI's transformers. Opacus needs every parameter in a layer that is called with one tensor whose
# rows are images: a bare parameter beside layers, or windows of several images as the rows, would
# give it gradients of something else. Batches are counted by x.shape[0]: len(x) would become a
# constant of an exported network.


class PlainUnetResBlock(nn.Module):
    """The residual block of UNETR and SwinUNETR with its sum out of place.

    Parameters
    ----------
    block : UnetResBlock
        The block whose layers, and so parameter names, are taken over.
    """

    def __init__(self, block: UnetResBlock) -> None:
        super().__init__()
        self.conv1, self.norm1, self.lrelu = block.conv1, block.norm1, block.lrelu
        self.conv2, self.norm2 = block.conv2, block.norm2
        if block.downsample:
            self.conv3, self.norm3 = block.conv3, block.norm3

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *size)`` to ``(N, C', *size)``."""
        # A Swin transformer's features come with their channels last in memory, where Opacus'
        # unfolding gives wrong gradients without an error and functorch in float64 refuses.
        x = x.clone(memory_format=torch.contiguous_format)
        inner: Tensor = self.norm2(self.conv2(self.lrelu(self.norm1(self.conv1(x)))))
        shortcut = self.norm3(self.conv3(x)) if hasattr(self, "conv3") else x
        out: Tensor = self.lrelu(inner + shortcut)
        return out


class PlainUnetr(UNETR):  # type: ignore[misc]
    """UNETR whose maps have their channels first in memory, also where they are one pixel wide."""

    def proj_feat(self, x: Tensor) -> Tensor:
        """``(N, T, C)`` to ``(N, C, *patches)``."""
        maps: Tensor = super().proj_feat(x).clone(memory_format=torch.contiguous_format)
        return maps


class AddedWeight(nn.Module):
    """Adds a trained tensor to each image's: position embeddings.

    Parameters
    ----------
    weight : nn.Parameter
        ``(1, ...)``.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """``(N, ...)`` to the same."""
        return x + self.weight


class ClassToken(nn.Module):
    """Puts a trained token before each image's tokens.

    Parameters
    ----------
    weight : nn.Parameter
        ``(1, 1, C)``.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, C)`` to ``(N, 1 + T, C)``."""
        return torch.cat((self.weight.expand(x.shape[0], -1, -1), x), dim=1)


class FirstToken(nn.Module):
    """The first of each image's tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, C)`` to ``(N, C)``."""
        return x[:, 0]


class PlainPatchEmbedding(nn.Module):
    """MONAI's patches by a convolution, the position embeddings in a layer of their own.

    Parameters
    ----------
    block : PatchEmbeddingBlock
        The block whose layers are taken over.
    """

    def __init__(self, block: PatchEmbeddingBlock) -> None:
        super().__init__()
        self.patch_embeddings, self.dropout = block.patch_embeddings, block.dropout
        self.position_embeddings = AddedWeight(block.position_embeddings)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *size)`` to ``(N, T, C')``."""
        tokens: Tensor = self.patch_embeddings(x).flatten(2).transpose(1, 2)
        out: Tensor = self.dropout(self.position_embeddings(tokens))
        return out


class PositionBias(nn.Module):
    """Adds a trained number for each distance of two tokens in a window.

    Parameters
    ----------
    weight : nn.Parameter
        ``(distances, heads)``.
    index : Tensor
        ``(n, n)`` row of ``weight`` for two tokens of a whole window. No buffer: it follows from
        the architecture, and Opacus takes no layer with both buffers and parameters.
    """

    def __init__(self, weight: nn.Parameter, index: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """``(N, W, heads, n, n)`` to the same, W windows of n tokens."""
        n = x.shape[-1]
        bias = self.weight[self.index[:n, :n].reshape(-1)].view(n, n, -1)
        return x + bias.permute(2, 0, 1)


class PlainWindowAttention(nn.Module):
    """Attention within windows, all windows of an image in one row.

    Parameters
    ----------
    attention : WindowAttention
        The block whose layers are taken over.
    """

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.attn_drop = attention.qkv, attention.attn_drop
        self.proj, self.proj_drop = attention.proj, attention.proj_drop
        self.relative_position_bias_table = PositionBias(
            attention.relative_position_bias_table, attention.relative_position_index
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``(N, W, n, C)`` to the same; mask ``(W, n, n)`` added to the logits."""
        count, windows, n, width = x.shape
        parts = self.qkv(x).view(count, windows, n, 3, self.num_heads, width // self.num_heads)
        query, key, value = parts.permute(3, 0, 1, 4, 2, 5).unbind(0)
        logits = self.relative_position_bias_table(query * self.scale @ key.transpose(-2, -1))
        if mask is not None:
            logits = logits + mask.unsqueeze(1)
        seen = self.attn_drop(logits.softmax(-1)) @ value
        out: Tensor = self.proj_drop(self.proj(seen.transpose(2, 3).reshape(x.shape)))
        return out


class PlainSwinBlock(nn.Module):
    """MONAI's Swin block, in 2D and 3D; its tensors keep an image's windows together.

    Parameters
    ----------
    block : SwinTransformerBlock
        The block whose layers are taken over.
    """

    def __init__(self, block: SwinTransformerBlock) -> None:
        super().__init__()
        self.window_size, self.shift_size = block.window_size, block.shift_size
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = PlainWindowAttention(block.attn)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``(N, *size, C)`` to the same; MONAI makes the mask of the shifted windows."""
        x = x + self._attend(self.norm1(x), mask)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        size, axes = x.shape[1:-1], tuple(range(1, x.ndim - 1))
        window, shift = get_window_size(size, self.window_size, self.shift_size)
        # F.pad counts axes from the last one, which are the channels here.
        ends = [-side % step for side, step in zip(size, window, strict=True)]
        padded = functional.pad(x, [0, 0, *(n for end in reversed(ends) for n in (0, end))])
        if any(shift):
            padded = padded.roll([-step for step in shift], axes)
        parts = window_partition(padded, window)
        parts = parts.view(x.shape[0], -1, *parts.shape[1:])
        seen = self.attn(parts, mask if any(shift) else None)
        whole = window_reverse(seen.reshape(-1, *window, x.shape[-1]), window, padded.shape[:-1])
        if any(shift):
            whole = whole.roll(shift, axes)
        out: Tensor = whole[(slice(None), *(slice(side) for side in size))]
        return out


_PLAIN: Mapping[type[nn.Module], Callable[[nn.Module], nn.Module]] = {
    ResBlock: PlainResBlock,
    UnetResBlock: PlainUnetResBlock,
    PatchEmbeddingBlock: PlainPatchEmbedding,
    SwinTransformerBlock: PlainSwinBlock,
}
