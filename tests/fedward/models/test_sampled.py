"""The cheap layers: every option against one backward pass per sample, and plain without hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

import fedward.dp.ghost_clipping  # noqa: F401  # registers the layers at Opacus
from fedward.dp.layers import SampledConv2d, SampledGroupNorm, sampled

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def _check(layers: nn.Module, images: Tensor) -> None:
    layers, images = layers.double(), images.double()
    parameters = list(layers.parameters())
    losses = (layers(image[None]).square().sum() for image in images)
    rows = [torch.autograd.grad(loss, parameters) for loss in losses]
    wrapped = GradSampleModule(sampled(layers), loss_reduction="sum")
    torch.autograd.backward(wrapped(images).square().sum())
    for parameter, column in zip(parameters, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(parameter.grad_sample, torch.stack(column))  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
def test_any_convolution(
    kind: Any, kernel: int, stride: int, padding: int, dilation: int, groups: int, bias: bool
) -> None:
    assume(padding < kernel)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    if kind in (nn.ConvTranspose2d, nn.ConvTranspose3d) and stride > 1:
        options["output_padding"] = 1
    torch.manual_seed(0)
    axes = 2 if kind in (nn.Conv2d, nn.ConvTranspose2d) else 3
    first = (nn.Conv2d if axes == 2 else nn.Conv3d)(2, 4, 3, padding=1)
    layer = kind(4, 8, kernel, groups=groups, bias=bias, **options)
    _check(nn.Sequential(first, layer), torch.randn(3, 2, *(7, 6, 5)[:axes]))


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 0, 2)])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_many_weights_go_by_product(kind: Any, stride: int, padding: int, dilation: int) -> None:
    torch.manual_seed(0)
    wide = kind(128, 64, 3, stride=stride, padding=padding, dilation=dilation)
    _check(nn.Sequential(nn.Conv2d(1, 128, 1), wide), torch.randn(2, 1, 7, 6))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_a_linear_layer_over_any_positions(shape: tuple[int, ...]) -> None:
    _check(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), torch.randn(3, *shape))


def test_a_norm_of_which_only_the_shift_trains() -> None:
    norm = SampledGroupNorm(2, 4)
    norm.weight.requires_grad_(False)
    wrapped = GradSampleModule(norm, loss_reduction="sum")
    wrapped(torch.randn(3, 4, 5)).sum().backward()
    torch.testing.assert_close(norm.bias.grad_sample, torch.full((3, 4), 5.0))
    assert norm.statistics == []


def test_group_norm_far_from_zero() -> None:
    norm = nn.GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    _check(nn.Sequential(nn.Conv2d(1, 4, 1), norm), 50 + torch.randn(3, 1, 5, 5))


def test_a_step_without_patients_has_no_rows() -> None:
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 3))
    wrapped = GradSampleModule(sampled(layers), loss_reduction="sum")
    torch.autograd.backward(wrapped(torch.zeros(0, 1, 8, 8)).sum())
    for parameter in layers.parameters():
        assert parameter.grad_sample.shape == (0, *parameter.shape)  # type: ignore[attr-defined]


def test_without_hooks_the_layers_train_plainly() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 2, 3))
    images, parameters = torch.randn(2, 1, 8, 8), list(layers.parameters())
    expected = torch.autograd.grad(layers(images).square().sum(), parameters)
    sampled(layers)
    assert all(a is b for a, b in zip(layers.parameters(), parameters, strict=True))
    GradSampleModule(layers).remove_hooks()
    given_ = torch.autograd.grad(layers(images).square().sum(), parameters)
    for one, other in zip(given_, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_unusual_padding_stays_with_opacus() -> None:
    layers = sampled(
        nn.Sequential(
            nn.Conv2d(1, 1, 3, padding="same"),
            nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(1, 1, 3),
            nn.GroupNorm(1, 1),
        )
    )
    kinds = [type(layer) for layer in layers.children()]
    assert kinds == [nn.Conv2d, nn.Conv2d, SampledConv2d, SampledGroupNorm]
