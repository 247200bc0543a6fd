"""Per-sample gradients of each mode against one backward pass per sample, in float64."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from opacus.grad_sample.utils import wrap_model
from torch import Tensor, nn

from fedward.dp.ghost_clipping import backward, keep_books
from fedward.dp.layers import sampled
from fedward.models.registry import GRAD_SAMPLE_MODES
from fedward.plan.schema import ModelName

MODELS: tuple[ModelName, ...] = get_args(ModelName)
SMALL: dict[str, dict[str, Any]] = {
    **{name: {"channels": (4, 4, 8, 8)} for name in ("resnet18", "resnet34", "resnet50")},
    **{name: {"channels": (4, 8, 8)} for name in ("unet", "attention-unet")},
    "basicunet": {"channels": (4, 4, 8, 8, 8, 4)},
    "segresnet": {"channels": (4, 8, 16)},
    "cnn": {"channels": (4, 8)},
}
VOLUMES: tuple[ModelName, ...] = ("cnn", "resnet50", "unet", "segresnet", "attention-unet")
CELLS = [(n, 2, mode) for n in MODELS for mode in (*GRAD_SAMPLE_MODES[n], "sampled")] + [
    (n, 3, mode) for n in VOLUMES for mode in (*GRAD_SAMPLE_MODES[n], "sampled")
]
# PyTorch says so of every first layer: its input is an image, and images need no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def _weighted(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(out.shape[1:], generator=generator, dtype=out.dtype)
    return (out * weight).flatten(1).sum(1)


def _by_loop(model: nn.Module, images: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    losses = (_weighted(model(image[None])).sum() for image in images)
    rows = [torch.autograd.grad(loss, parameters) for loss in losses]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(("name", "dimensions", "mode"), CELLS)
def test_mode_gives_every_samples_gradient(
    plan_for: Any, built: Any, images_for: Any, name: ModelName, dimensions: int, mode: str
) -> None:
    size = (32, 32) if name == "basicunet" else None
    plan = plan_for(name, dimensions=dimensions, size=size, **SMALL.get(name, {}))
    model = built(plan, seed=0).double()
    images = images_for(plan, count=2).double()
    expected = _by_loop(model, images)
    if mode == "bookkeeping":
        _check_clipped_sum(model, images, expected)
        return
    if mode == "sampled":
        model = sampled(model)
    wrapped = wrap_model(model, "hooks" if mode == "sampled" else mode, loss_reduction="sum")
    torch.autograd.backward(_weighted(wrapped(images)).sum())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        scale = float(gradient.abs().max()) + 1e-12
        torch.testing.assert_close(parameter.grad_sample, gradient, rtol=1e-6, atol=1e-8 * scale)


def _check_clipped_sum(model: nn.Module, images: Tensor, expected: list[Tensor]) -> None:
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in expected]).norm(dim=0)
    bound = float(norms.mean())  # clips one image of the two
    wrapped = keep_books(sampled(model))
    backward(wrapped, _weighted(wrapped(images)), torch.arange(len(images)), bound)
    weights = (bound / norms).clamp(max=1.0)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        clipped, scale = torch.einsum("n,n...->...", weights, gradient), float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, clipped, rtol=1e-6, atol=1e-8 * scale + 1e-20)
