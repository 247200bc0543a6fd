"""Swin UNETR is MONAI's but for its norms and in-place sums, and trains privately."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SwinUNETR
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


@pytest.mark.parametrize(("dimensions", "side"), [(2, 96), (3, 32)])
def test_it_computes_what_monais_does(dimensions: int, side: int) -> None:
    """With whole and padded windows, shifted and not."""
    plan = small_plan("swin-unetr", dimensions, side=side)
    theirs = _without_norms(SwinUNETR(1, 3, feature_size=12, spatial_dims=dimensions))
    ours, state = _without_norms(build_model(plan, 0)), theirs.state_dict()
    values = {
        name: state[name.removesuffix(".weight") if name not in state else name]
        for name in ours.state_dict()
    }
    ours.load_state_dict(values)
    images = images_for(plan, 2)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-12, atol=1e-12)


def test_volumes_train_privately() -> None:
    plan = small_plan("swin-unetr", 3)
    model, images = build_model(plan, 0).double(), images_for(plan)
    check_gradients(model, images, by_loop(model, images), "functorch")


def test_sides_can_be_halved_five_times() -> None:
    with pytest.raises(PlanError, match=r"^preprocessing\.size: .* 5 times.* multiple of 32"):
        plan_from(sections("swin-unetr", side=48))


@pytest.mark.parametrize("channels", [(16, 32, 64, 128, 256), (12, 24, 48), (12, 24, 48, 96, 96)])
def test_widths_that_it_has_not_are_refused(channels: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"^model\.channels: swin-unetr takes five widths"):
        plan_from(sections("swin-unetr", side=32, channels=channels))
