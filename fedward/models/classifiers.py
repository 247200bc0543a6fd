"""Classification networks, built from MONAI's parts; input ``(N, C, *size)``, output ``(N, K)``."""

from __future__ import annotations

from collections import OrderedDict

from monai.networks.blocks import Convolution, MemoryEfficientSwish
from monai.networks.layers.factories import Pool
from monai.networks.nets import DenseNet121, EfficientNet, EfficientNetBN, ResNet
from torch import nn

from fedward.errors import PlanError
from fedward.models.dp_ready import (
    PlainBasicBlock,
    PlainBottleneck,
    make_private,
    replace,
)
from fedward.models.layers import ChannelAffine, FrozenBatchNorm2d, SamePad
from fedward.models.taps import with_taps
from fedward.plan.schema import Plan

_CNN_CHANNELS = (12, 24, 32)
_RESNET_CHANNELS = (64, 128, 256, 512)
_RESNETS = {
    "resnet18": (PlainBasicBlock, (2, 2, 2, 2)),
    "resnet34": (PlainBasicBlock, (3, 4, 6, 3)),
    "resnet50": (PlainBottleneck, (3, 4, 6, 3)),
}
# EfficientNet-Lite (TensorFlow, 2020): B0 without squeeze-and-excite, ReLU6 for swish.
_IMAGENET_MEAN, _IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LITE0_BLOCKS = (
    "r1_k3_s11_e1_i32_o16",
    "r2_k3_s22_e6_i16_o24",
    "r2_k5_s22_e6_i24_o40",
    "r3_k3_s22_e6_i40_o80",
    "r3_k5_s11_e6_i80_o112",
    "r4_k5_s22_e6_i112_o192",
    "r1_k3_s11_e6_i192_o320",
)


def build_cnn(plan: Plan) -> nn.Module:
    """A small CNN: two convolutions a level, halving between levels, mean, one linear layer."""
    dims, width = plan.task.dimensions, int(plan.preprocessing.channels)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for level, channels in enumerate(plan.model.channels or _CNN_CHANNELS):
        layers[f"level{level}"] = _cnn_level(dims, width, channels, stride=2 if level else 1)
        width = channels
    layers["pool"] = Pool["adaptiveavg", dims](1)
    layers["flatten"] = nn.Flatten()
    layers["dropout"] = nn.Dropout(plan.model.dropout)
    layers["fc"] = nn.Linear(width, plan.task.outputs)
    return make_private(nn.Sequential(layers))


def _cnn_level(dims: int, inputs: int, channels: int, stride: int) -> nn.Sequential:
    def conv(width: int, step: int) -> Convolution:
        return Convolution(
            dims, width, channels, strides=step, act="relu", norm="batch", bias=False
        )

    return nn.Sequential(OrderedDict(conv0=conv(inputs, stride), conv1=conv(channels, 1)))


def build_resnet(plan: Plan) -> nn.Module:
    """ResNet-18, -34 or -50 with projected shortcuts; images under 64 pixels keep a fine stem."""
    block, layers = _RESNETS[plan.model.name]
    planes = plan.model.channels or _RESNET_CHANNELS
    if len(planes) != len(_RESNET_CHANNELS):
        raise PlanError(
            f"{plan.model.name} has four levels",
            value=planes,
            fix="Give four widths, or leave channels out",
            where="model.channels",
        )
    _refuse_dropout(plan)
    model = ResNet(
        block=block,
        layers=list(layers),
        block_inplanes=list(planes),
        spatial_dims=plan.task.dimensions,
        n_input_channels=plan.preprocessing.channels,
        conv1_t_stride=2 if min(plan.preprocessing.size) >= 64 else 1,
        num_classes=plan.task.outputs,
        bias_downsample=False,
    )
    return make_private(model)


def build_densenet(plan: Plan) -> nn.Module:
    """DenseNet-121."""
    _refuse_channels(plan)
    model = DenseNet121(
        spatial_dims=plan.task.dimensions,
        in_channels=plan.preprocessing.channels,
        out_channels=plan.task.outputs,
        dropout_prob=plan.model.dropout,
    )
    return make_private(model)


def build_efficientnet(plan: Plan) -> nn.Module:
    """EfficientNet-B0, without drop-connect, padded for any image size."""
    _refuse_channels(plan)
    model = EfficientNetBN(
        "efficientnet-b0",
        pretrained=False,
        spatial_dims=plan.task.dimensions,
        in_channels=plan.preprocessing.channels,
        num_classes=plan.task.outputs,
    )
    model._dropout.p = plan.model.dropout
    return make_private(_padded_for_any_size(model))


def build_lite0(plan: Plan) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet's statistics frozen; 2D, 3 channels."""
    _refuse_channels(plan)
    _refuse_dropout(plan)
    if plan.task.dimensions != 2 or plan.preprocessing.channels != 3:
        raise PlanError(
            "efficientnet-lite0 takes 2D images of 3 channels",
            fix="Set dimensions = 2 and channels = 3, or choose another model",
            where="model.name",
        )
    model = EfficientNet(
        list(_LITE0_BLOCKS),
        num_classes=plan.task.outputs,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    replace(model, _lite_layer)
    padded = make_private(_padded_for_any_size(model))
    same_pad = padded.get_submodule("_conv_stem_padding")
    padded.add_module("_conv_stem_padding", nn.Sequential(_lite_input(plan), same_pad))
    taps = plan.model.taps
    return padded if taps is None else with_taps(padded, taps, plan.task.outputs)


def _lite_input(plan: Plan) -> ChannelAffine:
    # The weights saw (pixel - 127) / 128. With that, real photographs meet the frozen statistics:
    # mean deviation of the layers' inputs 0.19 running deviations, against 0.33 without.
    if plan.preprocessing.intensity == "unit":
        return ChannelAffine([255 / 128] * 3, [-127 / 128] * 3)
    scale = [deviation * 255 / 128 for deviation in _IMAGENET_DEVIATION]
    shift = [(mean * 255 - 127) / 128 for mean in _IMAGENET_MEAN]
    return ChannelAffine(scale, shift)


def _lite_layer(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.BatchNorm2d):
        return FrozenBatchNorm2d(layer.num_features, layer.eps)
    return nn.ReLU6() if isinstance(layer, MemoryEfficientSwish) else layer


def _padded_for_any_size(model: nn.Module) -> nn.Module:
    # MONAI works its padding out for one square size. Drop-connect goes: it is random per sample.
    for module in list(model.modules()):
        for name, _ in list(module.named_children()):
            if name.endswith("_padding"):
                conv = module.get_submodule(name.removesuffix("_padding"))
                setattr(module, name, _same_pad(conv))
        if hasattr(module, "drop_connect_rate"):
            module.drop_connect_rate = 0.0  # type: ignore[assignment]
    return model


def _same_pad(conv: nn.Module) -> nn.Module:
    if not isinstance(conv, (nn.Conv2d, nn.Conv3d)) or max(conv.kernel_size) == 1:
        return nn.Identity()
    return SamePad(conv.kernel_size, conv.stride, conv.dilation)


def _refuse_channels(plan: Plan) -> None:
    if plan.model.channels is not None:
        raise PlanError(
            f"{plan.model.name} has fixed widths",
            value=plan.model.channels,
            fix="Remove channels, or choose cnn or a ResNet",
            where="model.channels",
        )


def _refuse_dropout(plan: Plan) -> None:
    if plan.model.dropout:
        raise PlanError(
            f"{plan.model.name} has no dropout",
            value=plan.model.dropout,
            fix="Remove dropout, or choose another model",
            where="model.dropout",
        )
