"""How a study uses the machine: workers on a CPU, one process on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedward_simulation import study
from fedward_simulation.options import Options
from fedward_simulation.study import Study


@pytest.mark.parametrize(
    ("device", "cores", "sites", "workers", "threads"),
    [("cpu", 8, 3, 3, 2), ("cpu", 2, 5, 2, 1), ("cuda", 8, 3, 0, 8), ("cuda:0", 8, 3, 0, 8)],
)
def test_sites_share_cores_or_one_gpu(
    device: str,
    cores: int,
    sites: int,
    workers: int,
    threads: int,
    tmp_path: Path,
    make_plan: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(study, "choose_device", torch.device)
    monkeypatch.setattr(study, "cores", lambda: cores)
    made = Study(make_plan(), Options(data=tmp_path, out=tmp_path / "out", device=device))
    runtime, count = made.machine(sites)
    assert (count, runtime.threads, runtime.device) == (workers, threads, device)
    assert runtime.physical_batch == (64 if device == "cpu" else 256)
