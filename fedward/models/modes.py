"""Which of Opacus's ways to per-sample gradients to take; measured, see ``benchmarks/dp.py``."""

from __future__ import annotations

from fedward.models.registry import GradSampleMode
from fedward.plan.schema import ModelName

_MANY_WEIGHTS = frozenset({"resnet18", "resnet34", "resnet50"})


def best_mode(model_name: ModelName, device_type: str, threads: int) -> GradSampleMode:
    return "hooks"
