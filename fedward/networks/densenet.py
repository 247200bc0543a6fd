"""DenseNet-121."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fedward.networks.spec import KeyMap, ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan


def build(plan: Plan) -> nn.Module:
    """DenseNet-121."""
    from monai.networks.nets import DenseNet121

    from fedward.dp.compat import make_private

    model = DenseNet121(
        spatial_dims=plan.task.dimensions,
        in_channels=plan.preprocessing.channels,
        out_channels=plan.task.outputs,
        dropout_prob=plan.model.dropout,
    )
    return make_private(model)


def _torchvision_keys(names: Iterable[str]) -> KeyMap:
    def rename(key: str) -> str:
        key = re.sub(r"^(features\.denseblock\d+\.denselayer\d+)\.(?!layers\.)", r"\1.layers.", key)
        return re.sub(r"^classifier\.", "class_layers.out.", key)

    return rename


DENSENET121 = ModelSpec(
    name="densenet121",
    summary="DenseNet-121 (Huang et al. 2017, arXiv:1608.06993)",
    tasks=("classification",),
    build=build,
    head="class_layers.out.*",
    public_keys=_torchvision_keys,
)
