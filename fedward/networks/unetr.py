"""UNETR: a transformer as the encoder of a U-Net."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedward.networks.spec import ModelSpec, Sides, Widths

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan

_PATCH, _HEAD_WIDTH = 16, 64


def build(plan: Plan) -> nn.Module:
    """MONAI's UNETR: 12 blocks on patches of 16."""
    from fedward.dp.compat import PlainUnetr, make_private

    features, hidden, mlp = UNETR.channels(plan)
    model = PlainUnetr(
        in_channels=plan.preprocessing.channels,
        out_channels=plan.task.outputs,
        img_size=plan.preprocessing.size,
        feature_size=features,
        hidden_size=hidden,
        mlp_dim=mlp,
        num_heads=max(1, hidden // _HEAD_WIDTH),
        norm_name="instance",
        dropout_rate=plan.model.dropout,
        spatial_dims=plan.task.dimensions,
    )
    return make_private(model)


UNETR = ModelSpec(
    name="unetr",
    summary="UNETR (Hatamizadeh et al. 2022, arXiv:2103.10504), by default with a narrow "
    "transformer; the paper's is `channels = [16, 768, 3072]`",
    tasks=("segmentation",),
    build=build,
    head="out.*",
    widths=Widths(
        "three widths: of the finest level, of the tokens (below 64, or a multiple of 64, a head "
        "for each 64) and of the MLP",
        default=(16, 192, 768),
        least=(4, 8, 16),
        fits=lambda widths: len(widths) == 3 and (widths[1] < 64 or widths[1] % 64 == 0),
    ),
    sides=Sides("16", lambda size, channels: (f"cuts the image into patches of {_PATCH}", _PATCH)),
)
