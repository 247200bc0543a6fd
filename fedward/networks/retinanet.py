"""RetinaNet: a detector on a feature pyramid, from fresh weights or from public ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedward.networks.efficientnet import EFFICIENTNET_LITE0, lite0
from fedward.networks.spec import ModelSpec, Widths

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan


def _build_lite0(plan: Plan) -> nn.Module:
    """The same on EfficientNet-Lite0 with the statistics of its public weights."""
    from fedward.dp.compat import make_private
    from fedward.models.pyramid import LiteRetinaNet

    model = LiteRetinaNet(lite0(plan), plan.task.outputs, plan.preprocessing.size)
    return make_private(model)


def _build(plan: Plan) -> nn.Module:
    """A small residual network, a pyramid of four levels, and heads that all levels share."""
    from fedward.dp.compat import make_private
    from fedward.models.pyramid import RetinaNet

    model = RetinaNet(
        plan.task.dimensions,
        plan.preprocessing.channels,
        plan.task.outputs,
        plan.preprocessing.size,
        RETINANET.channels(plan),
    )
    return make_private(model)


RETINANET = ModelSpec(
    name="retinanet",
    summary="RetinaNet on a small residual network, one anchor at a place (Lin et al. 2017, "
    "arXiv:1708.02002; Zhang et al. 2020, arXiv:1912.02424)",
    tasks=("detection",),
    build=_build,
    head="detector.classes.*",
    dimensions=(2,),
    widths=Widths(
        "six widths, for strides 2 to 64",
        default=(16, 32, 64, 96, 128, 128),
        least=(4, 8, 8, 8, 8, 8),
        fits=lambda widths: len(widths) == 6,
    ),
    dropout=False,
    since=2,
)
RETINANET_LITE0 = replace(
    EFFICIENTNET_LITE0,
    name="retinanet-lite0",
    summary="the same on EfficientNet-Lite0 (TensorFlow 2020) with the statistics of its weights "
    "frozen",
    tasks=("detection",),
    build=_build_lite0,
    head="detector.*",
    taps=False,
    since=2,
)
