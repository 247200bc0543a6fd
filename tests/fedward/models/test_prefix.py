"""A cut model gives what the whole one gives, and trains the whole one's parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import CLASSIFIERS, DETECTORS, SEGMENTERS, least
from opacus.grad_sample import GradSampleModule
from torch import nn

from fedward.models.arrays import freeze, trainable_names
from fedward.models.prefix import Chain, split_at_trainable
from fedward.networks import MODELS
from fedward.plan.schema import ModelName


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_suffix_of_prefix_is_the_model(
    plan_for: Any, built: Any, images_for: Any, name: ModelName, share: float
) -> None:
    plan = plan_for(name, **least(name))
    model, images = built(plan, 0), images_for(plan)
    names = [n for n, _ in model.named_parameters()]
    trainable = set(names[round(share * (len(names) - 1)) :])
    prefix, suffix = split_at_trainable(model, trainable)
    if share == 0:
        assert prefix is None and suffix is model
        return
    assert prefix is not None
    assert not trainable & {n for n, _ in prefix.named_parameters()}
    assert torch.equal(suffix(prefix(images)), model(images))
    parameters = dict(model.named_parameters())
    assert trainable <= set(dict(suffix.named_parameters()))
    assert all(parameters[n] is p for n, p in suffix.named_parameters())


def test_lite0_cuts_block_by_block(plan_for: Any, built: Any) -> None:
    model = built(plan_for("efficientnet-lite0"), 0)
    prefix, suffix = split_at_trainable(model, trainable_names(model, ["_blocks.5.*", "_fc.*"]))
    assert isinstance(prefix, Chain) and isinstance(suffix, Chain)
    assert prefix.order[-1] == "_blocks.4.10"
    assert suffix.order[:2] == ("_blocks.5.11", "_blocks.5.12")


def test_dropout_ends_the_prefix(plan_for: Any, built: Any) -> None:
    model = built(plan_for("densenet121", dropout=0.2), 0)
    prefix, _ = split_at_trainable(model, trainable_names(model, ["class_layers.*"]))
    assert isinstance(prefix, Chain)
    assert prefix.order == ("features.conv0", "features.norm0", "features.relu0", "features.pool0")


@pytest.mark.parametrize("name", sorted(SEGMENTERS | DETECTORS))
def test_a_unet_stays_whole(plan_for: Any, built: Any, name: ModelName) -> None:
    model = built(plan_for(name, **least(name)), 0)
    prefix, suffix = split_at_trainable(model, trainable_names(model, [MODELS[name].head]))
    assert prefix is None and suffix is model


def test_nothing_to_train_is_no_cut(plan_for: Any, built: Any) -> None:
    model = built(plan_for(), 0)
    assert split_at_trainable(model, set()) == (None, model)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_training_the_suffix_privately_trains_the_model(
    plan_for: Any, built: Any, images_for: Any
) -> None:
    plan = plan_for("efficientnet-lite0")
    model, images = built(plan, 0), images_for(plan)
    names = trainable_names(model, ["_conv_head.*", "_fc.*"])
    freeze(model, names)
    prefix, suffix = split_at_trainable(model, names)
    assert prefix is not None
    with torch.no_grad():
        features = prefix(images)
    out = GradSampleModule(suffix)(features)
    torch.autograd.backward(nn.functional.cross_entropy(out, torch.tensor([0, 1, 0])))
    sampled = {
        n for n, p in model.named_parameters() if getattr(p, "grad_sample", None) is not None
    }
    assert sampled == set(names)
