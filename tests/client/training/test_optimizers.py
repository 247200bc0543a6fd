"""The plan's optimisers step as torch's own do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedward.plan import Plan
from fedward_client.training.optimizers import build_optimizer, set_rate

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
