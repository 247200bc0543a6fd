"""Precision and determinism by device; what needs a GPU is skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from fedward.models import build_model, to_arrays
from fedward_client.training.device import autocast
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
KINDS = pytest.mark.parametrize(
    "privacy", [{"mechanism": "none"}, PRIVATE], ids=["plain", "private"]
)
Make = Callable[..., Any]


def test_only_plain_training_on_a_gpu_has_mixed_precision() -> None:
    with pytest.MonkeyPatch.context() as patch:
        # torch warns where it is asked for a GPU's precision without a GPU.
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        mixed = autocast(torch.device("cuda"), private=False)
    assert isinstance(mixed, torch.autocast)
    assert (mixed.device, mixed.fast_dtype) == ("cuda", torch.bfloat16)
    assert isinstance(autocast(torch.device("cuda"), private=True), nullcontext)
    for private in (False, True):
        assert isinstance(autocast(torch.device("cpu"), private=private), nullcontext)


def trained(plan: Any, site: Any, order: Any, device: str) -> tuple[dict[str, Any], Any]:
    runtime = Runtime(device=device, randomness="seeded")
    return Trainer(plan, site, runtime).train(to_arrays(build_model(plan, 0)), order)


@pytest.mark.gpu
@KINDS
def test_training_on_a_gpu_is_deterministic_and_near_the_cpu(
    make_plan: Make, make_site: Make, make_order: Make, privacy: dict[str, Any]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plan = make_plan(privacy=privacy)
    site, order = make_site(), make_order(plan)
    first, outcome = trained(plan, site, order, "cuda")
    again, _ = trained(plan, site, order, "cuda")
    on_cpu, told = trained(plan, site, order, "cpu")
    assert (outcome.steps, outcome.patients) == (told.steps, told.patients)
    start = to_arrays(build_model(plan, 0))
    assert any(not np.array_equal(start[name], first[name]) for name in start)
    for name, array in first.items():
        assert np.isfinite(array).all()
        assert np.array_equal(array, again[name]), name
        if privacy["mechanism"] == "none":
            # In bfloat16 a step of Adam's size may differ for a gradient near zero.
            assert np.abs(array - on_cpu[name]).mean() < 0.02, name
