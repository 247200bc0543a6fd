"""Opacus' optimiser for clipped sums, with noise that withstands an attacker."""

from __future__ import annotations

from typing import Any

from opacus.optimizers import DPOptimizerFastGradientClipping

from fedward.dp.gaussian import GaussianNoise


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
