"""ResNet-18, -34 and -50."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fedward.networks.spec import ModelSpec, Widths

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan


def _build(plan: Plan, bottleneck: bool, layers: tuple[int, ...]) -> nn.Module:
    """With projected shortcuts; images under 64 pixels keep a fine stem."""
    from monai.networks.nets import ResNet

    from fedward.dp.compat import PlainBasicBlock, PlainBottleneck, make_private

    model = ResNet(
        block=PlainBottleneck if bottleneck else PlainBasicBlock,
        layers=list(layers),
        block_inplanes=list(plan.model.channels or _WIDTHS.default),
        spatial_dims=plan.task.dimensions,
        n_input_channels=plan.preprocessing.channels,
        conv1_t_stride=2 if min(plan.preprocessing.size) >= 64 else 1,
        num_classes=plan.task.outputs,
        bias_downsample=False,
    )
    return make_private(model)


_WIDTHS = Widths(
    "four widths, one for each level",
    default=(64, 128, 256, 512),
    least=(4, 4, 8, 8),
    fits=lambda widths: len(widths) == 4,
)


def _spec(depth: int, bottleneck: bool, layers: tuple[int, ...]) -> ModelSpec:
    return ModelSpec(
        name=f"resnet{depth}",
        summary=f"ResNet-{depth} (He et al. 2016, arXiv:1512.03385)",
        tasks=("classification",),
        build=partial(_build, bottleneck=bottleneck, layers=layers),
        head="fc.*",
        widths=_WIDTHS,
        dropout=False,
    )


RESNET18 = _spec(18, False, (2, 2, 2, 2))
RESNET34 = _spec(34, False, (3, 4, 6, 3))
RESNET50 = _spec(50, True, (3, 4, 6, 3))
