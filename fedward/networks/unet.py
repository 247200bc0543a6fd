"""MONAI's residual U-Net."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedward.networks.spec import ModelSpec, Widths, halved

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan


def build(plan: Plan) -> nn.Module:
    """Two convolutions a level."""
    from monai.networks.nets import UNet

    from fedward.dp.compat import make_private

    channels = UNET.channels(plan)
    model = UNet(
        spatial_dims=plan.task.dimensions,
        in_channels=plan.preprocessing.channels,
        out_channels=plan.task.outputs,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        num_res_units=2,
        act="relu",
        norm="batch",
        dropout=plan.model.dropout,
    )
    return make_private(model)


UNET = ModelSpec(
    name="unet",
    summary="residual U-Net (Kerfoot et al. 2019, doi:10.1007/978-3-030-12029-0_40)",
    tasks=("segmentation",),
    build=build,
    head="model.2.*",
    widths=Widths("a width for each level", default=(16, 32, 64, 128), least=(4, 8, 8)),
    sides=halved("between levels", lambda channels: len(channels) - 1),
)
