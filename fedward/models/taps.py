"""A public backbone whose head reads the middle of the network as well.

ImageNet's last features are about dogs and lamps; textures further down say more about an X-ray,
and there are fewer of them, which private training rewards: noise grows with the root of what
trains. The pooled outputs of some blocks are normalised per image and joined.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from monai.networks.nets import EfficientNet
from monai.networks.nets.efficientnet import MBConvBlock
from torch import Tensor, nn
from torch.nn import functional

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
