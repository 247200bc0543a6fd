"""Weight gradients of single images: by matrix products or by convolutions, by shape.

What one image adds to a layer's weights is a matrix product over positions: ``back @ columns.T``,
where ``back`` ``(p, T)`` is what comes back to the layer's outputs and ``columns`` ``(d, T)`` are
the patches that it read. A transposed convolution is the same with its two sides exchanged.
"""

from __future__ import annotations

import math

import torch
from opacus.utils.tensor_utils import unfold3d
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight, conv3d_weight

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
