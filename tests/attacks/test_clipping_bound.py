"""A coordinator chooses weights under which one patient moves the sum by more than C.

Its means: activations and back-propagated values that are huge and cancel, so that a norm from
products of positions comes out as rounding error or 0; numbers whose squares overflow or vanish
in float32; images of one patient that cancel each other; and batches of another size, in which
everybody else's values round differently.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NAMES, least_side, small_plan
from torch import Tensor, nn

from fedward.dp import ghost_clipping
from fedward.dp.accounting import Mechanism
from fedward.models import best_mode, build_model, sampled
from fedward.models.registry import GradSampleMode
from fedward.networks import MODELS
from fedward.plan.schema import ModelName
from fedward_client.training.private import PrivateStep

MODES: tuple[GradSampleMode, ...] = ("hooks", "functorch", "bookkeeping")
ROOM, BOUND = 4, 1.0 + 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def _summed(
    module: nn.Module,
    images: Tensor,
    mode: GradSampleMode,
    each: int,
    clipping_norm: float = 1.0,
    chunks: int = 1,
) -> Tensor:
    """The sum that noise is added to, float64; a patient whose images are NaN is not there."""
    module = module if mode == "functorch" else sampled(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    step = PrivateStep(
        module,
        torch.optim.SGD(trained, lr=1.0),
        Mechanism(0.0, 1.0, 1),
        clipping_norm,
        1,
        mode,
        None,
    )
    absent = torch.isnan(images).flatten(1).all(1)
    filled = images.masked_fill(absent.view(-1, *[1] * (images.ndim - 1)), 0.0)
    for number in range(chunks):
        part = slice(number * len(images) // chunks, (number + 1) * len(images) // chunks)
        logits = step.module(filled[part])
        wanted = torch.ones(logits.shape[0], *logits.shape[2:], dtype=torch.long)
        losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
        losses = losses.flatten(1).mean(1) if losses.ndim > 1 else losses
        owners = torch.arange(len(losses)) // each
        step.accumulate(losses, owners, last=number == chunks - 1, real=~absent[part])
    total = torch.cat([p.grad.double().flatten() for p in step.parameters if p.grad is not None])
    step.close()
    return total


def _moved(make: Callable[[], nn.Module], images: Tensor, *more: Any, **options: Any) -> float:
    """How far the sum moves when the first patient is left out; her place stays free."""
    each = more[1]
    without = images.clone()
    without[:each] = torch.nan
    there, gone = (_summed(make(), one, *more, **options) for one in (images, without))
    return float((there - gone).norm())


@pytest.mark.parametrize("each", [1, 2])
def test_positions_that_cancel(each: int) -> None:
    """The logits see only the difference of two huge, nearly equal positions."""
    for trial in range(30):
        torch.manual_seed(trial)
        net = nn.Sequential(
            nn.Conv2d(64, 64, 1, bias=False), nn.Flatten(), nn.Linear(128, 2, bias=False)
        )
        away = torch.randn(64)
        with torch.no_grad():
            net[0].weight.mul_(1e-3)  # type: ignore[operator]
            both = torch.stack([away, -away], 1).flatten()
            head = net[2].weight
            assert isinstance(head, Tensor)
            head[0], head[1] = both * 1e3, -both * 1e3
        net[2].weight.requires_grad_(False)
        near = torch.randn(64) * 1e4
        step = torch.randn(64) * 10 ** (torch.rand(1).item() * 3 - 1)
        image = torch.stack([near, near + step], -1).view(1, 64, 1, 2)
        moved = _summed(net, image.repeat(each, 1, 1, 1), "bookkeeping", each).norm()
        assert float(moved) <= BOUND, trial


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_squares_that_overflow_or_vanish(mode: GradSampleMode, scale: float) -> None:
    """Tiny activations before huge gradients, and the other way round, at the least C of a plan."""
    for clipping_norm in (1e-6, 1e-2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 2, bias=False))
        with torch.no_grad():
            net[1].weight.mul_(1 / scale)  # type: ignore[operator]
        net[1].weight.requires_grad_(False)
        image = torch.randn(1, 5, 32).mul(scale)
        make = functools.partial(_with_mean, net)
        moved = _summed(make(), image, mode, 1, clipping_norm).norm() / clipping_norm
        assert float(moved) <= BOUND
        # Products of factors beyond 1.8e19 count as zero; all else is clipped to C.
        assert float(moved) >= 0.9 or mode == "bookkeeping"


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def _with_mean(net: nn.Sequential) -> nn.Module:
    return nn.Sequential(*copy.deepcopy(net), _Mean())


def _side(name: ModelName) -> int:
    return 32 if name == "basicunet" else least_side(name)


@functools.cache
def _built(name: ModelName) -> nn.Module:
    return build_model(small_plan(name, side=_side(name)), 0).eval()


@torch.no_grad()
def _hostile(name: ModelName, pattern: str, power: float, seed: int) -> nn.Module:
    """A copy of the model with weights as a coordinator may send them."""
    model, rng = copy.deepcopy(_built(name)), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        sign = 2 * torch.rand((), generator=rng) - 1
        if pattern == "scaled":
            parameter.mul_(10.0 ** (power * sign))
        elif pattern == "cancelling":  # pairs of outputs that differ in the last digits only
            parameter.mul_(10.0 ** abs(power / 4))
            half = len(parameter) // 2
            parameter[:half] = -parameter[half : 2 * half] * (1 + 1e-6)
        elif pattern == "shifted" and parameter.ndim == 1:  # huge, nearly constant activations
            parameter.add_(10.0 ** abs(power / 3))
        elif pattern == "zero":
            parameter.mul_(float(sign > 0))
        elif pattern == "overflowing" and sign > 0.8:
            parameter.fill_(3e38)
    return model.train()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([n for n in get_args(ModelName) if n != "efficientnet-lite0"]),
    mode=st.sampled_from(MODES),
    pattern=st.sampled_from(["scaled", "cancelling", "shifted", "zero", "overflowing"]),
    power=st.floats(-30, 30),
    bright=st.sampled_from([1e-20, 1.0, 1e4, 1e19, float("inf")]),
    each=st.sampled_from([1, 2]),
    chunks=st.sampled_from([1, 2]),
    ghost=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_one_patient_moves_the_sum_by_c_at_most(
    name: ModelName,
    mode: GradSampleMode,
    pattern: str,
    power: float,
    bright: float,
    each: int,
    chunks: int,
    ghost: bool,
    seed: int,
) -> None:
    size, rng = _side(name), torch.Generator().manual_seed(seed)
    images = torch.randn(ROOM * each, 1, size, size, generator=rng)
    images[:each] *= bright
    images[0] = -images[each - 1] if each > 1 else images[0]
    make = functools.partial(_hostile, name, pattern, power, seed)
    if mode == "bookkeeping":  # where the network has a layer that it does not know: functorch
        mode = best_mode(_built(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ghost_clipping, "_PRODUCTS_PER_FLOAT", 10**9 if ghost else 32)
        moved = _moved(make, images, mode, each, chunks=chunks)
    assert math.isfinite(moved)
    assert moved <= BOUND


@pytest.mark.parametrize("pattern", ["scaled", "shifted", "overflowing"])
@pytest.mark.parametrize("name", [name for name in NAMES if MODELS[name].colours[0] == 1])
def test_one_patient_moves_the_sum_by_c_at_most_in_the_default_mode(
    name: ModelName, pattern: str
) -> None:
    """Each network by the way to its gradients that hospitals use."""
    size, rng = _side(name), torch.Generator().manual_seed(1)
    images = torch.randn(ROOM, 1, size, size, generator=rng)
    images[0] *= 1e4
    make = functools.partial(_hostile, name, pattern, 12.0, 3)
    moved = _moved(make, images, best_mode(_built(name)), 1)
    assert math.isfinite(moved)
    assert moved <= BOUND


@pytest.mark.parametrize("name", ["cnn", "resnet18", "densenet121", "unet", "efficientnet-b0"])
def test_nobody_changes_another_ones_values(name: ModelName) -> None:
    """In batches of one shape an image's values are the same in every bit, wherever it stands."""
    model = _built(name).train()
    size = _side(name)
    # SiLU's kernel treats the last numbers of a tensor apart, where 16 does not divide their count.
    count = 16 if name == "efficientnet-b0" else 8
    images = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(0))
    moved = torch.cat([torch.full_like(images[:1], 1e9), images[1:].flip(0)])
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    first, other = (_values(model, one) for one in (images, moved))
    for here, there in zip(first, other, strict=True):
        assert torch.equal(here[1:], there[1:].flip(0))


def _values(model: nn.Module, images: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [
        hook
        for layer in model.modules()
        if not list(layer.children())
        for hook in (
            layer.register_forward_hook(lambda *all_: found.append(all_[2].detach())),
            layer.register_full_backward_hook(lambda *all_: found.append(all_[2][0])),
        )
    ]
    model(images).square().flatten(1).sum(1).sum().backward()
    for hook in hooks:
        hook.remove()
    return [one for one in found if one.shape[0] == len(images)]
