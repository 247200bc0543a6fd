"""Clipping factors for each patient's gradient, certified against rounding errors.

What is promised: one patient adds at most C to the clipped sum, for any finite or non-finite
float32 weights and images. The norms come from floating-point arithmetic, and hostile weights
can make activations and back-propagated values huge so that they cancel; an estimate of a norm is
not enough then. The argument, with unit roundoff ``u`` (2⁻²⁴ for float32) and
``γ_n = n u / (1 - n u)``:

1. *Explicit gradients* (:func:`block_norms`). The patient's part of the sum is ``w g`` with the
   stored ``g``, however wrong ``g`` is as a gradient. Sums of squares of one block of
   ``BLOCK`` numbers have a relative error of at most ``γ_BLOCK`` in any order of summation (Higham
   2002, Accuracy and Stability of Numerical Algorithms, 2nd ed., §3.1); the blocks are added up in
   float64.
2. *Products* (:func:`product_norms`). ``g = Σ_t b_t a_tᵀ`` is never stored; its squared norm is
   ``Σ_tt' (a_t·a_t')(b_t·b_t')``. With ``m = Σ_t |a_t||b_t|``, the computed value differs from
   the exact one by at most ``κ m²``, ``κ = γ_(d + p + T² + 4)`` (§3.1 for each inner product and
   for the sum). In float64 ``κ`` is about 1e-12, and products of float32 numbers neither overflow
   nor vanish. The weighted sum itself is one float32 product over all positions of a chunk; its
   term of this patient is ``w Σ_t b_t a_tᵀ (1 + θ_t)`` with ``|θ_t| ≤ γ_K`` for K summed products
   (§3.5), so that it is longer than ``w |g|`` by at most ``w γ_K m``, which is added to the norm.
3. *A bound of its own*: ``w m ≤ CANCELLING C`` (:func:`factors`). It uses lengths only, so no
   cancellation can mislead it, and it keeps intermediate products of a shared matrix product small:
   what one patient changes in the rounding of the others' parts is of the order of
   ``u √K CANCELLING C``.
4. *Not finite.* A patient with a loss, activation or gradient that is not finite has the factor 0,
   and its rows are set to 0 before any product: ``0 · inf`` would spread. So has one whose squares
   overflow float32 (beyond 1.8e19): a finite number less than what training could use.
5. *Underflow.* Squares below 1.2e-38 may count as 0. They change a norm by at most 1e-14 for up to
   1e10 numbers, which is nothing beside C ≥ 1e-6 (what a plan may ask for).
6. *Factors* are worked out in float64 and rounded down; below the least normal number they are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 1024
CANCELLING: Final = 16.0
"""How many times C the lengths of a patient's products may add up to.

Gradients of ordinary training stay below five times their own norm in each layer of DenseNet-121
and ResNet-18, so this clips nobody but who cancels.
"""


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Bound on the relative error of a sum of so many products; inf where there is none."""
    error = terms * torch.finfo(dtype).eps / 2
    return error / (1 - error) if error < 1 else float("inf")


def block_norms(gradients: Tensor) -> Tensor:
    """L2 norms of blocks of stored gradients.

    Parameters
    ----------
    gradients : Tensor
        ``(P, n)`` a row for each patient.

    Returns
    -------
    Tensor
        ``(P, blocks)`` norms of at most :data:`BLOCK` numbers each.
    """
    length = gradients.shape[1]
    whole = length - length % BLOCK if length > BLOCK else 0
    blocks = gradients[:, :whole].reshape(len(gradients), whole // BLOCK, BLOCK)
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=2)
    if whole == length:
        return norms
    rest: Tensor = torch.linalg.vector_norm(gradients[:, whole:], dim=1, keepdim=True)
    return torch.cat([norms, rest], dim=1) if whole else rest


def product_norms(columns: Tensor, rows: Tensor, summed: int) -> tuple[Tensor, Tensor]:
    """Upper bounds on the norms of ``rows @ columnsᵀ`` as a float32 sum of products gives it.

    Parameters
    ----------
    columns, rows : Tensor
        ``(P, d, T)`` and ``(P, p, T)``, see :func:`fedward.dp.layers.product_of`.
    summed : int
        Products that the weighted sum adds up for each weight, of all patients together.

    Returns
    -------
    norms : Tensor
        ``(P, 1)``, float64.
    lengths : Tensor
        ``(P,)`` sums of the lengths of the products, float64; inf where a factor is too long to be
        scaled without underflow.
    """
    dtype = columns.dtype
    terms = columns.shape[1] + rows.shape[1] + columns.shape[2] ** 2 + 4
    a, b = columns.double(), rows.double()
    inner, outer = a.transpose(1, 2) @ a, b.transpose(1, 2) @ b
    long, wide = (gram.diagonal(dim1=1, dim2=2) for gram in (inner, outer))
    lengths = (long * wide).sqrt_().sum(1)
    largest = torch.maximum(long.amax(1), wide.amax(1))
    lengths = torch.where(largest < torch.finfo(dtype).max, lengths, torch.inf)
    squares = inner.mul_(outer).sum((1, 2)).clamp_(min=0)
    squares += gamma(terms, torch.float64) * lengths.square()
    return (squares.sqrt_() + gamma(summed + 2, dtype) * lengths).unsqueeze(1), lengths


def factors(
    norms: Sequence[Tensor],
    lengths: Sequence[Tensor],
    finite: Tensor,
    clipping_norm: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What each patient's gradient is multiplied with.

    Parameters
    ----------
    norms : sequence of Tensor
        ``(P, ...)`` norms of parts that make up a patient's gradient.
    lengths : sequence of Tensor
        ``(P,)`` of :func:`product_norms`.
    finite : Tensor
        ``(P,)`` whether everything else that is known of the patient is finite.
    clipping_norm : float
        C.
    dtype : torch.dtype
        Of the gradients.

    Returns
    -------
    weights : Tensor
        ``(P,)`` in [0, 1], of `dtype`.
    broken : Tensor
        ``(P,)`` whether the patient counts as zero because of something that is not finite.
    """
    patients = len(finite)
    error = gamma(BLOCK + patients + 8, dtype)  # of the blocks' norms and of the weighted sum
    total = torch.cat([norm.double() for norm in norms], dim=1).square_().sum(1).sqrt_()
    total *= 1 + error
    for length in lengths:
        total = torch.maximum(total, length / CANCELLING)
    broken = ~(torch.isfinite(total) & finite)
    exact = (clipping_norm / total).clamp_(max=1.0).masked_fill_(broken, 0.0)
    info = torch.finfo(dtype)
    weights = exact.mul_(1 - 2 * info.eps).to(dtype)
    return weights.masked_fill_(weights < info.tiny, 0.0), broken
