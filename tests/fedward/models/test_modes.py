"""The default mode is one that was verified for the model."""

from __future__ import annotations

from typing import get_args

import pytest

from fedward.errors import ModelError
from fedward.models.registry import GRAD_SAMPLE_MODES, best_mode
from fedward.plan.schema import ModelName


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", get_args(ModelName))
def test_the_default_is_a_verified_mode(name: ModelName, device: str) -> None:
    assert best_mode(name, device, threads=2) in GRAD_SAMPLE_MODES[name]


def test_no_thread_is_no_answer() -> None:
    with pytest.raises(ModelError, match="at least 1"):
        best_mode("cnn", "cpu", 0)
