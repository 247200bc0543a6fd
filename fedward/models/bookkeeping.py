"""Clipped sums in one backward pass, without every image's gradient in memory.

The book-keeping of Bu et al. (2023, "Differentially private optimization on large model at small
cost", arXiv:2210.00038) mixed with per-sample gradients, layer by layer. While a backward pass goes
through the network, each layer gives the norm of what each patient would add, and the book keeps
what the weighted sum will need. Once all norms are known, the sums follow without a second pass.

A layer has two ways to its norms:

- *kept*: the gradients themselves. Right for few weights under large maps: the first layers of a
  network, and all biases and norms.
- *ghost*: ``‖B Aᵀ‖² = Σ (AᵀA) ∘ (BᵀB)`` over the positions (Li et al. 2022, arXiv:2110.05679), so
  that many weights under small maps never appear once per image.

The images of one patient count as one: their gradients are summed before the norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.grad_sample.utils import register_norm_sampler
from torch import Tensor, nn

from fedward.errors import ModelError
from fedward.models.sampled import SAMPLED_WEIGHTED, SampledGroupNorm, norm_samples
from fedward.models.samplers import (
    Samples,
    Weighted,
    bias_samples,
    is_product,
    product_of,
    size_of,
    weight_samples,
)

# A ghost norm costs T²(d + p) products and spares d·p floats that are written once and read twice:
# one such float takes about as long as so many products (benchmarks/dp.py).
_PRODUCTS_PER_FLOAT = 32


class Book:
    """What one backward pass leaves for the weighted sums.

    Parameters
    ----------
    owners : Tensor
        ``(N,)`` place of each image's patient, from 0, ascending.
    """

    def __init__(self, owners: Tensor) -> None:
        self.owners = owners
        self.patients = int(owners[-1]) + 1 if len(owners) else 0
        self.each = _equal_shares(owners, self.patients)
        self._sums: dict[Tensor, Callable[[Tensor], Tensor]] = {}

    def keep(self, parameter: Tensor, samples: Tensor) -> Tensor:
        """Note the images' gradients ``(N, *shape)``; returns the patients' norms."""
        own = self._by_patient(samples).flatten(1)
        self._sums[parameter] = lambda weights: weights @ own
        norms: Tensor = torch.linalg.vector_norm(own, dim=1)
        return norms

    def owe(self, parameter: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Note how to sum over images whose weights ``(N,)`` are not known yet."""
        self._sums[parameter] = lambda weights: total(weights[self.owners])

    @torch.no_grad()
    def settle(self, weights: Tensor) -> None:
        """Put the sum of the patients' gradients, each times its weight, into ``grad``."""
        for parameter, total in self._sums.items():
            parameter.grad = total(weights).view_as(parameter)
        self._sums.clear()

    def joined(self, positions: Tensor) -> Tensor:
        """``(N, C, T)`` of images as ``(patients, C, images of each * T)``."""
        if self.each == 1:
            return positions
        shape = (self.patients, self.each, *positions.shape[1:])
        return positions.reshape(shape).transpose(1, 2).flatten(2)

    def _by_patient(self, samples: Tensor) -> Tensor:
        if self.each == 1:
            return samples
        total = samples.new_zeros((self.patients, *samples.shape[1:]))
        return total.index_add_(0, self.owners, samples)


def keep_books(module: nn.Module, clipping_norm: float) -> GradSampleModuleFastGradientClipping:
    """Wrap a module for :func:`backward`.

    Parameters
    ----------
    module : nn.Module
        From :func:`fedward.models.sampled.sampled`.
    clipping_norm : float
        L2 bound on what one patient adds.

    Raises
    ------
    ModelError
        A trainable layer has no such way to its gradients.
    """
    for name, layer in module.named_modules():
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        if own and not isinstance(layer, (*SAMPLED_WEIGHTED, SampledGroupNorm)):
            raise ModelError(
                "book-keeping takes convolutions, linear layers and group norms",
                value=f"{type(layer).__name__} {name}",
                fix="Choose hooks",
            )
    return GradSampleModuleFastGradientClipping(
        module, loss_reduction="sum", max_grad_norm=clipping_norm, use_ghost_clipping=True
    )


