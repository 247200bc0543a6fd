"""Losses per image, against numpy written out, and independent of the other images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedward.plan import Plan
from fedward_client.training.losses import build_loss

Make = Callable[..., Any]
CPU = torch.device("cpu")
WEIGHTS = (0.5, 2.0, 3.0)
SHAPES: dict[str, tuple[int, ...]] = {"2d": (5, 4), "3d": (5, 4, 3)}


def plan_of(make_plan: Make, loss: str, weights: Any = None, **training: Any) -> Plan:
    segmentation, multi = loss.startswith("dice"), loss == "bce"
    task = {"classes": ["a", "b", "c"]}
    if segmentation:
        task = {"kind": "segmentation", "classes": ["b", "c"]}  # type: ignore[dict-item]
    if multi:
        task["multi_label"] = True  # type: ignore[assignment]
    changes: dict[str, Any] = {"task": task, "training": {"loss": loss, **training}}
    if weights is not None:
        changes["training"]["class_weights"] = list(weights)
    if segmentation:
        changes |= {
            "model": {"name": "unet", "channels": None},
            "metrics": {"report": ["dice"], "primary": "dice"},
        }
    made: Plan = make_plan(**changes)
    return made


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def logits_of(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(make_plan: Make, smoothing: float) -> None:
    plan = plan_of(make_plan, "cross_entropy", label_smoothing=smoothing)
    logits, targets = logits_of(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    values = build_loss(plan, CPU)(logits, targets).numpy()
    log = np.log(softmax(logits.numpy()))
    hot = np.eye(3)[targets] * (1 - smoothing) + smoothing / 3
    np.testing.assert_allclose(values, -(hot * log).sum(axis=1), rtol=1e-9)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_weights_scale_each_image_by_its_class(make_plan: Make, loss: str, weights: Any) -> None:
    logits, targets = logits_of(6, 3).float(), torch.tensor([0, 1, 2, 0, 1, 2])
    values = build_loss(plan_of(make_plan, loss, weights), CPU)(logits, targets).numpy()
    true = softmax(logits.double().numpy())[np.arange(6), targets]
    expected = -np.log(true) * ((1 - true) ** 2 if loss == "focal" else 1)
    expected *= np.array(weights or (1, 1, 1))[targets]
    np.testing.assert_allclose(values, expected, rtol=1e-4)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_binary_cross_entropy_is_the_mean_over_the_labels(make_plan: Make, weights: Any) -> None:
    logits, flags = logits_of(5, 3).float(), torch.tensor(np.arange(15).reshape(5, 3) % 2)
    values = build_loss(plan_of(make_plan, "bce", weights), CPU)(logits, flags).numpy()
    p, y = 1 / (1 + np.exp(-logits.double().numpy())), flags.numpy()
    each = -(y * np.log(p) + (1 - y) * np.log(1 - p)) * np.array(weights or (1, 1, 1))
    np.testing.assert_allclose(values, each.mean(axis=1), rtol=1e-4)


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("loss", ["dice_ce", "dice_focal"])
def test_segmentation(make_plan: Make, loss: str, weights: Any, size: tuple[int, ...]) -> None:
    logits = logits_of(4, 3, *size).float()
    targets = torch.from_numpy(np.random.default_rng(2).integers(0, 3, (4, *size)).astype(np.uint8))
    values = build_loss(plan_of(make_plan, loss, weights), CPU)(logits, targets).numpy()
    scale = np.array(weights or (1.0, 1.0, 1.0))
    for image in range(4):
        p = softmax(logits[image : image + 1].double().numpy())[0].reshape(3, -1)
        y = np.eye(3)[targets[image].numpy().ravel()].T
        dice = 1 - (2 * (p * y).sum(1) + 1) / ((p + y).sum(1) + 1)
        true = (p * y).sum(axis=0)
        each = -np.log(true) * ((1 - true) ** 2 if loss == "dice_focal" else 1)
        expected = dice[1:].mean() + (each * (scale[:, None] * y).sum(axis=0)).mean()
        assert values[image] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "bce", "dice_ce", "dice_focal"])
def test_an_images_loss_does_not_depend_on_the_others(make_plan: Make, loss: str) -> None:
    function, size = build_loss(plan_of(make_plan, loss, WEIGHTS), CPU), (6, 6)
    several = loss == "bce"
    shape = size if loss.startswith("dice") else (3,) if several else ()
    logits = logits_of(5, 3, *(size if loss.startswith("dice") else ())).float().requires_grad_()
    high = 2 if several else 3
    targets = torch.from_numpy(np.random.default_rng(3).integers(0, high, (5, *shape)))
    together = function(logits, targets)
    assert together.shape == (5,)
    for image in range(5):
        one = slice(image, image + 1)
        alone = function(logits[one], targets[one])
        torch.testing.assert_close(alone[0], together[image], rtol=1e-5, atol=1e-6)
        gradient = torch.autograd.grad(together[image], logits, retain_graph=True)[0]
        assert gradient[image].abs().sum() > 0
        assert not np.delete(gradient.numpy(), image, axis=0).any()


def test_an_image_without_foreground_has_a_finite_loss(make_plan: Make) -> None:
    function = build_loss(plan_of(make_plan, "dice_ce"), CPU)
    sure = torch.zeros(2, 3, 4, 4)
    sure[:, 0] = 30.0
    values = function(sure, torch.zeros(2, 4, 4, dtype=torch.uint8))
    assert torch.isfinite(values).all()
    assert float(values.max()) < 1e-3
