"""Processes start without what nothing needs of their libraries; who asks for it finds it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedward.startup import _uncompiled

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import json, sys
import fedward
HEAVY = ("matplotlib", "sklearn", "sympy", "torch._dynamo", "torch.distributed.tensor",
         "torch.distributed.fsdp")
def loaded():
    return [name for name in HEAVY if name in sys.modules]
def say(*what):
    print(json.dumps(what))
"""
BUILD = """
import torch
from fedward.models.registry import build_model
from fedward.plan.schema import SEGMENTERS, Plan
from fedward_client.training.optimizers import build_optimizer
def train(name, dimensions):
    seg = name in SEGMENTERS
    size = [32] * dimensions
    plan = Plan.model_validate({
        "version": 1, "study": {"name": "lean"},
        "task": {"kind": "segmentation" if seg else "classification", "dimensions": dimensions,
                 "classes": ["a", "b"]},
        "preprocessing": {"size": size}, "model": {"name": name},
        "training": {"rounds": 1, "learning_rate": 0.1, "local_epochs": 1, "optimizer": "adam",
                     "loss": "dice_ce" if seg else "cross_entropy"},
        "privacy": {"mechanism": "none"}, "metrics": {"report": ["loss"], "primary": "loss"},
    })
    model = build_model(plan, 0)
    optimizer = build_optimizer(plan, model.parameters())
    optimizer.zero_grad()
    model(torch.rand(2, 1, *size)).square().mean().backward()
    optimizer.step()
for name in ("cnn", "resnet18", "densenet121", "efficientnet-b0", "unet", "basicunet",
             "segresnet", "attention-unet"):
    train(name, 2)
    if name not in ("densenet121", "efficientnet-b0"):
        train(name, 3)
say(loaded())
"""
THERE = """
import fedward.models, opacus.accountants, torch.distributed
from fedward.startup import plain_shapes
early = loaded()
with plain_shapes():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from sympy import Symbol
from torch.distributed.tensor import Shard
import matplotlib.pyplot, sklearn.metrics, torch.distributed.tensor, torch.distributed.fsdp
from torch.distributed._composable.fsdp import FSDPModule
say(early, ShapeEnv.__name__, (Symbol("x") * 2).is_symbol, Shard(0).dim,
    torch.distributed.fsdp.ShardingStrategy.FULL_SHARD.name,
    FSDPModule is torch.distributed.fsdp.FSDPModule, hasattr(FSDPModule, "unshard"),
    hasattr(torch.distributed.tensor.DTensor, "to_local"), "matplotlib" in sys.modules)
"""
BEFORE = """
import torch.distributed.tensor as before
import fedward.models, opacus.optimizers.optimizer as optimizer
say(optimizer.DTensor is before.DTensor)
"""
COMPILED = """
import torch
from fedward_client.training.optimizers import _KINDS
weight = torch.nn.Parameter(torch.ones(2))
optimizer = _KINDS["sgd"]([weight], lr=0.5)
@torch.compile(backend="eager")
def loss(x):
    return (x * weight).sum()
optimizer.zero_grad()
loss(torch.ones(2)).backward()
optimizer.step()
say(weight.tolist(), loaded()[-1:])
"""
STEP = """
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
torch.manual_seed(0)
model = GradSampleModule(torch.nn.Sequential(
    torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(108, 2)))
optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), 0.1), noise_multiplier=1.0,
    max_grad_norm=0.5, expected_batch_size=4, generator=torch.Generator().manual_seed(1))
model(torch.randn(4, 1, 8, 8)).square().mean().backward()
optimizer.step()
print(json.dumps([one.tolist() for one in model.parameters()]))
"""


def told(*code: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.integration
def test_every_model_trains_without_them() -> None:
    assert told(BEGIN, BUILD) == [[]]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (THERE, [[], "ShapeEnv", False, 0, "FULL_SHARD", True, True, True, True]),
        (BEFORE, [True]),
        (COMPILED, [[0.5, 0.5], ["torch.distributed.fsdp"]]),
    ],
    ids=["imported after", "imported before", "compiled"],
)
def test_who_asks_for_the_real_thing_has_it(code: str, expected: list[Any]) -> None:
    assert told(BEGIN, code) == expected


def test_opacus_steps_as_it_does_alone() -> None:
    assert told("import json", "import fedward", STEP) == told("import json", STEP)


def test_a_torch_that_does_it_otherwise_starts_as_ever() -> None:
    module = ModuleType("torch._compile")
    with _uncompiled(module):
        module.other = 1  # type: ignore[attr-defined]
    assert not hasattr(module, "_disable_dynamo")
