"""A coordinator chooses weights under which one patient's gradient alone is not finite.

If that patient's NaN spread, "refused" would mean "she was drawn". What must happen instead: she
counts as zero, everybody else's part stays as it was, and an update leaves either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedward.dp import ghost_clipping
from fedward.dp.accounting import Mechanism
from fedward.models import build_model, sampled, to_arrays
from fedward.models.registry import GradSampleMode
from fedward.plan import Plan
from fedward.protocol import RoundOrder
from fedward_client.data.sample import PreparedSite
from fedward_client.training.private import PrivateStep
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

MODES: tuple[GradSampleMode, ...] = ("hooks", "functorch", "bookkeeping")
HUGE = 3e38
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def _gate() -> nn.Module:
    """A network whose first pixel, where it is bright, overflows; the others never see it."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    with torch.no_grad():
        module[0].weight[0] = HUGE  # type: ignore[operator]
        module[0].bias[0] = -HUGE  # type: ignore[operator]  # inf - inf where the pixel is lit
    return module


def _summed(mode: GradSampleMode, images: Tensor, owners: list[int]) -> list[Tensor]:
    module = _gate()
    module = module if mode == "functorch" else sampled(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    step = PrivateStep(
        module, torch.optim.SGD(trained, lr=1.0), Mechanism(0.0, 1.0, 1), 1.0, 1, mode, None
    )
    losses = nn.functional.cross_entropy(
        step.module(images), torch.ones(len(images), dtype=torch.long), reduction="none"
    )
    step.accumulate(losses, torch.tensor(owners), last=True)
    gradients = [p.grad.clone() for p in step.parameters if p.grad is not None]
    step.close()
    return gradients


@pytest.mark.parametrize("ghost", [False, True], ids=["kept", "ghost"])
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [10.0, float("nan"), float("inf")])
def test_a_broken_patient_counts_as_zero_and_no_other_part_changes(
    monkeypatch: pytest.MonkeyPatch, mode: GradSampleMode, each: int, value: float, ghost: bool
) -> None:
    monkeypatch.setattr(ghost_clipping, "_PRODUCTS_PER_FLOAT", 10**9 if ghost else 0)
    torch.manual_seed(1)
    images = torch.zeros(4 * each, 1, 4, 4)
    images[:, :, 2:] = torch.randn(4 * each, 1, 2, 4).abs() * 1e-30
    owners = [i // each for i in range(4 * each)]
    victim = images.clone()
    victim[each] = value  # one image of the second patient is enough
    assert not torch.isfinite(_gate()(victim)[each]).all()
    with_her = _summed(mode, victim, owners)
    kept = [i for i, owner in enumerate(owners) if owner != 1]
    without = _summed(mode, images[kept], [i // each for i in range(len(kept))])
    for one, other in zip(with_her, without, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert any(one.abs().sum() > 0.1 for one in with_her)


def test_whether_an_update_leaves_does_not_tell_who_was_drawn(
    make_plan: Callable[..., Plan],
    make_site: Callable[..., PreparedSite],
    make_order: Callable[..., RoundOrder],
) -> None:
    plan = make_plan(
        training={"rounds": 1, "local_epochs": None, "local_steps": 2},
        privacy={
            "mechanism": "dp-sgd",
            "epsilon": 50.0,
            "delta": 0.1,
            "clipping_norm": 1.0,
            "sampling_rate": 1.0,
        },
    )
    site = make_site()
    start = to_arrays(build_model(plan, 0))
    first = next(name for name, array in start.items() if array.ndim == 4)
    start[first] = np.full_like(start[first], 1e30)
    images: Any = site.images.copy()
    images[:] = np.clip(images, 0, 1)
    lit = images.copy()
    lit[site.split["train"][0]] = 1e30  # her image alone overflows under these weights
    for mode in MODES:
        runtime = Runtime(randomness="seeded", grad_sample_mode=mode)
        for cohort in (images, lit):
            trainer = Trainer(plan, replace(site, images=cohort), runtime)
            update, outcome = trainer.train(start, make_order(plan, 1))
            assert all(np.isfinite(array).all() for array in update.values()), mode
            assert outcome.loss is None
