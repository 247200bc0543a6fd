"""Detection in training: its loss, a patient's bound with shared heads, and a study's end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data.box_utils import box_iou, box_pair_giou
from torch import Tensor, nn

from fedward.dp.accounting import Mechanism
from fedward.dp.gaussian import GaussianNoise
from fedward.dp.keystream import derive_key
from fedward.models import build_model, sampled, to_arrays
from fedward.models.registry import GradSampleMode, best_mode
from fedward.plan import Plan
from fedward.tasks.detection import MOST_BOXES, DetectionCounts, anchors
from fedward_client.data.sample import PreparedSite
from fedward_client.training.losses import build_loss
from fedward_client.training.private import PrivateStep
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

CPU = torch.device("cpu")
SIZE = (32, 48)
Make = Callable[..., Plan]


@pytest.fixture(name="plan")
def plan_fixture(make_plan: Make) -> Plan:
    """Boxes of two classes."""
    return plan_of(make_plan)


def plan_of(make_plan: Make, **changes: Any) -> Plan:
    return make_plan(
        **{
            "task": {"kind": "detection", "classes": ["dot", "bar"]},
            "preprocessing": {"size": list(SIZE)},
            "model": {"name": "retinanet", "channels": [4, 8, 8, 8, 8, 8]},
            "training": {"loss": "focal_giou", "batch_size": 4},
            "metrics": {"report": ["map50", "box_f1"], "primary": "map50"},
            **changes,
        }
    )


def scene(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images with bright boxes in them, the second class dark; the third has none."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.normal(0, 0.1, (count, 1, *SIZE)).astype(np.float32))
    targets = torch.zeros(count, MOST_BOXES, 5)
    for k in range(count):
        for row in range(0 if k == 2 else 1 + k % 3):
            low = rng.integers(0, 16, 2)
            high = low + rng.integers(8, 16, 2)
            which = int(rng.integers(0, 2))
            images[k, 0, low[0] : high[0], low[1] : high[1]] = 1.0 - 2 * which
            targets[k, row] = torch.tensor([*low, *high, which + 1])
    return images, targets


def test_an_images_loss_depends_on_no_other_image(plan: Plan) -> None:
    model, loss = build_model(plan, 0), build_loss(plan, CPU)
    images, targets = scene(6)
    together = loss(model(images), targets)
    assert together.shape == (6,) and (together > 0).all()
    for k in range(6):
        alone = loss(model(images[k : k + 1]), targets[k : k + 1])
        torch.testing.assert_close(alone[0], together[k], rtol=1e-5, atol=1e-6)


def test_the_loss_is_focal_and_giou_over_a_constant(plan: Plan) -> None:
    """Written out, with MONAI's boxes, for the anchors that the matcher chose."""
    loss: Any = build_loss(plan, CPU)
    images, targets = scene(2)
    outputs = build_model(plan, 0)(images).detach()
    values = loss(outputs, targets)
    for row in range(2):
        truth = targets[row][targets[row, :, 4] > 0]
        taken = loss.match(truth[:, :4])
        total = 0.0
        for a, out in enumerate(outputs[row]):
            logits, box = out[:2], out[2:]
            for k in range(2):
                p = torch.sigmoid(logits[k]).item()
                hit = taken[a] >= 0 and truth[taken[a], 4] == k + 1
                total -= 0.25 * (1 - p) ** 2 * math.log(p) if hit else 0.75 * p**2 * math.log(1 - p)
            if taken[a] >= 0:
                own = truth[taken[a] : taken[a] + 1, :4]
                total += 2 * (1 - float(box_pair_giou(box[None], own)))
        assert float(values[row]) == pytest.approx(total / 32, rel=1e-4)


def test_anchors_take_boxes_as_atss_says_and_every_box_has_one(plan: Plan) -> None:
    """Written out anchor by anchor (Zhang et al. 2020, algorithm 1)."""
    loss: Any = build_loss(plan, CPU)
    boxes = torch.tensor([[1, 1, 3, 3], [4, 4, 20, 30], [6, 6, 22, 32], [0, 0, 32, 48.0]])
    all_ = torch.from_numpy(anchors(SIZE)).float()
    shared = box_iou(boxes, all_).numpy()
    middles = ((all_[:, :2] + all_[:, 2:]) / 2).numpy()
    expected = np.full(len(all_), -1)
    for k, box in enumerate(boxes.numpy()):
        away = np.linalg.norm(middles - (box[:2] + box[2:]) / 2, axis=1)
        near: list[int] = []
        for start, end in ((0, 24), (24, 30), (30, 32), (32, 33)):
            near += (start + np.argsort(away[start:end], kind="stable")[:9]).tolist()
        least = shared[k, near].mean() + shared[k, near].std(ddof=1)
        for a in near:
            inside = (middles[a] > box[:2]).all() and (middles[a] < box[2:]).all()
            better = expected[a] < 0 or shared[k, a] > shared[expected[a], a]
            if inside and shared[k, a] >= least and better:
                expected[a] = k
    for k in set(range(4)) - set(expected.tolist()):
        expected[shared[k].argmax()] = k
    taken = loss.match(boxes)
    assert taken.tolist() == expected.tolist()
    assert set(taken.tolist()) == {-1, 0, 1, 2, 3}
    assert (loss.match(boxes[:0]) == -1).all()


