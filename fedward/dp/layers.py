"""Layers with cheaper per-sample gradients for Opacus (``hooks``, ``bookkeeping``).

Four things make a private step dear, and each is avoided by a layer of its own, which
:mod:`fedward.dp.ghost_clipping` registers at Opacus:

- autograd works out the summed weight gradient as well, which Opacus then throws away: the forward
  pass of these layers uses detached weights, so that this work is never asked for;
- a depthwise convolution is unfolded into a product of all channels with all channels, of which
  the diagonal is kept (twenty times a plain step for EfficientNet): here it stays grouped;
- large maps are unfolded ninefold: here only where the map is small and the matrix product wins
  (:mod:`fedward.dp.layers`);
- a group norm is worked out once more for its gradients: here its statistics are remembered.

``benchmarks/dp.py`` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight, conv3d_weight

from fedward.dp.compat import replace

# Weight gradients of single images: by matrix products or by convolutions, by shape.
#
# What one image adds to a layer's weights is a matrix product over positions: ``back @ columns.T``,
# where ``back`` ``(p, T)`` is what comes back to the layer's outputs and ``columns`` ``(d, T)`` are
# the patches that it read. A transposed convolution is the same with its two sides exchanged.

Samples = dict[Tensor, Tensor]
Conv = nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose2d | nn.ConvTranspose3d
Weighted = Conv | Transposed | nn.Linear

# Where a matrix product beats a convolution with the images as groups (benchmarks/dp.py).
_FEW_POSITIONS, _SOME_POSITIONS, _MANY_WEIGHTS = 16, 128, 48_000


def weight_samples(layer: Weighted, x: Tensor, back: Tensor) -> Tensor:
    """Each image's gradient of the layer's weight.

    Parameters
    ----------
    layer : nn.Module
        A linear layer or a convolution.
    x, back : Tensor
        ``(N, ...)`` what went into the layer, and the gradient of what came out.

    Returns
    -------
    Tensor
        ``(N, *weight.shape)``.
    """
    if len(x) == 0:  # a step for which no patient was drawn
        return x.new_zeros((0, *layer.weight.shape))
    if is_product(layer) and _product_wins(layer, x, back):
        columns, rows = product_of(layer, x, back)
        return torch.bmm(rows, columns.transpose(1, 2)).view(len(x), *layer.weight.shape)
    return _by_groups(layer, x, back)


def bias_samples(layer: nn.Module, back: Tensor) -> Tensor:
    """Each image's gradient of a bias or shift, ``(N, C)``."""
    if back.ndim == 2:
        return back
    return back.flatten(1, -2).sum(1) if isinstance(layer, nn.Linear) else back.flatten(2).sum(2)


def is_product(layer: Weighted) -> bool:
    """Whether the layer's weight gradient is one matrix product per image."""
    if isinstance(layer, nn.Linear):
        return True
    unfolds = isinstance(layer, (nn.Conv2d, nn.Conv3d)) or all(
        extra < step for extra, step in zip(layer.output_padding, layer.stride, strict=True)
    )
    return layer.groups == 1 and unfolds


def product_of(layer: Weighted, x: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """Columns ``(N, d, T)`` and rows ``(N, p, T)``; rows times columns is the weight's gradient."""
    if isinstance(layer, nn.Linear):
        return _positions_last(x), _positions_last(back)
    x, back = exchanged(layer, x, back)
    return _columns(layer, x), back.flatten(2)


def exchanged(layer: Conv | Transposed, x: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in the order of a convolution: a transposed one is its adjoint."""
    return (x, back) if isinstance(layer, (nn.Conv2d, nn.Conv3d)) else (back, x)


def size_of(layer: Weighted, x: Tensor, back: Tensor) -> tuple[int, int, int]:
    """``(d, p, T)`` of :func:`product_of`, without working it out."""
    p = layer.weight.shape[0]
    rows = back if isinstance(layer, (nn.Conv2d, nn.Conv3d)) else x
    spatial = x.shape[1:-1] if isinstance(layer, nn.Linear) else rows.shape[2:]
    return layer.weight.numel() // p, p, math.prod(spatial)


def _positions_last(x: Tensor) -> Tensor:
    return x.flatten(1, -2).transpose(1, 2) if x.ndim > 2 else x.unsqueeze(2)


def _columns(layer: Conv | Transposed, x: Tensor) -> Tensor:
    if max(layer.kernel_size) == 1 and not any(layer.padding):
        for axis, step in enumerate(layer.stride, start=2):
            x = x[(slice(None),) * axis + (slice(None, None, step),)]
        return x.flatten(2)
    options = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    if x.ndim == 4:
        return functional.unfold(x, *options)  # type: ignore[arg-type]
    names = ("kernel_size", "dilation", "padding", "stride")
    from opacus.utils.tensor_utils import unfold3d  # for private steps alone

    columns: Tensor = unfold3d(x, **dict(zip(names, options, strict=True)))
    return columns


def _product_wins(layer: Weighted, x: Tensor, back: Tensor) -> bool:
    if isinstance(layer, nn.Linear) or max(layer.kernel_size) == 1:
        return True
    d, p, positions = size_of(layer, x, back)
    if x.ndim > 4 or positions <= _FEW_POSITIONS:
        return x.ndim == 4
    many = d * p >= _MANY_WEIGHTS and positions <= _SOME_POSITIONS
    return many or d == math.prod(layer.kernel_size)


def _by_groups(layer: Weighted, x: Tensor, back: Tensor) -> Tensor:
    """The weight gradient of a convolution that keeps the images in groups of their own."""
    if isinstance(layer, nn.Linear):  # never: a linear layer is a product
        raise TypeError(type(layer).__name__)
    x, back = exchanged(layer, x, back)
    weight_gradient = conv2d_weight if x.ndim == 4 else conv3d_weight
    options = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def of_one(one: Tensor, its_back: Tensor) -> Tensor:
        out: Tensor = weight_gradient(  # type: ignore[no-untyped-call]
            one[None], layer.weight.shape, its_back[None], *options
        )
        return out

    samples: Tensor = torch.func.vmap(of_one)(x, back)
    return samples


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


def reuses_layers(model: nn.Module) -> bool:
    """Whether a layer is called more than once in a forward pass, as a module says of itself."""
    return any(getattr(module, "reuses_layers", False) for module in model.modules())


def unknown_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and layer of whatever has parameters and no counterpart in :func:`sampled`."""
    for name, layer in model.named_modules():
        has_own = next(layer.parameters(recurse=False), None) is not None
        known = isinstance(layer, (*SAMPLED_WEIGHTED, SampledGroupNorm)) or (
            type(layer) in _MAKERS and _trains_plainly(layer)
        )
        if has_own and not known:
            yield name, layer


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


def weighted_samples(layer: Weighted, activations: list[Tensor], back: Tensor) -> Samples:
    """Each image's gradients of a layer's weight and bias, as far as they train."""
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
