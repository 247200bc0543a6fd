"""Ghost clipping: clipped gradient sums in one backward pass, without per-image gradients.

The book-keeping of Bu et al. (2023, "Differentially private optimization on large model at small
cost", arXiv:2210.00038) mixed with per-sample gradients, layer by layer. While a backward pass goes
through the network, each layer gives the norm of what each patient would add, and the book keeps
what the weighted sum will need. Once all norms are known, the sums follow without a second pass.

A layer has two ways to its norms:

- *kept*: the gradients themselves. Right for few weights under large maps: the first layers of a
  network, and all biases and norms.
- *ghost*: ``‖B Aᵀ‖² = Σ (AᵀA) ∘ (BᵀB)`` over the positions (Li et al. 2022, arXiv:2110.05679), so
  that many weights under small maps never appear once per image.

The images of one patient count as one: their gradients are summed before the norm. Why no patient
adds more than the clipping norm, whatever cancels, stands in :mod:`fedward.models.clipping`.
"""

from __future__ import annotations

from typing import Any

import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
    register_grad_sampler,
)
from opacus.grad_sample.utils import register_norm_sampler
from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import Tensor, nn

from fedward.dp.gaussian import GaussianNoise
from fedward.dp.layers import (
    SAMPLED_WEIGHTED,
    SampledGroupNorm,
    Samples,
    Weighted,
    bias_samples,
    is_product,
    norm_samples,
    product_of,
    reuses_layers,
    size_of,
    weight_samples,
    weighted_samples,
)
from fedward.errors import ModelError
from fedward.models.clipping import block_norms, factors, product_norms
from fedward.rule_codes import RuleCode

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
        self._norms: list[Tensor] = []
        self._lengths: list[Tensor] = []
        self._kept: dict[Tensor, Tensor] = {}
        self._owed: dict[Tensor, tuple[Weighted, Tensor, Tensor]] = {}

    def keep(self, parameter: Tensor, samples: Tensor) -> None:
        """Note the images' gradients ``(N, *shape)``."""
        own = self._kept[parameter] = self._by_patient(samples).flatten(1)
        self._norms.append(block_norms(own))

    def owe(self, layer: Weighted, x: Tensor, back: Tensor) -> None:
        """Note the norms of a layer's weight, and what its sum will be made of."""
        self._owed[layer.weight] = (layer, x, back)
        columns, rows = product_of(layer, x, back)
        norms, lengths = product_norms(
            self._joined(columns), self._joined(rows), len(x) * columns.shape[2]
        )
        self._norms.append(norms)
        self._lengths.append(lengths)

    @torch.no_grad()
    def settle(self, clipping_norm: float, finite: Tensor) -> None:
        """Put the sum of the patients' clipped gradients into ``grad``.

        Parameters
        ----------
        clipping_norm : float
            L2 bound on what one patient adds.
        finite : Tensor
            ``(patients,)`` whether a patient's losses are finite; others count as zero.
        """
        dtype = next(iter({**self._kept, **self._owed})).dtype
        weights, broken = factors(self._norms, self._lengths, finite, clipping_norm, dtype)
        some = bool(broken.any())
        for parameter, own in self._kept.items():
            if some:
                own = own.masked_fill(broken.unsqueeze(1), 0)  # 0 times inf would be NaN
            parameter.grad = (weights @ own).view_as(parameter)
        images, lost = weights[self.owners], broken[self.owners]
        for parameter, (layer, x, back) in self._owed.items():
            if some:
                x, back = (part.masked_fill(_row_wise(lost, part), 0) for part in (x, back))
            parameter.grad = _weighted_sum(layer, x, back, images).view_as(parameter)

    def _joined(self, positions: Tensor) -> Tensor:
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


def keep_books(module: nn.Module) -> GradSampleModuleFastGradientClipping:
    """Wrap a module for :func:`backward`.

    Parameters
    ----------
    module : nn.Module
        From :func:`fedward.dp.layers.sampled`.

    Raises
    ------
    ModelError
        A trainable layer has no such way to its gradients, or is called more than once: the norm of
        a sum is not told by the norms of its parts.
    """
    if reuses_layers(module):
        raise ModelError(RuleCode.BOOKKEEPING, value="a layer that is reused", fix="Choose hooks")
    for name, layer in module.named_modules():
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        if own and not isinstance(layer, (*SAMPLED_WEIGHTED, SampledGroupNorm)):
            raise ModelError(
                RuleCode.BOOKKEEPING,
                value=f"{type(layer).__name__} {name}",
                fix="Choose hooks",
            )
    return GradSampleModuleFastGradientClipping(
        module, loss_reduction="sum", use_ghost_clipping=True
    )


