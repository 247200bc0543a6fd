"""Segmentation networks from MONAI; input ``(N, C, *size)``, output ``(N, K, *size)`` logits."""

from __future__ import annotations

from itertools import pairwise

from monai.networks.nets import AttentionUnet, BasicUNet, SegResNet, UNet
from torch import nn

from fedward.dp.compat import make_private
from fedward.errors import PlanError
from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode

_UNET_CHANNELS = (16, 32, 64, 128)
_BASIC_CHANNELS = (32, 32, 64, 128, 256, 32)
_SEGRESNET_CHANNELS = (8, 16, 32, 64)
_SEGRESNET_BLOCKS = (1, 2, 2, 4)


def build_unet(plan: Plan) -> nn.Module:
    """MONAI's residual U-Net, two convolutions a level."""
    channels = plan.model.channels or _UNET_CHANNELS
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


def build_basicunet(plan: Plan) -> nn.Module:
    """The U-Net of Falk et al. 2019: five levels and the width of the last convolution."""
    channels = plan.model.channels or _BASIC_CHANNELS
    if len(channels) != len(_BASIC_CHANNELS):
        raise _wrong_channels(plan, "takes six widths: five levels and the last layer")
    model = BasicUNet(
        spatial_dims=plan.task.dimensions,
        in_channels=plan.preprocessing.channels,
        out_channels=plan.task.outputs,
        features=channels,
        norm="batch",
        dropout=plan.model.dropout,
    )
    return make_private(model)


def build_segresnet(plan: Plan) -> nn.Module:
    """SegResNet; its widths double from level to level."""
    channels = plan.model.channels or _SEGRESNET_CHANNELS
    if any(wide != 2 * narrow for narrow, wide in pairwise(channels)):
        raise _wrong_channels(plan, "doubles its width from level to level")
    blocks = (_SEGRESNET_BLOCKS + (_SEGRESNET_BLOCKS[-1],) * len(channels))[: len(channels)]
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


def build_attention_unet(plan: Plan) -> nn.Module:
    """The attention U-Net of Oktay et al. 2018."""
    channels = plan.model.channels or _UNET_CHANNELS
    model = AttentionUnet(
        spatial_dims=plan.task.dimensions,
        in_channels=plan.preprocessing.channels,
        out_channels=plan.task.outputs,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        dropout=plan.model.dropout,
    )
    return make_private(model)


def _wrong_channels(plan: Plan, rule: str) -> PlanError:
    return PlanError(
        f"{plan.model.name} {rule}",
        code=RuleCode.MODEL_CHANNELS,
        values={"model": plan.model.name},
        value=plan.model.channels,
        fix="Change the widths, or leave channels out",
        where="model.channels",
    )
