"""A site that leaves while a strategy counts the nodes does not hold up the study."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord

from fedward.flower import identity
from fedward.flower.study_grid import GridSnapshot
from fedward_strategies.registry import build_strategy
from fedward_strategies.settings import StrategySettings


class Leaving:
    """A grid that one node leaves after the first look."""

    def __init__(self) -> None:
        self.looks = 0

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return [1, 2] if self.looks == 1 else [1]


def test_a_strategy_asks_who_was_there() -> None:
    identity.become_server()
    grid: Any = GridSnapshot(Leaving(), [1, 2, 3], threading.Event())  # type: ignore[arg-type]
    strategy = build_strategy("fedavg", StrategySettings(values={}))
    arrays = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
    made: list[Any] = []
    thread = threading.Thread(
        target=lambda: made.extend(strategy.configure_train(1, arrays, ConfigRecord(), grid)),
        daemon=True,
    )
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert sorted(message.metadata.dst_node_id for message in made) == [1, 2]
