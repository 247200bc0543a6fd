"""Every model of the plan: builds, fits its plan, is private by construction, follows its seed."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from networks import DETECTORS, SEGMENTERS
from opacus.validators import ModuleValidator
from torch import nn

from fedward.errors import PlanError
from fedward.models.registry import build_model
from fedward.networks import MODELS as SPECS
from fedward.plan.schema import ModelName

MODELS: tuple[ModelName, ...] = get_args(ModelName)
CELLS = [(name, dims) for dims in (2, 3) for name in MODELS if dims in SPECS[name].dimensions]
RESNETS = ("resnet18", "resnet34", "resnet50")
CONVOLVING = ("unet", "basicunet", "segresnet", "attention-unet")


def _small(name: str) -> dict[str, Any]:
    widths = SPECS[name].widths
    return {"channels": widths.least} if widths and name not in ("cnn", *CONVOLVING) else {}


@pytest.mark.parametrize(("name", "dimensions"), CELLS)
def test_model_fits_its_plan_and_is_private(
    plan_for: Any, built: Any, images_for: Any, name: ModelName, dimensions: int
) -> None:
    plan = plan_for(name, dimensions=dimensions, classes=3, **_small(name))
    model, images = built(plan, seed=0), images_for(plan, count=2)
    out = model(images)
    outputs = 4 if name in SEGMENTERS else 3
    shape = (outputs, *(images.shape[2:] if name in SEGMENTERS else ()))
    if name in DETECTORS:  # 16 x 16: 4 places at stride 8, one at each of the other three
        shape = (7, 3 + 2 * dimensions)
    assert out.shape == (2, *shape)
    assert torch.isfinite(out).all()
    assert torch.equal(out, model(images)), "something is random although dropout is 0"
    ModuleValidator.validate(model, strict=True)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert not any(getattr(m, "inplace", False) for m in model.modules())
    assert model.training and all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_weights_follow_the_seed_and_leave_the_random_state(
    plan_for: Any, built: Any, name: ModelName
) -> None:
    plan = plan_for(name, **_small(name))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, again, other = (
        build_model(plan, 0).state_dict(),
        built(plan, 0).state_dict(),
        built(plan, 1).state_dict(),
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("cnn", (4, 8)),
        ("resnet18", (4, 8, 8, 16)),
        ("unet", (4, 8, 12)),
        ("basicunet", (4, 4, 8, 8, 16, 4)),
        ("segresnet", (4, 8, 16)),
        ("attention-unet", (4, 8)),
    ],
)
def test_channels_are_used(
    plan_for: Any, built: Any, name: ModelName, channels: tuple[int, ...]
) -> None:
    default = built(plan_for(name, size=(32, 32)), 0)
    chosen = built(plan_for(name, size=(32, 32), channels=channels), 0)
    widths = [m.out_channels for m in chosen.modules() if isinstance(m, nn.Conv2d)]
    assert set(channels) <= set(widths)
    assert sum(p.numel() for p in chosen.parameters()) < sum(
        p.numel() for p in default.parameters()
    )


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("densenet121", (4, 8)),
        ("efficientnet-b0", (4, 8)),
        ("efficientnet-lite0", (4, 8)),
        ("resnet34", (4, 8, 8)),
        ("basicunet", (4, 8)),
        ("segresnet", (4, 8, 24)),
    ],
)
def test_channels_without_a_place_are_refused(
    plan_for: Any, name: ModelName, channels: tuple[int, ...]
) -> None:
    with pytest.raises(PlanError, match=r"^model\.channels: .+ Remove|Give|Change"):
        build_model(plan_for(name, size=(32, 32), channels=channels), 0)


@pytest.mark.parametrize("name", [name for name in MODELS if SPECS[name].dropout])
def test_dropout_acts_in_training_only(
    plan_for: Any, built: Any, images_for: Any, name: ModelName
) -> None:
    plan = plan_for(name, dropout=0.5, **_small(name))
    model, images = built(plan, 0), images_for(plan)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", [name for name in MODELS if not SPECS[name].dropout])
def test_dropout_without_a_place_is_refused(plan_for: Any, name: ModelName) -> None:
    with pytest.raises(PlanError, match="has no dropout"):
        build_model(plan_for(name, dropout=0.1), 0)


@pytest.mark.parametrize("size", [(45, 34)])
@pytest.mark.parametrize("name", ["cnn", "efficientnet-b0", "efficientnet-lite0"])
def test_odd_sizes_keep_their_place(
    plan_for: Any, built: Any, images_for: Any, name: ModelName, size: tuple[int, int]
) -> None:
    plan = plan_for(name, size=size)
    assert built(plan, 0)(images_for(plan, count=1)).shape == (1, 2)


def test_a_size_that_the_model_cannot_take_is_refused(plan_for: Any) -> None:
    with pytest.raises(
        PlanError, match=r"densenet121 cannot take images of this size \(got 16x16\)"
    ):
        build_model(plan_for("densenet121", size=(16, 16)), 0)


def test_default_cnn_is_small(plan_for: Any, built: Any) -> None:
    model = built(plan_for("cnn", size=(28, 28)), 0)
    assert sum(p.numel() for p in model.parameters()) < 26_000
