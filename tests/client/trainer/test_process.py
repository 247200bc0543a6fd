"""What a trainer takes of its machine is what the site's policy allows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fedward_client.config import load_config
from fedward_client.trainer import process
from fedward_client.trainer.process import runtime_of

SITE = """
version = 1
[site]
name = "north"
state = "state"
[trainer]
device = "{device}"
{trainer}
[datasets.chest]
root = "images"
format = "dicom"
task = "classification"
classes = ["clear", "opacity"]
[policy]
{policy}
"""
CORES = len(os.sched_getaffinity(0))


def runtime(folder: Path, trainer: str = "", policy: str = "", device: str = "cpu") -> Any:
    (folder / "images").mkdir(exist_ok=True)
    path = folder / "site.toml"
    path.write_text(SITE.format(trainer=trainer, policy=policy, device=device))
    return runtime_of(load_config(path))


@pytest.mark.parametrize(
    ("trainer", "policy", "threads"),
    [
        ("", "", CORES),
        ("", "max_threads = 1", 1),
        ("threads = 6", "max_threads = 3", 3),
        ("threads = 2", "max_threads = 3", 2),
        ("threads = 5", "", 5),
    ],
)
def test_threads(tmp_path: Path, trainer: str, policy: str, threads: int) -> None:
    found = runtime(tmp_path, trainer, policy)
    assert found.threads == threads
    found.enter()
    assert torch.get_num_threads() == threads


def test_memory_of_a_gpu_is_a_part_of_all_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, torch.device]] = []

    class Properties:
        total_memory = 80 << 30

    monkeypatch.setattr(process, "choose_device", lambda _: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: told.append(given)
    )
    for policy in ("max_gpu_memory_gib = 20.0", "max_gpu_memory_gib = 200.0", ""):
        assert runtime(tmp_path, policy=policy).device == "cuda:0"
    assert told == [(0.25, torch.device("cuda:0")), (1.0, torch.device("cuda:0"))]


@pytest.mark.gpu
def test_a_gpu_gives_no_more_than_that(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = runtime(tmp_path, policy="max_gpu_memory_gib = 1.0", device="cuda").torch_device
    try:
        torch.empty(1 << 29, dtype=torch.uint8, device=device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 31, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
