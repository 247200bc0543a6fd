"""The plan's optimisers step as torch's own do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedward.models import build_model, to_arrays
from fedward.plan import Plan
from fedward_client.training.optimizers import build_optimizer, rate_at, set_rate
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

OWN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@pytest.mark.parametrize("name", OWN)
def test_steps_are_those_of_torch(make_plan: Callable[..., Plan], name: str) -> None:
    momentum: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
    plan = make_plan(training={"optimizer": name, "weight_decay": 0.1, **momentum})
    ours, theirs = (
        torch.nn.Parameter(torch.randn(9, generator=torch.Generator().manual_seed(1)))
        for _ in range(2)
    )
    optimizer = build_optimizer(plan, [ours])
    set_rate(optimizer, 0.05)
    own = OWN[name]([theirs], lr=0.05, weight_decay=0.1, **momentum)
    for _ in range(6):
        for parameter, one in ((ours, optimizer), (theirs, own)):
            one.zero_grad()
            parameter.pow(3).sum().backward()
            one.step()
        assert ours.is_leaf
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_polynomial_is_torchs_own(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(training={"rounds": 5, "learning_rate": 0.2, "schedule": "polynomial"})
    one = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    theirs = torch.optim.lr_scheduler.PolynomialLR(one, total_iters=20, power=0.9)
    for step in range(20):
        found = rate_at(plan, 1 + step // 4, step % 4 / 4)
        assert found == pytest.approx(one.param_groups[0]["lr"])
        one.step()
        theirs.step()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "polynomial"])
def test_a_warm_up_rises_to_the_schedule(make_plan: Callable[..., Plan], schedule: str) -> None:
    training = {"rounds": 6, "learning_rate": 0.2, "schedule": schedule}
    plain, warm = (make_plan(training={**training, "warmup_rounds": n}) for n in (0, 2))
    shares = [
        rate_at(warm, 1 + k // 4, k % 4 / 4) / rate_at(plain, 1 + k // 4, k % 4 / 4)
        for k in range(24)
    ]
    wanted = [0.01 + 0.99 * k / 8 for k in range(8)] + [1.0] * 16
    assert shares == pytest.approx(wanted)


def test_a_clipped_step_is_as_long_as_the_plan_says(
    make_plan: Callable[..., Plan], make_site: Callable[..., Any], make_order: Callable[..., Any]
) -> None:
    sgd = {"optimizer": "sgd", "schedule": "constant", "learning_rate": 1.0}
    steps = {**sgd, "local_epochs": None, "local_steps": 1}
    lengths = []
    for most in (None, 1e9, 0.01):
        plan = make_plan(training={**steps, "gradient_clipping": most} if most else steps)
        arrays = to_arrays(build_model(plan, 0))
        made, _ = Trainer(plan, make_site(), Runtime(randomness="seeded")).train(
            arrays, make_order(plan)
        )
        moved = [(made[name] - arrays[name]).astype(np.float64).ravel() for name in made]
        lengths.append(np.linalg.norm(np.concatenate(moved)))
    assert lengths[0] == lengths[1] > 0.01
    assert lengths[2] == pytest.approx(0.01, rel=1e-4)
