"""The aggregator's memory does not grow with the number of sites where the strategy can fold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = 8.0  # MiB
TAKE_IN = """
import os, re, sys
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from fedward.tensors import PACKED, pack
from fedward.protocol import TrainOutcome
from fedward.flower.grid import _unpacked
from fedward_server.aggregation import Aggregation
from fedward_server.reply_validation import Update, read_update
from fedward_strategies.contribution import Sketch
def take_in(fold, sites):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    expected = {"w": np.zeros(1 << 21, np.float32)}
    aggregation = Aggregation(fold=fold, max_share=0.8)
    for site in range(sites):
        name = f"site {site}"
        outcome = TrainOutcome(site=name, round=1, patients=9, images=9, steps=1, seconds=0.0)
        update = np.full(1 << 21, site, np.float32)
        message = _unpacked(Message(RecordDict({
            "arrays": ArrayRecord({PACKED: Array(pack({"w": update}))}),
            "metrics": MetricRecord({"num-examples": 9.0}),
            "outcome": ConfigRecord(outcome.to_flat()),
        }), dst_node_id=site + 1, message_type="train"))
        read = read_update(message, name, 1, expected, sketch=Sketch((0, 1), 1 << 21))
        assert isinstance(read, Update), read
        aggregation.add(name, read)
        del message, read, update
    strategy = FedAvg(weighted_by_key="num-examples")
    arrays, _ = strategy.aggregate_train(1, aggregation.messages(1))
    assert np.allclose(arrays["w"].numpy()[:9], (sites - 1) / 2)
    print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
for fold, sites in ((True, 34), (True, 4), (False, 34), (False, 4)):
    if os.fork() == 0:  # the imports are the same for all
        take_in(fold, sites)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.integration
def test_thirty_more_sites_take_no_more_memory_where_updates_are_folded() -> None:
    """Peak MiB (VmHWM, proc(5)) of processes that each take in so many updates."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TAKE_IN],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folded, folded_few, held, held_few = map(float, done.stdout.split())
    assert folded - folded_few < 2 * MODEL
    # What needs every update holds them, which also shows that the measure can tell.
    assert held - held_few > 20 * MODEL
