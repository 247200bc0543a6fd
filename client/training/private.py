"""One private step: bound what each patient adds to the gradient, then add noise.

Opacus computes the gradient of each image and clips. Ours is what makes the patient the unit (the
images of one patient are averaged before the clipping), and the noise.
"""

from __future__ import annotations

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from fedward.dp import GaussianNoise
from fedward.models.bookkeeping import backward, keep_books
from fedward.models.noised import NoisedOptimizer, SumOptimizer
from fedward.models.registry import GradSampleMode
from fedward.privacy import Mechanism

Mode = GradSampleMode
# Modes that put the clipped sum itself into ``grad``, so that no image's gradient is kept.
_SUMMED: tuple[Mode, ...] = ("ghost", "bookkeeping")


class PrivateStep:
    """Turns per-image losses into private optimiser steps.

    Parameters
    ----------
    module : nn.Module
        What trains; its frozen parameters must not require gradients.
    optimizer : torch.optim.Optimizer
        Over the trainable parameters.
    mechanism : Mechanism
        Noise and sampling rate.
    clipping_norm : float
        L2 bound on what one patient adds.
    patients : int
        Training patients of the site; with the rate they give the divisor of the summed gradient,
        which must not depend on how many were drawn.
    mode : str
        How to get at the gradients; ``ghost`` only with one image per patient, ``hooks`` and
        ``bookkeeping`` on what :func:`fedward.models.sampled` gave.
    noise : GaussianNoise
        Source of the noise.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        mechanism: Mechanism,
        clipping_norm: float,
        patients: int,
        mode: Mode,
        noise: GaussianNoise,
    ) -> None:
        self.mode = mode
        self.module = _wrap(module, mode, clipping_norm)
        kind = SumOptimizer if mode in _SUMMED else NoisedOptimizer
        self.optimizer = kind(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=clipping_norm,
            expected_batch_size=mechanism.sampling_rate * patients,
            noise=noise,
        )
        self.parameters: list[nn.Parameter] = [p for p in module.parameters() if p.requires_grad]

    def accumulate(self, losses: Tensor, owners: Tensor, *, last: bool) -> bool:
        """Add one chunk of a step.

        Parameters
        ----------
        losses : Tensor
            ``(n,)`` loss of each image, computed through ``self.module``.
        owners : Tensor
            ``(n,)`` place of each image's patient in the chunk, from 0, ascending.
        last : bool
            Whether the step is complete with it.

        Returns
        -------
        bool
            Whether the noisy gradient now stands in ``grad``; call :meth:`apply` then.
        """
        if self.mode == "bookkeeping":
            backward(self.module, losses, owners)
        elif self.mode == "ghost":
            DPTensorFastGradientClipping(self.module, self.optimizer, losses, "sum").backward()
        else:
            torch.autograd.backward(losses.sum())
            self._average_by_patient(owners)
        return self._advance(last=last)

    def accumulate_nobody(self) -> bool:
        """A step for which no patient was drawn: noise alone, as the accounting assumes."""
        for parameter in self.parameters:
            if self.mode in _SUMMED:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        return self._advance(last=True)

    def apply(self) -> None:
        """Take the optimiser's step with the noisy gradient and clear it."""
        self.optimizer.original_optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Take Opacus' hooks off the model again."""
        self.module.to_standard_module()

    def _advance(self, *, last: bool) -> bool:
        self.optimizer.signal_skip_step(do_skip=not last)
        if self.optimizer.pre_step():
            return True
        self.optimizer.zero_grad(set_to_none=True)
        return False

    def _average_by_patient(self, owners: Tensor) -> None:
        counts = torch.bincount(owners)
        if len(counts) == len(owners):
            return
        for parameter in self.parameters:
            images: Tensor = parameter.grad_sample  # type: ignore[attr-defined]
            summed = images.new_zeros((len(counts), *images.shape[1:])).index_add_(
                0, owners, images
            )
            shape = (-1, *[1] * (images.ndim - 1))
            parameter.grad_sample = summed / counts.to(images.dtype).view(shape)  # type: ignore[attr-defined]


def _wrap(
    module: nn.Module, mode: Mode, clipping_norm: float
) -> GradSampleModule | GradSampleModuleFastGradientClipping:
    if mode == "bookkeeping":
        return keep_books(module, clipping_norm)
    if mode == "ghost":
        return GradSampleModuleFastGradientClipping(
            module, loss_reduction="sum", max_grad_norm=clipping_norm, use_ghost_clipping=True
        )
    return GradSampleModule(module, loss_reduction="sum", force_functorch=mode == "functorch")
