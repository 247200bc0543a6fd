"""One private step: bound what each patient adds to the gradient, then add noise.

Opacus gives the gradient of each image. Ours are the clipping and the noise: the patient is the
unit, so the images of one patient are averaged first; the bound holds whatever the weights and
images are (:mod:`fedward.models.clipping`), and so does the noise (:mod:`fedward.dp.gaussian`).
"""

from __future__ import annotations

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from fedward.dp.accounting import Mechanism
from fedward.dp.gaussian import GaussianNoise
from fedward.dp.ghost_clipping import SumOptimizer, backward, keep_books
from fedward.models.registry import GradSampleMode


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
        How to get at the gradients; ``bookkeeping`` on what :func:`fedward.dp.layers` gave.
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
        mode: GradSampleMode,
        noise: GaussianNoise,
    ) -> None:
        self.clipping_norm = clipping_norm
        self.module = _wrap(module, mode)
        self.optimizer = SumOptimizer(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=clipping_norm,
            expected_batch_size=mechanism.sampling_rate * patients,
            noise=noise,
        )
        self.parameters: list[nn.Parameter] = [p for p in module.parameters() if p.requires_grad]

    def accumulate(
        self, losses: Tensor, owners: Tensor, *, last: bool, real: Tensor | None = None
    ) -> bool:
        """Add one chunk of a step.

        Parameters
        ----------
        losses : Tensor
            ``(n,)`` loss of each image, computed through ``self.module``.
        owners : Tensor
            ``(n,)`` place of each image's patient in the chunk, from 0, ascending.
        last : bool
            Whether the step is complete with it.
        real : Tensor, optional
            ``(n,)`` bool; the others only fill the chunk up and add nothing. All without it.

        Returns
        -------
        bool
            Whether the noisy gradient now stands in ``grad``; call :meth:`apply` then.
        """
        backward(self.module, losses, owners, self.clipping_norm, real)
        return self._advance(last=last)

    def accumulate_nobody(self) -> bool:
        """A step for which no patient was drawn: noise alone, as the accounting assumes."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
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


def _wrap(
    module: nn.Module, mode: GradSampleMode
) -> GradSampleModule | GradSampleModuleFastGradientClipping:
    if mode == "bookkeeping":
        return keep_books(module)
    return GradSampleModule(module, loss_reduction="sum", force_functorch=mode == "functorch")
