"""Swin UNETR: attention within shifted windows as the encoder of a U-Net."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedward.networks.spec import ModelSpec, Widths, halved

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan

_LEVELS = 5


def build(plan: Plan) -> nn.Module:
    """MONAI's SwinUNETR with windows of 7."""
    import torch
    from monai.networks.nets import SwinUNETR

    from fedward.dp.compat import make_private

    # MONAI reads numbers out of a tensor while it builds; on the meta device there are none.
    with torch.device("cpu"):
        model = SwinUNETR(
            in_channels=plan.preprocessing.channels,
            out_channels=plan.task.outputs,
            feature_size=SWIN_UNETR.channels(plan)[0],
            norm_name="instance",
            drop_rate=plan.model.dropout,
            attn_drop_rate=plan.model.dropout,
            spatial_dims=plan.task.dimensions,
        )
        model = make_private(model)
    return model.to(torch.get_default_device())


SWIN_UNETR = ModelSpec(
    name="swin-unetr",
    summary="Swin UNETR (Hatamizadeh et al. 2022, arXiv:2201.01266)",
    tasks=("segmentation",),
    build=build,
    head="out.*",
    widths=Widths(
        "five widths that double from level to level, the first a multiple of 12",
        default=(24, 48, 96, 192, 384),
        least=(12, 24, 48, 96, 192),
        fits=lambda widths: (
            widths == tuple(widths[0] * 2**n for n in range(_LEVELS)) and widths[0] % 12 == 0
        ),
    ),
    sides=halved("five times", lambda channels: _LEVELS),
)
