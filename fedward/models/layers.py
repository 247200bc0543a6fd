"""Layers that the public networks need and PyTorch has not: frozen statistics and TF padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed, public statistics: no parameters, no batch dependence.

    Every sample is scaled and shifted by constants, so nothing of one patient reaches another
    one's output and Opacus has nothing to sample here.

    Parameters
    ----------
    channels : int
        Channels C of the input ``(N, C, H, W)``.
    eps : float
        Added to the variance, as in the training of the weights.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1))

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class ChannelAffine(nn.Module):
    """``scale * x + shift``, constants per channel; brings an input to the range of the weights.

    Parameters
    ----------
    scale, shift : sequence of float
        One entry per channel of ``(N, C, *size)``. Part of the architecture: never exchanged.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Sequence[float], shift: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.ndim - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


class SamePad(nn.Module):
    """Zero padding that makes a strided convolution give ``ceil(side / stride)`` at any size.

    TensorFlow's rule: an odd rest goes to the end of the axis. The layer works it out from its
    input, so that one network takes images of any size.

    Parameters
    ----------
    kernel_size, stride, dilation : tuple of int
        Those of the convolution that follows, one entry per spatial axis.
    """

    def __init__(
        self, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.reach = tuple(d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        pad: list[int] = []
        for side, reach, stride in zip(x.shape[2:], self.reach, self.stride, strict=True):
            total = max((-(-side // stride) - 1) * stride + reach + 1 - side, 0)
            pad = [total // 2, total - total // 2, *pad]  # F.pad counts axes from the last one
        return functional.pad(x, pad) if any(pad) else x

    def extra_repr(self) -> str:
        return f"reach={self.reach}, stride={self.stride}"
