"""The U-Net of Falk et al."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedward.networks.spec import ModelSpec, Widths, halved

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan


def build(plan: Plan) -> nn.Module:
    """Five levels and the width of the last convolution."""
    from monai.networks.nets import BasicUNet

    from fedward.dp.compat import make_private

    model = BasicUNet(
        spatial_dims=plan.task.dimensions,
        in_channels=plan.preprocessing.channels,
        out_channels=plan.task.outputs,
        features=BASIC_UNET.channels(plan),
        norm="batch",
        dropout=plan.model.dropout,
    )
    return make_private(model)


BASIC_UNET = ModelSpec(
    name="basicunet",
    summary="U-Net (Falk et al. 2019, doi:10.1038/s41592-018-0261-2)",
    tasks=("segmentation",),
    build=build,
    head="final_conv.*",
    widths=Widths(
        "six widths: five levels and the last layer",
        default=(32, 32, 64, 128, 256, 32),
        least=(4, 4, 8, 8, 8, 4),
        fits=lambda widths: len(widths) == 6,
    ),
    sides=halved("four times", lambda channels: 4),
)