# Privacy by patient.


def private_sum(
    model: nn.Module, plan: Plan, images: Tensor, targets: Tensor, owners: list[int], norm: float
) -> list[Tensor]:
    """The clipped sum of a step without noise."""
    mode: GradSampleMode = best_mode(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mechanism = Mechanism(noise_multiplier=0.0, sampling_rate=1.0, steps=1)
    noise = GaussianNoise(derive_key(1))
    step = PrivateStep(sampled(model), optimizer, mechanism, norm, 1, mode, noise)
    losses = build_loss(plan, CPU)(step.module(images), targets)
    step.accumulate(losses, torch.tensor(owners), last=True)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    step.close()
    return gradients


def of_patients(
    plan: Plan, images: Tensor, targets: Tensor, owners: list[int], norm: float
) -> list[list[Tensor]]:
    """The clipped gradient of each patient, by a backward pass of its own through all levels."""
    model, loss = build_model(plan, 0), build_loss(plan, CPU)
    clipped = []
    for patient in sorted(set(owners)):
        rows = [k for k, owner in enumerate(owners) if owner == patient]
        gradients = torch.autograd.grad(
            loss(model(images[rows]), targets[rows]).mean(), list(model.parameters())
        )
        length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        clipped.append([min(1.0, norm / length) * g for g in gradients])
    return clipped


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("norm", [0.3, 1e4])
def test_shared_heads_add_up_within_each_patient_before_clipping(plan: Plan, norm: float) -> None:
    images, targets = scene(5)
    owners = [0, 0, 1, 2, 2]
    found = private_sum(build_model(plan, 0), plan, images, targets, owners, norm)
    expected = of_patients(plan, images, targets, owners, norm)
    for parameter, parts in zip(found, zip(*expected, strict=True), strict=True):
        total = torch.stack(parts).sum(dim=0)
        scale = float(total.abs().max()) + 1e-9
        torch.testing.assert_close(parameter, total, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_one_patient_changes_the_sum_by_the_clipping_norm_at_most(plan: Plan) -> None:
    """Whatever one patient brings: other images, no boxes, all boxes, or numbers that are none."""
    images, targets = scene(4)
    norm, owners = 0.02, [0, 1, 2, 3]
    without = private_sum(build_model(plan, 0), plan, images[:3], targets[:3], owners[:3], norm)
    crowded = targets[3:].clone()
    crowded[0] = torch.tensor([2.0, 3.0, 30.0, 40.0, 1.0])
    for image, truth in (
        (images[3:], targets[3:]),
        (images[3:] * 1e3, targets[3:]),
        (images[3:], torch.zeros_like(targets[3:])),
        (images[3:], crowded),
        (images[3:] * torch.inf, targets[3:]),
    ):
        inputs, boxes = torch.cat([images[:3], image]), torch.cat([targets[:3], truth])
        found = private_sum(build_model(plan, 0), plan, inputs, boxes, owners, norm)
        moved = math.sqrt(
            sum(float((a - b).double().square().sum()) for a, b in zip(found, without, strict=True))
        )
        assert moved <= norm * (1 + 1e-4)
        assert moved > 0.99 * norm or not torch.isfinite(image).all() or not truth.any()


# A site.


def site_of(images: Tensor, targets: Tensor) -> PreparedSite:
    count = len(images)
    part = np.arange(count) % 4
    return PreparedSite(
        name="site-1",
        images=images.numpy(),
        targets=targets.numpy(),
        patients=np.arange(count),
        split={
            "train": np.flatnonzero(part < 2),
            "validation": np.flatnonzero(part == 2),
            "test": np.flatnonzero(part == 3),
        },
        spacing=np.ones((count, 2), np.float32),
    )


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("private", [False, True])
def test_a_round_trains_and_counts(make_plan: Make, make_order: Any, private: bool) -> None:
    privacy = {
        "mechanism": "dp-sgd",
        "epsilon": 8.0,
        "delta": 1e-3,
        "clipping_norm": 1.0,
        "sampling_rate": 0.5,
    }
    augmentation = {"flip": ["horizontal", "vertical"], "rotate": 10, "scale": 0.1, "noise": 0.1}
    plan = plan_of(
        make_plan,
        preprocessing={"size": list(SIZE), "augmentation": augmentation},
        **({"privacy": privacy} if private else {}),
    )
    site = site_of(*scene(16))
    trainer = Trainer(plan, site, Runtime())
    arrays = to_arrays(build_model(plan, 0))
    update, outcome = trainer.train(arrays, make_order(plan))
    assert outcome.steps and all(np.isfinite(value).all() for value in update.values())
    assert any(not np.array_equal(value, arrays[name]) for name, value in update.items())
    counts, told = trainer.evaluate(arrays | update, make_order(plan, round=0, part="test"))
    made = DetectionCounts.from_arrays(counts)
    assert made.images == told.images == 4
    assert made.boxes[0].sum() == (site.targets[3::4, :, 4] > 0).sum()
