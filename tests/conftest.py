"""Small real parts that many tests share: plans, sites, a dataset on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
# Two tests at a time share two cores; more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from client.data.types import PreparedSite
from fedward.plan import Plan, canonical, plan_from, plan_hash
from fedward.protocol import RoundOrder

REPOSITORY = Path(__file__).resolve().parent.parent
BASE: dict[str, Any] = {
    "version": 1,
    "study": {"name": "tiny"},
    "task": {"kind": "classification", "classes": ["no", "yes"]},
    "preprocessing": {"size": [16, 16], "intensity": "unit"},
    "split": {"given": True},
    "model": {"name": "cnn", "channels": [4, 8]},
    "training": {
        "rounds": 2, "learning_rate": 0.01, "local_epochs": 1, "batch_size": 8,
        "loss": "cross_entropy",
    },
    "privacy": {"mechanism": "none"},
    "participation": {"sites": 2, "deadline": 300.0},
    "metrics": {"report": ["auc", "accuracy"], "primary": "auc"},
}  # fmt: skip
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries laid over each other; None removes a key."""
    result = dict(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and key != "privacy":
            result[key] = merged(result.get(key, {}), value)
        else:
            result[key] = value
    return result


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    """Builds a small valid plan with changes."""

    def build(**changes: Any) -> Plan:
        return plan_from(merged(BASE, changes))

    return build


@pytest.fixture
def make_site() -> Callable[..., PreparedSite]:
    """Builds a prepared site whose positives have a bright corner."""

    def build(
        name: str = "site-1",
        patients: int = 40,
        images_per_patient: int = 1,
        seed: int = 0,
        size: int = 16,
    ) -> PreparedSite:
        rng = np.random.default_rng(seed)
        count = patients * images_per_patient
        owner = np.repeat(np.arange(patients), images_per_patient)
        labels = (np.arange(patients) % 2)[owner].astype(np.int64)
        images = rng.normal(size=(count, 1, size, size)).astype(np.float32)
        images[labels == 1, :, : size // 2, : size // 2] += 1.0
        part = owner % 10
        split = {
            "train": np.flatnonzero(part < 6),
            "validation": np.flatnonzero((part >= 6) & (part < 8)),
            "test": np.flatnonzero(part >= 8),
        }  # fmt: skip
        return PreparedSite(
            name=name, images=images, targets=labels, patients=owner.astype(np.int64), split=split,
            spacing=np.ones((count, 2), np.float32),
        )  # fmt: skip

    return build


@pytest.fixture
def make_order() -> Callable[..., RoundOrder]:
    """Builds the order of a round."""

    def build(plan: Plan, round: int = 1, **more: Any) -> RoundOrder:
        return RoundOrder(plan=canonical(plan), plan_hash=plan_hash(plan), round=round, **more)

    return build


@pytest.fixture
def npz_data(tmp_path: Path) -> Path:
    """A MedMNIST-style file of 240 small images with a given division."""
    rng = np.random.default_rng(7)
    arrays = {}
    for part, count in (("train", 160), ("val", 40), ("test", 40)):
        labels = rng.integers(0, 2, count)
        images = rng.integers(0, 120, (count, 16, 16))
        images[labels == 1, :8, :8] += 80
        arrays[f"{part}_images"] = images.astype(np.uint8)
        arrays[f"{part}_labels"] = labels[:, None].astype(np.uint8)
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """The small plan as a file."""
    path = tmp_path / "plan.toml"
    path.write_text(
        """
version = 1
[study]
name = "tiny"
[task]
kind = "classification"
classes = ["no", "yes"]
[preprocessing]
size = [16, 16]
intensity = "unit"
[split]
given = true
[model]
name = "cnn"
channels = [4, 8]
[training]
rounds = 2
learning_rate = 0.01
local_epochs = 1
batch_size = 8
loss = "cross_entropy"
[privacy]
mechanism = "none"
[participation]
sites = 2
[metrics]
report = ["auc", "accuracy"]
primary = "auc"
""",
        "utf-8",
    )
    return path


@pytest.fixture
def shared_data() -> Path:
    """The development images; tests that need them skip where they are not."""
    path = Path(os.environ.get("FEDWARD_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("the development images are not here")
    return path
