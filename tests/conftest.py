"""Small real parts that many tests share: plans, sites, a dataset on disk."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedward.startup import prepare

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
# Two tests at a time share two cores; more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell without job control has what it starts with & ignore SIGINT, and the processes of tests
# would inherit that.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "torch" not in sys.modules:
    prepare()  # as each program does

import numpy as np
import pytest
import torch
import warm_start
from control_variates import SPEC

from fedward.plan import Plan, canonical, plan_from, plan_hash
from fedward.protocol import RoundOrder
from fedward.strategies import STRATEGIES, StrategySpec
from fedward_client.data.sample import PreparedSite

# Real processes (a SuperLink, hospitals, an aggregator) that several folders of tests start.
pytest_plugins = ("live_federation", "live_hospital", "orthanc", "wheel")

REPOSITORY = Path(__file__).resolve().parent.parent
BASE: dict[str, Any] = {
    "version": 1,
    "study": {"name": "tiny"},
    "task": {"kind": "classification", "classes": ["no", "yes"]},
    "preprocessing": {"size": [16, 16], "intensity": "unit"},
    "split": {"given": True},
    "model": {"name": "cnn", "channels": [4, 8]},
    "training": {
        "rounds": 2,
        "learning_rate": 0.01,
        "local_epochs": 1,
        "batch_size": 8,
        "loss": "cross_entropy",
    },
    "privacy": {"mechanism": "none"},
    "participation": {"sites": 2, "deadline": 300.0},
    "metrics": {"report": ["auc", "accuracy"], "primary": "auc"},
}
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes run first: the short ones then fill both workers to the end."""
    slow = {item.path for item in items if item.get_closest_marker("integration")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """What it imports and finds stays to the end: nothing need look for what could be freed."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


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
        }
        return PreparedSite(
            name=name,
            images=images,
            targets=labels,
            patients=owner.astype(np.int64),
            split=split,
            spacing=np.ones((count, 2), np.float32),
        )

    return build


@pytest.fixture
def make_order() -> Callable[..., RoundOrder]:
    """Builds the order of a round."""

    def build(plan: Plan, round: int = 1, **more: Any) -> RoundOrder:
        return RoundOrder(plan=canonical(plan), plan_hash=plan_hash(plan), round=round, **more)

    return build


@pytest.fixture
def control_variates(monkeypatch: pytest.MonkeyPatch) -> StrategySpec:
    """A strategy that plans may name within the test: a site keeps and sends arrays of its own."""
    monkeypatch.setitem(STRATEGIES, SPEC.name, SPEC)
    return SPEC


@pytest.fixture
def npz_data(tmp_path: Path) -> Path:
    """A MedMNIST-style file of 240 small images of as many patients, with a given division."""
    rng = np.random.default_rng(7)
    arrays = {}
    for part, count in (("train", 160), ("val", 40), ("test", 40)):
        labels = rng.integers(0, 2, count)
        images = rng.integers(0, 120, (count, 16, 16))
        images[labels == 1, :8, :8] += 80
        arrays[f"{part}_images"] = images.astype(np.uint8)
        arrays[f"{part}_labels"] = labels[:, None].astype(np.uint8)
        arrays[f"{part}_patients"] = np.array([f"{part}-{k}" for k in range(count)])
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


class Commands:
    """Runs ``fedward-client``, ``fedward-server`` and ``fedward-simulate``."""

    def __call__(
        self,
        module: str,
        *arguments: object,
        cwd: Path,
        timeout: float = 240,
        env: Mapping[str, str] = os.environ,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python -m module arguments`` in a folder; what it printed and its exit code."""
        # Files, since what it started may have a pipe open for longer.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            command = [sys.executable, "-m", module, *arguments]
            done = warm_start.run(command, timeout, cwd=cwd, env=env, stdout=out, stderr=err)
            for file in (out, err):
                file.seek(0)
            told = [file.read().decode() for file in (out, err)]
        return subprocess.CompletedProcess(done.args, done.returncode, *told)


@pytest.fixture(scope="session")
def commands() -> Commands:
    """The three programs' commands."""
    return Commands()
