"""UNETR is MONAI's but for its norms and in-place sums, and trains privately."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNETR
from networks import by_loop, check_gradients, images_for, sections, small_plan
from torch import nn

from fedward.dp.compat import replace
from fedward.errors import PlanError
from fedward.models import build_model
from fedward.plan import plan_from


def _without_norms(model: nn.Module) -> nn.Module:
    kinds = (nn.GroupNorm, nn.InstanceNorm2d, nn.InstanceNorm3d)
    replace(model, lambda one: nn.Identity() if isinstance(one, kinds) else one)
    return model.double().eval()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_it_computes_what_monais_does(dimensions: int) -> None:
    plan = small_plan("unetr", dimensions, side=32)
    theirs = _without_norms(UNETR(1, 3, (32,) * dimensions, 4, 8, 16, 1, spatial_dims=dimensions))
    ours, state = _without_norms(build_model(plan, 0)), theirs.state_dict()
    values = {
        name: state[name.removesuffix(".weight") if name not in state else name]
        for name in ours.state_dict()
    }
    ours.load_state_dict(values)
    images = images_for(plan, 1)
    assert torch.equal(ours(images), theirs(images))


def test_volumes_train_privately() -> None:
    plan = small_plan("unetr", 3)
    model, images = build_model(plan, 0).double(), images_for(plan)
    check_gradients(model, images, by_loop(model, images), "functorch")


def test_sides_are_whole_patches() -> None:
    with pytest.raises(PlanError, match=r"^preprocessing\.size: unetr cuts .* multiple of 16"):
        plan_from(sections("unetr", side=40))


@pytest.mark.parametrize("channels", [(4, 96, 16), (4, 8)])
def test_widths_that_it_has_not_are_refused(channels: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"^model\.channels: unetr takes three widths"):
        plan_from(sections("unetr", side=16, channels=channels))
