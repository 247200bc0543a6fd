"""Clipped sums of patients in one pass, against one backward pass per patient, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedward.dp import ghost_clipping
from fedward.dp.ghost_clipping import Book, backward, keep_books
from fedward.dp.layers import sampled
from fedward.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
OWNERS = ([0, 1, 2, 3], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0])


def _patients(model: nn.Module, images: Tensor, owners: Tensor) -> list[tuple[Tensor, ...]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = (images[owners == patient] for patient in owners.unique())
    return [torch.autograd.grad(_losses(model(own)).mean(), parameters) for own in rows]


def _losses(out: Tensor) -> Tensor:
    return out.square().flatten(1).sum(1)


def _check(model: nn.Module, images: Tensor, places: list[int]) -> None:
    model, images, owners = model.double(), images.double(), torch.tensor(places)
    gradients = _patients(model, images, owners)
    norms = [torch.cat([g.flatten() for g in own]).norm() for own in gradients]
    bound = float(torch.stack(norms).mean())
    weights = [min(1.0, bound / float(norm)) for norm in norms]
    wrapped = keep_books(sampled(model))
    backward(wrapped, _losses(wrapped(images)), owners, bound)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, own in zip(trained, zip(*gradients, strict=True), strict=True):
        expected = sum(weight * one for weight, one in zip(weights, own, strict=True))
        torch.testing.assert_close(parameter.grad, expected)
        assert parameter.grad is not None and not parameter.grad.requires_grad


@pytest.fixture(params=[0, 10**9], ids=["kept", "ghost"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers keep their gradients, or none whose gradient is a product does."""
    monkeypatch.setattr(ghost_clipping, "_PRODUCTS_PER_FLOAT", request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "kind", [nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d], ids=lambda k: k.__name__
)
def test_every_convolution(kind: Any, stride: int, groups: int, owners: list[int]) -> None:
    torch.manual_seed(0)
    axes, more = (2 if "2d" in kind.__name__ else 3), {}
    if "Transpose" in kind.__name__:
        more["output_padding"] = stride - 1
    first = (nn.Conv2d if axes == 2 else nn.Conv3d)(1, 4, 3, padding=1)
    layer = kind(4, 6, 3, stride=stride, padding=1, groups=groups, **more)
    _check(nn.Sequential(first, nn.Tanh(), layer), torch.randn(4, 1, *(5, 4, 3)[:axes]), owners)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("owners", OWNERS)
def test_narrow_kernels_norms_and_linear_layers(owners: list[int]) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 1, stride=2), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1, padding=1)]
    _check(
        nn.Sequential(*layers, nn.Linear(6, 3), nn.Flatten(), nn.Linear(72, 2)),
        torch.randn(4, 1, 8, 8),
        owners,
    )


def test_frozen_layers_stay_out() -> None:
    layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.GroupNorm(1, 2))
    layers[2].weight.requires_grad_(False)
    layers[3].bias.requires_grad_(False)
    _check(layers, torch.randn(4, 1, 8, 8), [0, 0, 1, 2])
    assert layers[2].weight.grad is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_patients_with_as_many_images_are_found(counts: list[int]) -> None:
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert Book(owners).each == (counts[0] if len(set(counts)) == 1 else 0)


def test_a_layer_without_a_way_is_refused() -> None:
    with pytest.raises(ModelError, match="convolutions, linear layers and group norms"):
        keep_books(nn.Sequential(nn.Conv2d(1, 2, 3), nn.PReLU()))
