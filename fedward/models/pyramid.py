"""A detector on a feature pyramid: RetinaNet (Lin et al. 2017, arXiv:1708.02002)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.blocks.feature_pyramid_network import FeaturePyramidNetwork
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from fedward.dp.compat import PlainBasicBlock, group_norm
from fedward.tasks.detection import STRIDES, anchors

_PRIOR = 0.01  # of a class at a place, before any training
_SPREAD = 0.01
_STAGES = (2, 4, 6)  # of EfficientNet-B0 and -Lite0, that end at strides 8, 16 and 32
_WIDTH = 64  # of the pyramid on them
_LARGEST = 4.0  # log of how many times larger than its anchor a box may be


class Detector(nn.Module):
    """A feature pyramid with one anchor at each place, as ATSS has it (arXiv:1912.02424).

    Two small heads, for classes and for boxes, read every level of the pyramid: their layers are
    called once for each. So a patient's gradient of their weights is a sum over the calls, which
    book-keeping of single calls does not give (:func:`fedward.models.registry.best_mode`).

    Parameters
    ----------
    dimensions, classes : int
        Of the task.
    size : sequence of int
        Of the network's input.
    widths : sequence of int
        Channels of the maps at strides 8, 16, 32 and 64; without the last one it makes that itself.
    width : int
        Of the pyramid.
    """

    reuses_layers = True
    middles: Tensor
    sides: Tensor

    def __init__(
        self,
        dimensions: int,
        classes: int,
        size: Sequence[int],
        widths: Sequence[int],
        width: int,
    ) -> None:
        super().__init__()
        if len(widths) < len(STRIDES):
            conv = Conv[Conv.CONV, dimensions]
            self.coarsest = conv(widths[-1], width, 3, stride=2, padding=1)
            widths = (*widths, width)
        self.pyramid = FeaturePyramidNetwork(dimensions, list(widths), width)
        self.classes = _head(dimensions, width, classes)
        self.corners = _head(dimensions, width, 2 * dimensions)
        nn.init.constant_(self.classes[-1].bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]
        start = torch.tensor(anchors(size).tolist(), dtype=torch.float32)
        low, high = start.chunk(2, dim=1)
        self.register_buffer("middles", (low + high) / 2, persistent=False)
        self.register_buffer("sides", high - low, persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps ``(N, C, *S)`` to ``(N, A, K + 2 D)``: logits, and corners in the input's pixels."""
        if hasattr(self, "coarsest"):
            maps = [*maps, self.coarsest(maps[-1])]
        levels = self.pyramid(OrderedDict((str(k), one) for k, one in enumerate(maps))).values()
        logits = _places([self.classes(one) for one in levels])
        shift, growth = _places([self.corners(one) for one in levels]).chunk(2, dim=2)
        middle = self.middles + shift * self.sides
        half = self.sides * growth.clamp(max=_LARGEST).exp() / 2
        return torch.cat([logits, middle - half, middle + half], dim=2)


class RetinaNet(nn.Module):
    """A small residual network and a detector.

    Parameters
    ----------
    dimensions, channels, classes : int
        Of the images and of the task.
    size : sequence of int
        Of the input.
    widths : sequence of int
        Of the levels at strides 2, 4, 8, 16, 32 and 64; the third is the pyramid's too.
    """

    def __init__(
        self,
        dimensions: int,
        channels: int,
        classes: int,
        size: Sequence[int],
        widths: Sequence[int],
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, dimensions]
        self.stem = nn.Sequential(
            conv(channels, widths[0], 3, stride=2, padding=1, bias=False),
            group_norm(widths[0]),
            nn.ReLU(),
        )
        self.levels = nn.ModuleList(
            _level(dimensions, before, after) for before, after in pairwise(widths)
        )
        self.detector = Detector(dimensions, classes, size, widths[2:], widths[2])

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *size)`` to what the detector gives."""
        x, maps = self.stem(x), []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        found: Tensor = self.detector(maps[1:])
        return found


class LiteRetinaNet(nn.Module):
    """A detector on an EfficientNet, whose blocks keep their names.

    Parameters
    ----------
    backbone : nn.Module
        An EfficientNet of MONAI; its blocks are used, not copied.
    classes : int
        Of the task.
    size : sequence of int
        Of the input.
    """

    def __init__(self, backbone: nn.Module, classes: int, size: Sequence[int]) -> None:
        super().__init__()
        for name in ("_conv_stem_padding", "_conv_stem", "_bn0", "_swish", "_blocks"):
            self.add_module(name, backbone.get_submodule(name))
        stages = list(self.get_submodule("_blocks").children())
        widths = [stages[k][-1]._project_conv.out_channels for k in _STAGES]  # type: ignore[index]
        self.detector = Detector(2, classes, size, widths, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, *size)`` to what the detector gives."""
        for name in ("_conv_stem_padding", "_conv_stem", "_bn0", "_swish"):
            x = self.get_submodule(name)(x)
        maps = []
        for number, stage in enumerate(self.get_submodule("_blocks").children()):
            x = stage(x)
            if number in _STAGES:
                maps.append(x)
        found: Tensor = self.detector(maps)
        return found


def _level(dimensions: int, before: int, after: int) -> nn.Sequential:
    """Two residual blocks, the first of which halves the map."""
    conv = Conv[Conv.CONV, dimensions]
    shortcut = nn.Sequential(conv(before, after, 1, stride=2, bias=False), group_norm(after))
    blocks = [
        PlainBasicBlock(before, after, dimensions, stride=2, downsample=shortcut),
        PlainBasicBlock(after, after, dimensions),
    ]
    return nn.Sequential(*blocks)


def _head(dimensions: int, width: int, outputs: int) -> nn.Sequential:
    conv = Conv[Conv.CONV, dimensions]
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [conv(width, width, 3, padding=1, bias=False), group_norm(width), nn.ReLU()]
    layers.append(conv(width, outputs, 3, padding=1))
    nn.init.normal_(layers[-1].weight, std=_SPREAD)  # type: ignore[arg-type]
    nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def _places(maps: Sequence[Tensor]) -> Tensor:
    """``(N, C, *S)`` of each level to ``(N, places of all, C)``."""
    return torch.cat([one.flatten(2) for one in maps], dim=2).transpose(1, 2)
