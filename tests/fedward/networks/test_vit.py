"""The vision transformer is MONAI's, and trains privately."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.nets import ViT
from networks import by_loop, check_gradients, images_for, sections, small_plan

from fedward.errors import PlanError
from fedward.models import build_model, split_at_trainable, trainable_names
from fedward.models.weights import load_initial
from fedward.plan import plan_from


def _monai(size: tuple[int, ...], patch: int) -> ViT:
    options = {"num_layers": 12, "num_heads": 1, "classification": True, "post_activation": ""}
    return ViT(1, size, patch, 8, 16, spatial_dims=len(size), **options)


@pytest.mark.parametrize(("side", "patch"), [(16, 8), (64, 16)])
def test_it_takes_monais_weights_and_gives_monais_output(
    side: int, patch: int, tmp_path: Any
) -> None:
    from hashlib import sha256

    theirs, path = _monai((side, side), patch).double().eval(), tmp_path / "w.pt"
    torch.save(theirs.state_dict(), path)
    weights = {"file": path.name, "sha256": sha256(path.read_bytes()).hexdigest()}
    plan = plan_from(sections("vit", side=side, channels=(8, 16), initial_weights=weights))
    ours = build_model(plan, 1).double().eval()
    report = load_initial(ours, plan, tmp_path)
    assert report.matched == tuple(ours.state_dict())
    assert all("norm_cross_attn" in name for name in report.unused)
    images = images_for(plan)
    assert torch.equal(ours(images), theirs(images)[0])


def test_volumes_train_privately() -> None:
    plan = small_plan("vit", 3)
    model, images = build_model(plan, 0).double(), images_for(plan)
    check_gradients(model, images, by_loop(model, images), "functorch")


def test_a_frozen_beginning_is_cut_off_block_by_block() -> None:
    plan = small_plan("vit")
    model, images = build_model(plan, 0).double(), images_for(plan)
    names = set(trainable_names(model, ["blocks.11.*", "norm.*", "classification_head.*"]))
    prefix, suffix = split_at_trainable(model, names)
    assert prefix is not None
    assert names == {name for name, _ in suffix.named_parameters()}
    assert torch.equal(suffix(prefix(images)), model(images))


@pytest.mark.parametrize(
    ("size", "fix"), [([30, 32], "multiple of 8"), ([64, 72], "multiple of 16")]
)
def test_sides_are_whole_patches(size: list[int], fix: str) -> None:
    plan = sections("vit", side=16)
    plan["preprocessing"]["size"] = size
    with pytest.raises(PlanError, match=rf"^preprocessing\.size: vit cuts the image.*{fix}"):
        plan_from(plan)


@pytest.mark.parametrize("channels", [(96, 128), (64,) * 3])
def test_widths_that_it_has_not_are_refused(channels: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"^model\.channels: vit takes two widths"):
        plan_from(sections("vit", channels=channels))