def backward(wrapped: GradSampleModuleFastGradientClipping, losses: Tensor, owners: Tensor) -> None:
    """Put the sum of the patients' clipped gradients into ``grad``.

    Parameters
    ----------
    wrapped : GradSampleModuleFastGradientClipping
        From :func:`keep_books`.
    losses : Tensor
        ``(N,)`` loss of each image; a patient's is the mean over the patient's images.
    owners : Tensor
        ``(N,)`` place of each image's patient, from 0, ascending.
    """
    book = Book(owners)
    layers = [layer for layer in wrapped.modules() if type(layer) in _KINDS]
    for layer in layers:
        layer.book = book
    counts = torch.bincount(owners, minlength=book.patients)
    torch.autograd.backward((losses / counts[owners]).sum())
    book.settle(wrapped.get_clipping_coef())
    for layer in layers:
        del layer.book


def _book_of(layer: nn.Module) -> Book:
    book: Book = layer.__dict__["book"]
    return book


def _equal_shares(owners: Tensor, patients: int) -> int:
    """Images of each patient where all have as many, else 0."""
    if patients == 0 or len(owners) % patients:
        return 0
    each = len(owners) // patients
    expected = torch.arange(patients, device=owners.device).repeat_interleave(each)
    return each if torch.equal(owners, expected) else 0


def _norms_of_group_norm(
    layer: SampledGroupNorm, activations: list[Tensor], back: Tensor
) -> Samples:
    samples, book = norm_samples(layer, activations, back), _book_of(layer)
    return {parameter: book.keep(parameter, own) for parameter, own in samples.items()}


def _norms_of_weighted(layer: Weighted, activations: list[Tensor], back: Tensor) -> Samples:
    book = _book_of(layer)
    norms: Samples = {}
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = book.keep(layer.bias, bias_samples(layer, back))
    if layer.weight.requires_grad:
        norms[layer.weight] = _weight_norms(book, layer, activations[0].to(back.dtype), back)
    return norms


def _weight_norms(book: Book, layer: Weighted, x: Tensor, back: Tensor) -> Tensor:
    if not _ghost_wins(book, layer, x, back):
        return book.keep(layer.weight, weight_samples(layer, x, back))
    columns, rows = product_of(layer, x, back)
    book.owe(layer.weight, lambda weights: _weighted_sum(layer, x, back, weights))
    inner, outer = book.joined(columns), book.joined(rows)
    squares = (inner.transpose(1, 2) @ inner).mul_(outer.transpose(1, 2) @ outer).sum((1, 2))
    return squares.clamp_(min=0).sqrt_()  # below 0 by rounding only


def _ghost_wins(book: Book, layer: Weighted, x: Tensor, back: Tensor) -> bool:
    if not book.each or not is_product(layer):
        return False
    d, p, positions = size_of(layer, x, back)
    positions *= book.each
    return positions**2 * (d + p) < _PRODUCTS_PER_FLOAT * d * p


def _weighted_sum(layer: Weighted, x: Tensor, back: Tensor, weights: Tensor) -> Tensor:
    scaled = back * weights.view(-1, *[1] * (back.ndim - 1))
    if isinstance(layer, nn.Linear) or max(layer.kernel_size) == 1:
        columns, rows = product_of(layer, x, scaled)
        return rows.transpose(0, 1).flatten(1) @ columns.transpose(0, 1).flatten(1).T
    transposed = not isinstance(layer, (nn.Conv2d, nn.Conv3d))
    extra = layer.output_padding
    options = (layer.stride, layer.padding, layer.dilation, transposed, extra, layer.groups)
    gradient: Tensor = torch.ops.aten.convolution_backward(
        scaled, x, layer.weight, None, *options, [False, True, False]
    )[1]
    return gradient


_KINDS = (*SAMPLED_WEIGHTED, SampledGroupNorm)
register_norm_sampler(list(SAMPLED_WEIGHTED))(_norms_of_weighted)
register_norm_sampler(SampledGroupNorm)(_norms_of_group_norm)
