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
from fedward.tasks.detection import anchors

_PRIOR = 0.01  # of a class at a place, before any training
_SPREAD = 0.01
_LARGEST = 4.0  # log of how many times larger than its anchor a box may be


class RetinaNet(nn.Module):
    """One anchor at each place, as ATSS has it (Zhang et al. 2020, arXiv:1912.02424).

    Two small heads, for classes and for boxes, read every level of the pyramid: their layers are
    called once for each. So a patient's gradient of their weights is a sum over the calls, which
    book-keeping of single calls does not give (:func:`fedward.models.registry.best_mode`).

    Parameters
    ----------
    dimensions, channels, classes : int
        Of the images and of the task.
    size : sequence of int
        Of the input.
    widths : sequence of int
        Of the levels at strides 2, 4, 8, 16, 32 and 64; the third is the pyramid's too.
    """

    reuses_layers = True
    middles: Tensor
    sides: Tensor

    def __init__(
        self,
        dimensions: int,
        channels: int,
        classes: int,
        size: Sequence[int],
        widths: Sequence[int],
    ) -> None:
        super().__init__()
        conv, width = Conv[Conv.CONV, dimensions], widths[2]
        self.stem = nn.Sequential(
            conv(channels, widths[0], 3, stride=2, padding=1, bias=False),
            group_norm(widths[0]),
            nn.ReLU(),
        )
        self.levels = nn.ModuleList(
            _level(dimensions, before, after) for before, after in pairwise(widths)
        )
        self.pyramid = FeaturePyramidNetwork(dimensions, list(widths[2:]), width)
        self.classes = _head(dimensions, width, classes)
        self.corners = _head(dimensions, width, 2 * dimensions)
        nn.init.constant_(self.classes[-1].bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]
        start = torch.tensor(anchors(size).tolist(), dtype=torch.float32)
        middle = (start[:, dimensions:] + start[:, :dimensions]) / 2
        self.register_buffer("middles", middle, persistent=False)
        self.register_buffer(
            "sides", start[:, dimensions:] - start[:, :dimensions], persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *size)`` to ``(N, A, K + 2 D)``: logits, and corners in pixels of the input."""
        x, found = self.stem(x), OrderedDict[str, Tensor]()
        for number, level in enumerate(self.levels):
            x = level(x)
            if number:
                found[str(number)] = x
        maps = list(self.pyramid(found).values())
        logits = _places([self.classes(one) for one in maps])
        shift, growth = _places([self.corners(one) for one in maps]).chunk(2, dim=2)
        middle = self.middles + shift * self.sides
        half = self.sides * growth.clamp(max=_LARGEST).exp() / 2
        return torch.cat([logits, middle - half, middle + half], dim=2)


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