def backward(
    wrapped: GradSampleModule | GradSampleModuleFastGradientClipping,
    losses: Tensor,
    owners: Tensor,
    clipping_norm: float,
    real: Tensor | None = None,
) -> None:
    """Put the sum of the patients' clipped gradients into ``grad``.

    Parameters
    ----------
    wrapped : nn.Module
        From :func:`keep_books`, or Opacus' module that keeps every image's gradient.
    losses : Tensor
        ``(N,)`` loss of each image; a patient's is the mean over the patient's images.
    owners : Tensor
        ``(N,)`` place of each image's patient, from 0, ascending.
    clipping_norm : float
        L2 bound on what one patient adds (see :mod:`fedward.models.clipping`).
    real : Tensor, optional
        ``(N,)`` bool; the others only fill the batch up and add nothing. All without it.
    """
    book = Book(owners)
    real = torch.ones_like(owners, dtype=torch.bool) if real is None else real
    counts = losses.new_zeros(book.patients).index_add_(0, owners, real.to(losses.dtype))
    layers = [layer for layer in wrapped.modules() if type(layer) in _KINDS]
    for layer in layers:
        layer.book = book
    torch.autograd.backward(losses, real / counts.clamp(min=1)[owners])
    for layer in layers:
        del layer.book
    if isinstance(wrapped, GradSampleModule):
        for parameter in (p for p in wrapped.parameters() if p.requires_grad):
            book.keep(parameter, parameter.grad_sample)
            parameter.grad_sample = None
    bad = (real & ~torch.isfinite(losses.detach())).to(losses.dtype)
    book.settle(clipping_norm, losses.new_zeros(book.patients).index_add_(0, owners, bad) == 0)


def _row_wise(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.ndim - 1))


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
    return _noted(_book_of(layer), norm_samples(layer, activations, back))


def _norms_of_weighted(layer: Weighted, activations: list[Tensor], back: Tensor) -> Samples:
    book, samples = _book_of(layer), Samples()
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = bias_samples(layer, back)
    if layer.weight.requires_grad:
        x = activations[0].to(back.dtype)
        if _ghost_wins(book, layer, x, back):
            book.owe(layer, x, back)
            return _noted(book, samples) | {layer.weight: back.new_zeros(0)}
        samples[layer.weight] = weight_samples(layer, x, back)
    return _noted(book, samples)


def _noted(book: Book, samples: Samples) -> Samples:
    """The book has the norms; Opacus only counts that each parameter got one."""
    for parameter, own in samples.items():
        book.keep(parameter, own)
    return {parameter: own.new_zeros(0) for parameter, own in samples.items()}


def _ghost_wins(book: Book, layer: Weighted, x: Tensor, back: Tensor) -> bool:
    if not book.each or not is_product(layer):
        return False
    d, p, positions = size_of(layer, x, back)
    positions *= book.each
    return positions**2 * (d + p) < _PRODUCTS_PER_FLOAT * d * p


def _weighted_sum(layer: Weighted, x: Tensor, back: Tensor, weights: Tensor) -> Tensor:
    scaled = back * _row_wise(weights, back)
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
register_grad_sampler(list(SAMPLED_WEIGHTED))(weighted_samples)
register_grad_sampler(SampledGroupNorm)(norm_samples)
register_norm_sampler(list(SAMPLED_WEIGHTED))(_norms_of_weighted)
register_norm_sampler(SampledGroupNorm)(_norms_of_group_norm)


# Opacus' optimiser for clipped sums, with noise that withstands an attacker.


class SumOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Adds the noise to the sum in place, and divides in the same pass.

    Opacus draws its noise in floating point from a torch generator; here it comes from
    :class:`fedward.dp.GaussianNoise`. Opacus also copies each sum, fills a tensor with zeros and
    adds into a third; for DenseNet-121's seven million weights that took as long as drawing the
    noise.

    Parameters
    ----------
    noise : GaussianNoise
        Source of the noise.
    **settings
        As Opacus' optimiser takes them.
    """

    def __init__(self, *args: Any, noise: GaussianNoise, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.noise = noise

    def accumulate(self) -> None:
        """Take what stands in ``grad`` over into the sum of the step."""
        for parameter in self.params:
            given, parameter.grad = parameter.grad, None
            if parameter.summed_grad is None:
                parameter.summed_grad = given
            else:
                parameter.summed_grad.add_(given)

    def add_noise(self) -> None:
        """Put the sum with its noise into ``grad``; the sum is gone then, so it is used once."""
        for parameter in self.params:
            summed, parameter.summed_grad = parameter.summed_grad, None
            parameter.grad = summed.view_as(parameter).contiguous()
        if self.noise_multiplier:
            mean = self.loss_reduction == "mean"
            divisor = self.expected_batch_size * self.accumulated_iterations if mean else 1
            sums = [parameter.grad for parameter in self.params]
            self.noise.add_(sums, self.noise_multiplier, self.max_grad_norm, divisor)

    def scale_grad(self) -> None:
        """Divide by the expected batch, where :meth:`add_noise` has not."""
        if not self.noise_multiplier:
            super().scale_grad()
