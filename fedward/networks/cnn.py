"""A small CNN."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from fedward.networks.spec import ModelSpec, Widths

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan


def build(plan: Plan) -> nn.Module:
    """Two convolutions a level, halving between levels, mean, one linear layer."""
    from monai.networks.blocks import Convolution
    from monai.networks.layers.factories import Pool
    from torch import nn

    from fedward.dp.compat import make_private

    dims, width = plan.task.dimensions, int(plan.preprocessing.channels)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for level, channels in enumerate(CNN.channels(plan)):
        steps = (2 if level else 1, 1)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for number, stride in enumerate(steps):
            blocks[f"conv{number}"] = Convolution(
                dims, width, channels, strides=stride, act="relu", norm="batch", bias=False
            )
            width = channels
        layers[f"level{level}"] = nn.Sequential(blocks)
    layers["pool"] = Pool["adaptiveavg", dims](1)
    layers["flatten"] = nn.Flatten()
    layers["dropout"] = nn.Dropout(plan.model.dropout)
    layers["fc"] = nn.Linear(width, plan.task.outputs)
    return make_private(nn.Sequential(layers))


CNN = ModelSpec(
    name="cnn",
    summary="a small CNN, two convolutions a level",
    tasks=("classification",),
    build=build,
    head="fc.*",
    widths=Widths("a width for each level", default=(12, 24, 32), least=(4, 8)),
)
