from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

CLASSIFICATION = """
version = 1

[study]
name = "chest"

[task]
kind = "classification"
classes = ["normal", "pneumonia"]

[preprocessing]
size = [32, 32]

[model]
name = "cnn"

[training]
rounds = 3
learning_rate = 1e-3
local_epochs = 1
loss = "cross_entropy"

[privacy]
mechanism = "none"

[metrics]
report = ["auc", "accuracy"]
primary = "auc"
"""

SEGMENTATION = """
version = 1

[study]
name = "lungs"

[task]
kind = "segmentation"
classes = ["lung"]

[preprocessing]
size = [64, 64]

[model]
name = "unet"

[training]
rounds = 3
learning_rate = 1e-3
local_steps = 10
loss = "dice_ce"

[privacy]
mechanism = "dp-sgd"
epsilon = 8
delta = 1e-4
clipping_norm = 1.0
sampling_rate = 0.1

[metrics]
report = ["dice", "iou"]
primary = "dice"
"""

REMOVE = object()


def changed(text: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The plan with dotted keys set, or removed where the value is REMOVE."""
    plan = copy.deepcopy(tomllib.loads(text))
    for path, value in changes.items():
        *parents, key = path.split(".")
        table = plan
        for parent in parents:
            table = table.setdefault(parent, {})
        if value is REMOVE:
            del table[key]
        else:
            table[key] = value
    return plan


@pytest.fixture
def classification() -> str:
    return CLASSIFICATION


@pytest.fixture
def segmentation() -> str:
    return SEGMENTATION


@pytest.fixture
def change() -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    return changed


@pytest.fixture
def remove() -> object:
    return REMOVE
