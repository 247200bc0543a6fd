"""Layers that cost less when Opacus wants every sample's gradient (``hooks``, ``bookkeeping``).

Four things make a private step dear, and each is avoided by a layer of its own, registered through
Opacus's public :func:`opacus.grad_sample.register_grad_sampler`:

- autograd works out the summed weight gradient as well, which Opacus then throws away: the forward
  pass of these layers uses detached weights, so that this work is never asked for;
- a depthwise convolution is unfolded into a product of all channels with all channels, of which
  the diagonal is kept (twenty times a plain step for EfficientNet): here it stays grouped;
- large maps are unfolded ninefold: here only where the map is small and the matrix product wins
  (:mod:`fedward.models.samplers`);
- a group norm is worked out once more for its gradients: here its statistics are remembered.

``benchmarks/dp.py`` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn
from torch.nn import functional

from fedward.models.dp_ready import replace
from fedward.models.samplers import Samples, Weighted, bias_samples, weight_samples


def sampled(model: nn.Module) -> nn.Module:
    """Swap convolutions, linear layers and group norms for ones made for per-sample gradients.

    In place. Call it on what will be wrapped in ``hooks`` or ``bookkeeping`` mode, not for
    ``functorch``.
    Parameters and names stay the same objects; without Opacus's hooks the layers act like plain
    ones, so the same model can be trained without privacy afterwards.

    Parameters
    ----------
    model : nn.Module
        Any model or part of one.

    Returns
    -------
    nn.Module
        `model`.
    """
    replace(model, _sampled_layer)
    return model


def _sampled_layer(layer: nn.Module) -> nn.Module:
    make = _MAKERS.get(type(layer))
    if make is None or not _trains_plainly(layer):
        return layer
    new = make(layer)
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)


def _trains_plainly(layer: nn.Module) -> bool:
    plain_padding = not isinstance(getattr(layer, "padding", ()), str)
    return plain_padding and getattr(layer, "padding_mode", "zeros") == "zeros"


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._backward_hooks) and layer.training and torch.is_grad_enabled()


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if not _hooked(layer):
        return weight, bias
    return weight.detach(), None if bias is None else bias.detach()


class _Reached(torch.autograd.Function):
    """Lets a backward pass reach a first layer, whose input has no gradient, at no cost."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *back: Tensor) -> tuple[None, None]:
        return None, None


def _reached(layer: nn.Module, out: Tensor) -> Tensor:
    if out.requires_grad or not _hooked(layer):
        return out
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return _Reached.apply(out, trained[0]) if trained else out  # type: ignore[no-untyped-call]


class SampledConv2d(nn.Conv2d):
    """2D convolution."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _parts(self)
        place = (self.stride, self.padding, self.dilation, self.groups)
        out = functional.conv2d(x, weight, bias, *place)  # type: ignore[arg-type]
        return _reached(self, out)


class SampledConv3d(nn.Conv3d):
    """3D convolution."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _parts(self)
        place = (self.stride, self.padding, self.dilation, self.groups)
        out = functional.conv3d(x, weight, bias, *place)  # type: ignore[arg-type]
        return _reached(self, out)


class SampledConvTranspose2d(nn.ConvTranspose2d):
    """2D transposed convolution."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight, bias = _parts(self)
        place = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        out = functional.conv_transpose2d(x, weight, bias, *place)  # type: ignore[arg-type]
        return _reached(self, out)


class SampledConvTranspose3d(nn.ConvTranspose3d):
    """3D transposed convolution."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight, bias = _parts(self)
        place = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        out = functional.conv_transpose3d(x, weight, bias, *place)  # type: ignore[arg-type]
        return _reached(self, out)


class SampledLinear(nn.Linear):
    """Linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _parts(self)
        return _reached(self, functional.linear(x, weight, bias))


class SampledGroupNorm(nn.GroupNorm):
    """Group normalisation that remembers its statistics until the backward pass."""

    statistics: list[tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _parts(self)
        if not _hooked(self) or x.numel() == 0:
            return functional.group_norm(x, self.num_groups, weight, bias, self.eps)
        shape = (len(x), self.num_channels, x[0, 0].numel(), self.num_groups)
        normed = torch.native_group_norm(x.contiguous(), weight, bias, *shape, self.eps)
        mean, deviation = (one.detach() for one in normed[1:])
        self.__dict__.setdefault("statistics", []).append((mean, deviation))
        return _reached(self, normed[0])


def _like(kind: type[nn.Module], *names: str) -> Callable[[nn.Module], nn.Module]:
    def make(layer: nn.Module) -> nn.Module:
        options = {name: getattr(layer, name) for name in names}
        if "bias" in names:
            options["bias"] = layer.bias is not None
        with torch.device("meta"):  # its weights are replaced at once
            return kind(**options)

    return make


_COMMON = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_CONV = (*_COMMON, "bias")
_MAKERS: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {
    nn.Conv2d: _like(SampledConv2d, *_CONV),
    nn.Conv3d: _like(SampledConv3d, *_CONV),
    nn.ConvTranspose2d: _like(SampledConvTranspose2d, *_CONV, "output_padding"),
    nn.ConvTranspose3d: _like(SampledConvTranspose3d, *_CONV, "output_padding"),
    nn.GroupNorm: _like(SampledGroupNorm, "num_groups", "num_channels", "eps"),
    nn.Linear: _like(SampledLinear, "in_features", "out_features", "bias"),
}


def _weighted_samples(layer: Weighted, activations: list[Tensor], back: Tensor) -> Samples:
    samples: Samples = {}
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = bias_samples(layer, back)
    if layer.weight.requires_grad:
        samples[layer.weight] = weight_samples(layer, activations[0].to(back.dtype), back)
    return samples


def norm_samples(layer: SampledGroupNorm, activations: list[Tensor], back: Tensor) -> Samples:
    """Each image's gradients of a group norm's scale and shift, ``(N, C)`` both."""
    samples: Samples = {}
    x, shift = activations[0], bias_samples(layer, back)
    scale = _scale_samples(layer, x, back, shift)
    if layer.weight.requires_grad:
        samples[layer.weight] = scale
    if layer.bias.requires_grad:
        samples[layer.bias] = shift
    return samples


def _scale_samples(layer: SampledGroupNorm, x: Tensor, back: Tensor, shift: Tensor) -> Tensor:
    if x.numel() == 0:  # a step for which no patient was drawn
        return torch.zeros_like(shift)
    mean, deviation = layer.statistics.pop()
    products = x.flatten(2).unsqueeze(2) @ back.flatten(2).unsqueeze(3)
    grouped = (len(x), layer.num_groups, -1)
    centred = products.view(grouped) - mean.unsqueeze(2) * shift.view(grouped)
    return (centred * deviation.unsqueeze(2)).view(len(x), -1)


SAMPLED_WEIGHTED = (
    SampledConv2d,
    SampledConv3d,
    SampledConvTranspose2d,
    SampledConvTranspose3d,
    SampledLinear,
)
register_grad_sampler(list(SAMPLED_WEIGHTED))(_weighted_samples)
register_grad_sampler(SampledGroupNorm)(norm_samples)
