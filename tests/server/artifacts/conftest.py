"""Plans for every network, and their exports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import SEGMENTERS, sections

from fedward.models import build_model, to_arrays
from fedward.plan import Plan, plan_from
from fedward_server.artifacts.export import Delivered

CARD = "# Model card\n\nMade of two sites.\n\n"


def build_plan(name: str, dimensions: int = 2, size: int = 16, **changes: Any) -> Plan:
    """A plan for one network; `changes` go into its sections."""
    plan = sections(name, dimensions, size)
    plan["study"] = {"name": "exported", "title": "A study", "intended_use": "To test exports."}
    plan["task"]["classes"] = ["lung"] if name in SEGMENTERS else ["no", "yes"]
    for section, values in changes.items():
        plan[section] = {**plan[section], **values}
    return plan_from(plan)


def trained(plan: Plan) -> torch.nn.Module:
    """A network whose every weight and statistic has left its first value."""
    model = build_model(plan, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.mul_(1 + 0.1 * torch.rand(value.shape, generator=generator))
            value.add_(0.02 * torch.rand(value.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session", name="plan_of")
def plan_of_fixture() -> Callable[..., Plan]:
    return build_plan


@pytest.fixture(scope="session", name="trained")
def trained_fixture() -> Callable[[Plan], torch.nn.Module]:
    return trained


@pytest.fixture(scope="session")
def delivered() -> Callable[[Plan, torch.nn.Module], Delivered]:
    """What a study delivers."""
    return lambda plan, model: Delivered(plan, to_arrays(model), CARD)


@pytest.fixture(scope="session")
def images() -> Callable[[Plan, int], torch.Tensor]:
    """Random inputs of a plan's network."""

    def make(plan: Plan, count: int) -> torch.Tensor:
        shape = (count, plan.preprocessing.channels, *plan.preprocessing.size)
        return torch.from_numpy(np.random.default_rng(count).normal(size=shape).astype(np.float32))

    return make
