"""The attention U-Net."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedward.networks.spec import ModelSpec, Widths, halved

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan


def build(plan: Plan) -> nn.Module:
    """A U-Net whose skips are weighted by attention gates."""
    from monai.networks.nets import AttentionUnet

    from fedward.dp.compat import make_private

    channels = ATTENTION_UNET.channels(plan)
    model = AttentionUnet(
        spatial_dims=plan.task.dimensions,
        in_channels=plan.preprocessing.channels,
        out_channels=plan.task.outputs,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        dropout=plan.model.dropout,
    )
    return make_private(model)


ATTENTION_UNET = ModelSpec(
    name="attention-unet",
    summary="attention U-Net (Oktay et al. 2018, arXiv:1804.03999)",
    tasks=("segmentation",),
    build=build,
    head="model.2.*",
    widths=Widths("a width for each level", default=(16, 32, 64, 128), least=(4, 8, 8)),
    sides=halved("between levels", lambda channels: len(channels) - 1),
)
