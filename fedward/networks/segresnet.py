"""SegResNet."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from fedward.networks.spec import ModelSpec, Widths, halved

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan

_BLOCKS = (1, 2, 2, 4)


def build(plan: Plan) -> nn.Module:
    """Its widths double from level to level."""
    from monai.networks.nets import SegResNet

    from fedward.dp.compat import make_private

    channels = SEGRESNET.channels(plan)
    blocks = (_BLOCKS + (_BLOCKS[-1],) * len(channels))[: len(channels)]
    model = SegResNet(
        spatial_dims=plan.task.dimensions,
        init_filters=channels[0],
        in_channels=plan.preprocessing.channels,
        out_channels=plan.task.outputs,
        dropout_prob=plan.model.dropout or None,
        norm="batch",
        blocks_down=blocks,
        blocks_up=(1,) * (len(channels) - 1),
    )
    return make_private(model)


SEGRESNET = ModelSpec(
    name="segresnet",
    summary="SegResNet (Myronenko 2018, arXiv:1810.11654)",
    tasks=("segmentation",),
    build=build,
    head="conv_final.2.*",
    widths=Widths(
        "widths that double from level to level",
        default=(8, 16, 32, 64),
        least=(4, 8, 16),
        fits=lambda widths: all(wide == 2 * narrow for narrow, wide in pairwise(widths)),
    ),
    sides=halved("between levels", lambda channels: len(channels) - 1),
)
