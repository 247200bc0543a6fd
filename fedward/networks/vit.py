"""The vision transformer."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from fedward.networks.spec import ModelSpec, Sides, Sizes, Widths

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan

_LAYERS, _HEAD_WIDTH = 12, 64


def build(plan: Plan) -> nn.Module:
    """MONAI's ViT with a class token, as a chain of its blocks."""
    from monai.networks.nets import ViT
    from torch import nn

    from fedward.dp.compat import ClassToken, FirstToken, make_private

    hidden, mlp = VIT.channels(plan)
    vit = ViT(
        in_channels=plan.preprocessing.channels,
        img_size=plan.preprocessing.size,
        patch_size=_patch(plan.preprocessing.size),
        hidden_size=hidden,
        mlp_dim=mlp,
        num_layers=_LAYERS,
        num_heads=max(1, hidden // _HEAD_WIDTH),
        classification=True,
        num_classes=plan.task.outputs,
        dropout_rate=plan.model.dropout,
        spatial_dims=plan.task.dimensions,
        post_activation="none",
    )
    chain = OrderedDict(
        patch_embedding=vit.patch_embedding,
        cls_token=ClassToken(vit.cls_token),
        blocks=nn.Sequential(*vit.blocks),
        norm=vit.norm,
        first=FirstToken(),
        classification_head=vit.classification_head,
    )
    return make_private(nn.Sequential(chain))


def _patch(size: Sizes) -> int:
    return 16 if min(size) >= 64 else 8


def _patches(size: Sizes, channels: Sizes) -> tuple[str, int]:
    return f"cuts the image into patches of {_patch(size)}", _patch(size)


VIT = ModelSpec(
    name="vit",
    summary="vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), 12 blocks, by default "
    "as narrow as DeiT-Ti (Touvron et al. 2021, arXiv:2012.12877)",
    tasks=("classification",),
    build=build,
    head="classification_head.*",
    feature_map=False,
    widths=Widths(
        "two widths: of the tokens (below 64, or a multiple of 64, a head for each 64) and of the "
        "MLP",
        default=(192, 768),
        least=(8, 16),
        fits=lambda widths: len(widths) == 2 and (widths[0] < 64 or widths[0] % 64 == 0),
    ),
    sides=Sides("16; 8 where the shortest is below 64", _patches),
)
