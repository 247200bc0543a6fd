"""Layers of the EfficientNets that MONAI and PyTorch have not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from monai.networks.blocks import MemoryEfficientSwish
from monai.networks.nets import EfficientNet
from monai.networks.nets.efficientnet import MBConvBlock
from torch import Tensor, nn
from torch.nn import functional

# Layers that the public networks need and PyTorch has not: frozen statistics and TF padding.


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


# A public backbone whose head reads the middle of the network as well.
#
# ImageNet's last features are about dogs and lamps; textures further down say more about an X-ray,
# and there are fewer of them, which private training rewards: noise grows with the root of what
# trains. The pooled outputs of some blocks are normalised per image and joined.

FEATURE_LENGTH = 4.0


class CarryingBlock(MBConvBlock):  # type: ignore[misc]
    """A block that works on its own channels and carries the rest, constant over space, along.

    So a network with several taps stays one chain of modules with one tensor between them, which
    is what lets its frozen beginning be cached.
    """

    width: int
    tap: bool

    @classmethod
    def around(cls, block: MBConvBlock, width: int, *, tap: bool) -> CarryingBlock:
        """The same block, under the same parameter names, reading ``width`` channels."""
        new = cls.__new__(cls)
        new.__dict__.update(block.__dict__)
        new.width, new.tap = width, tap
        return new

    def forward(self, inputs: Tensor) -> Tensor:
        """``(N, width + carried, H, W)`` to ``(N, own + new + carried, H', W')``."""
        own: Tensor = super().forward(inputs[:, : self.width])
        parts = [own]
        if self.tap:
            parts.append(own.mean(dim=(2, 3), keepdim=True).expand_as(own))
        if inputs.shape[1] > self.width:
            parts.append(inputs[:, self.width :, : own.shape[2], : own.shape[3]])
        return torch.cat(parts, dim=1) if len(parts) > 1 else own


class PooledTaps(nn.Module):
    """Mean over space, each tap normalised over its channels, all together of a fixed length.

    The length bounds the gradient that one image can give a linear head, so that clipping touches
    few.

    Parameters
    ----------
    widths : sequence of int
        Channels of each tap, in the order of the channels.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, sum(widths), H, W)`` to ``(N, sum(widths))``."""
        parts = torch.split(x.mean(dim=(2, 3)), list(self.widths), dim=1)
        joined = torch.cat([functional.layer_norm(p, p.shape[1:]) for p in parts], dim=1)
        scaled: Tensor = joined * (FEATURE_LENGTH / sum(self.widths) ** 0.5)
        return scaled

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"widths={self.widths}"


def with_taps(model: EfficientNet, taps: Sequence[int], outputs: int) -> nn.Sequential:
    """Cut an EfficientNet after its last tap and give it a linear head on all taps.

    Parameters
    ----------
    model : EfficientNet
        Its blocks are used, not copied.
    taps : sequence of int
        Blocks, counted from 0 through all stages, ascending.
    outputs : int
        Outputs of the head. It starts at zero: every class is as likely as the other.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    width, widths = model._conv_stem.out_channels, []
    for stage, blocks in model._blocks.named_children():
        kept: OrderedDict[str, nn.Module] = OrderedDict()
        for number, block in blocks.named_children():
            if int(number) > taps[-1]:
                break
            tapped = int(number) in taps
            kept[number] = CarryingBlock.around(
                block, width, tap=tapped and int(number) != taps[-1]
            )
            width = block._project_conv.out_channels
            widths += [width] if tapped else []
        if kept:
            stages[stage] = nn.Sequential(kept)
    head = nn.Linear(sum(widths), outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(
        OrderedDict(
            _conv_stem_padding=model._conv_stem_padding,
            _conv_stem=model._conv_stem,
            _bn0=model._bn0,
            _swish=model._swish,
            _blocks=nn.Sequential(stages),
            _taps=PooledTaps(widths[::-1]),
            _fc=head,
        )
    )


_IMAGENET_MEAN, _IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def lite_input(intensity: str) -> ChannelAffine:
    """From the plan's ``preprocessing.intensity`` to the range that Lite0's weights saw."""
    # The weights saw (pixel - 127) / 128. With that, real photographs meet the frozen statistics:
    # mean deviation of the layers' inputs 0.19 running deviations, against 0.33 without.
    if intensity == "unit":
        return ChannelAffine([255 / 128] * 3, [-127 / 128] * 3)
    scale = [deviation * 255 / 128 for deviation in _IMAGENET_DEVIATION]
    shift = [(mean * 255 - 127) / 128 for mean in _IMAGENET_MEAN]
    return ChannelAffine(scale, shift)


def lite_layer(layer: nn.Module) -> nn.Module:
    """Lite0's counterpart of one of B0's layers."""
    if isinstance(layer, nn.BatchNorm2d):
        return FrozenBatchNorm2d(layer.num_features, layer.eps)
    return nn.ReLU6() if isinstance(layer, MemoryEfficientSwish) else layer


def padded_for_any_size(model: nn.Module) -> nn.Module:
    """Replace, in place, MONAI's padding by :class:`SamePad`; returns `model`."""
    # MONAI works its padding out for one square size. Drop-connect goes: it is random per sample.
    for module in list(model.modules()):
        for name, _ in list(module.named_children()):
            if name.endswith("_padding"):
                conv = module.get_submodule(name.removesuffix("_padding"))
                setattr(module, name, _same_pad(conv))
        if hasattr(module, "drop_connect_rate"):
            module.drop_connect_rate = 0.0  # type: ignore[assignment]
    return model


def _same_pad(conv: nn.Module) -> nn.Module:
    if not isinstance(conv, (nn.Conv2d, nn.Conv3d)) or max(conv.kernel_size) == 1:
        return nn.Identity()
    return SamePad(conv.kernel_size, conv.stride, conv.dilation)
