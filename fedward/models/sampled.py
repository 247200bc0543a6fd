"""Layers that cost less when Opacus wants every sample's gradient (its ``hooks`` mode).

Three things make a private step dear, and each is avoided by a layer of its own, registered through
Opacus's public :func:`opacus.grad_sample.register_grad_sampler`:

- autograd works out the summed weight gradient as well, which Opacus then throws away: the forward
  pass of these layers uses detached weights, so that this work is never asked for;
- a depthwise convolution is unfolded into a product of all channels with all channels, of which
  the diagonal is kept (twenty times a plain step for EfficientNet): here it stays grouped;
- large maps are unfolded ninefold: here only where the map is small and the matrix product wins.

``benchmarks/dp.py`` measures it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight, conv3d_weight

from fedward.models.dp_ready import replace

_Samples = dict[Tensor, Tensor]
_Conv = nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose2d | nn.ConvTranspose3d
_WIDE, _SMALL = 128 * 128, 256  # channel pairs and map positions where a matrix product wins


def sampled(model: nn.Module) -> nn.Module:
    """Swap convolutions and group norms for layers with cheap per-sample gradients, in place.

    Call it on what Opacus will wrap in ``hooks`` mode, not for ``functorch`` or ``ghost``.
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


def _weights(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    # A first layer keeps its own: with an input without gradient, nothing would reach the hooks.
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, Tensor) or not x.requires_grad or not layer._backward_hooks:
        return weight, bias  # type: ignore[return-value]
    return weight.detach(), bias.detach() if isinstance(bias, Tensor) else None


class SampledConv2d(nn.Conv2d):
    """2D convolution."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _weights(self, x)
        return functional.conv2d(
            x, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )


class SampledConv3d(nn.Conv3d):
    """3D convolution."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _weights(self, x)
        return functional.conv3d(
            x, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )


class SampledConvTranspose2d(nn.ConvTranspose2d):
    """2D transposed convolution."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight, bias = _weights(self, x)
        place = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return functional.conv_transpose2d(x, weight, bias, *place)  # type: ignore[arg-type]


class SampledConvTranspose3d(nn.ConvTranspose3d):
    """3D transposed convolution."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight, bias = _weights(self, x)
        place = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return functional.conv_transpose3d(x, weight, bias, *place)  # type: ignore[arg-type]


class SampledGroupNorm(nn.GroupNorm):
    """Group normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _weights(self, x)
        return functional.group_norm(x, self.num_groups, weight, bias, self.eps)


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
}


def _conv_samples(layer: _Conv, activations: list[Tensor], backprops: Tensor) -> _Samples:
    x = activations[0].to(backprops.dtype)
    samples = _bias_samples(layer, backprops)
    if layer.weight.requires_grad:
        by_product = _product_wins(layer, backprops)
        samples[layer.weight] = (_by_product if by_product else _by_groups)(layer, x, backprops)
    return samples


def _transposed_samples(
    layer: _Transposed, activations: list[Tensor], backprops: Tensor
) -> _Samples:
    samples = _bias_samples(layer, backprops)
    if layer.weight.requires_grad:
        # The adjoint of a convolution: its weight gradient is that of the convolution with what
        # goes in and what comes back exchanged.
        samples[layer.weight] = _by_groups(layer, backprops, activations[0].to(backprops.dtype))
    return samples


def _norm_samples(layer: nn.GroupNorm, activations: list[Tensor], backprops: Tensor) -> _Samples:
    samples = _bias_samples(layer, backprops)
    if layer.weight.requires_grad:
        normal = functional.group_norm(activations[0], layer.num_groups, eps=layer.eps)
        samples[layer.weight] = (normal * backprops).flatten(2).sum(2)
    return samples


def _bias_samples(layer: _Conv | _Transposed | nn.GroupNorm, backprops: Tensor) -> _Samples:
    if layer.bias is None or not layer.bias.requires_grad:
        return {}
    return {layer.bias: backprops.flatten(2).sum(2)}


def _product_wins(layer: _Conv, backprops: Tensor) -> bool:
    if layer.groups != 1 or isinstance(layer, nn.Conv3d):
        return False
    wide = layer.in_channels * layer.out_channels >= _WIDE
    return max(layer.kernel_size) == 1 or (wide and backprops[0, 0].numel() <= _SMALL)


def _by_product(layer: _Conv, x: Tensor, back: Tensor) -> Tensor:
    """``(N, O, positions) @ (N, positions, I * kernel)``; needs one group."""
    options = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    columns = functional.unfold(x, *options)  # type: ignore[arg-type]
    product = torch.bmm(back.flatten(2), columns.transpose(1, 2))
    return product.view(len(x), *layer.weight.shape)


def _by_groups(layer: _Conv | _Transposed, x: Tensor, back: Tensor) -> Tensor:
    """The weight gradient of a convolution that keeps the samples in groups of their own."""
    if len(x) == 0:  # a step for which no patient was drawn
        return x.new_zeros((0, *layer.weight.shape))
    weight_gradient = conv2d_weight if x.ndim == 4 else conv3d_weight
    options = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def of_one(one: Tensor, its_back: Tensor) -> Tensor:
        out: Tensor = weight_gradient(  # type: ignore[no-untyped-call]
            one[None], layer.weight.shape, its_back[None], *options
        )
        return out

    samples: Tensor = torch.func.vmap(of_one)(x, back)
    return samples


register_grad_sampler([SampledConv2d, SampledConv3d])(_conv_samples)
register_grad_sampler([SampledConvTranspose2d, SampledConvTranspose3d])(_transposed_samples)
register_grad_sampler(SampledGroupNorm)(_norm_samples)
