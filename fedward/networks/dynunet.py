"""The U-Net of nnU-Net, as MONAI's DynUNet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedward.networks.spec import ModelSpec, Widths, halved

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan


def build(plan: Plan) -> nn.Module:
    """Two convolutions a level with leaky ReLU; each level but the first begins with a stride."""
    from monai.networks.nets import DynUNet

    from fedward.dp.compat import make_private
    from fedward.models.supervised import SupervisedDynUNet

    channels = DYNUNET.channels(plan)
    halves = (2,) * (len(channels) - 1)
    supervised = plan.model.deep_supervision
    model = (SupervisedDynUNet if supervised else DynUNet)(
        spatial_dims=plan.task.dimensions,
        in_channels=plan.preprocessing.channels,
        out_channels=plan.task.outputs,
        kernel_size=(3,) * len(channels),
        strides=(1, *halves),
        upsample_kernel_size=halves,
        filters=channels,
        dropout=plan.model.dropout or None,
        deep_supervision=supervised,
        deep_supr_num=max(1, len(channels) - 3),
    )
    # MONAI registers each block here as well as in `skip_layers`, which alone are called: every
    # array would have two names, and would be sent twice.
    del model.input_block, model.downsamples, model.bottleneck, model.upsamples
    if supervised:
        del model.deep_supervision_heads
    return make_private(model)


DYNUNET = ModelSpec(
    name="dynunet",
    summary="U-Net of nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z)",
    tasks=("segmentation",),
    build=build,
    head="output_block.*",
    widths=Widths(
        "a width for each level, three at least",
        default=(32, 64, 128, 256, 320),
        least=(4, 8, 8),
        fits=lambda widths: len(widths) >= 3,
    ),
    sides=halved("between levels", lambda channels: len(channels) - 1),
    supervised=True,
    since=2,
)
