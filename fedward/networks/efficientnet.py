"""EfficientNet-B0, and EfficientNet-Lite0 with the statistics of its public weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fedward.networks.spec import KeyMap, ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan

# EfficientNet-Lite (TensorFlow, 2020): B0 without squeeze-and-excite, ReLU6 for swish.
_LITE0_BLOCKS = (
    "r1_k3_s11_e1_i32_o16",
    "r2_k3_s22_e6_i16_o24",
    "r2_k5_s22_e6_i24_o40",
    "r3_k3_s22_e6_i40_o80",
    "r3_k5_s11_e6_i80_o112",
    "r4_k5_s22_e6_i112_o192",
    "r1_k3_s11_e6_i192_o320",
)


def _build_b0(plan: Plan) -> nn.Module:
    """Without drop-connect, padded for any image size."""
    from monai.networks.nets import EfficientNetBN

    from fedward.dp.compat import make_private
    from fedward.models.efficientnet_layers import padded_for_any_size

    model = EfficientNetBN(
        "efficientnet-b0",
        pretrained=False,
        spatial_dims=plan.task.dimensions,
        in_channels=plan.preprocessing.channels,
        num_classes=plan.task.outputs,
    )
    model._dropout.p = plan.model.dropout
    return make_private(padded_for_any_size(model))


def lite0(plan: Plan) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet's statistics frozen; 2D, 3 channels."""
    from monai.networks.nets import EfficientNet
    from torch import nn

    from fedward.dp.compat import make_private, replace
    from fedward.models.efficientnet_layers import (
        lite_input,
        lite_layer,
        padded_for_any_size,
    )

    model = EfficientNet(
        list(_LITE0_BLOCKS),
        num_classes=plan.task.outputs,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    replace(model, lite_layer)
    padded = make_private(padded_for_any_size(model))
    same_pad = padded.get_submodule("_conv_stem_padding")
    shifted = nn.Sequential(lite_input(plan.preprocessing.intensity), same_pad)
    padded.add_module("_conv_stem_padding", shifted)
    return padded


def _build_lite0(plan: Plan) -> nn.Module:
    """The whole network, or its beginning with a head that reads some blocks."""
    from fedward.models.efficientnet_layers import with_taps

    padded = lite0(plan)
    taps = plan.model.taps
    return padded if taps is None else with_taps(padded, taps, plan.task.outputs)


def public_keys(names: Iterable[str]) -> KeyMap:
    # The public files number the blocks through; MONAI keeps them in stages as well.
    found = (re.match(r"_blocks\.\d+\.(\d+)\.", name) for name in names)
    stages = {match[1]: match[0] for match in found if match}
    return lambda key: re.sub(r"^_blocks\.(\d+)\.(?=_)", lambda m: stages.get(m[1], m[0]), key)


EFFICIENTNET_B0 = ModelSpec(
    name="efficientnet-b0",
    summary="EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946)",
    tasks=("classification",),
    build=_build_b0,
    head="_fc.*",
    public_keys=public_keys,
)
EFFICIENTNET_LITE0 = ModelSpec(
    name="efficientnet-lite0",
    summary="EfficientNet-Lite0 (TensorFlow 2020) with the statistics of its weights frozen",
    tasks=("classification",),
    build=_build_lite0,
    head="_fc.*",
    dimensions=(2,),
    colours=(3,),
    dropout=False,
    taps=True,
    frozen_statistics=True,
    public_keys=public_keys,
)
