"""Server memory with many replies of 100 MB: folded in as they come, and as Flower's FedAvg does.

Each case is a process of its own, and its peak is the kernel's VmHWM, beyond what the imports and
the model itself took. Replies are made one at a time, as they would arrive from the link, and go
through the aggregator's own checks.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Flower's FedAvg holds all of them: 128 would be 13 GB and more.
FOLDED, HELD = (2, 8, 32, 128), (2, 8, 32)
_ARRAYS, _NUMBERS = 10, 2_500_000


def peak_of(kind: str, sites: int) -> float:
    """Peak MiB of a process that takes so many replies in."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        _call("make", 0, folder)
        return float(_call(kind, sites, folder))


def _call(*words: object) -> str:
    return subprocess.run(
        [sys.executable, __file__, *map(str, words)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout


def make(path: Path) -> None:
    """What the link gives of a reply's tensors, made by another process than the one measured."""
    from flwr.app import Array

    from fedward.tensors import pack

    arrays = {str(n): np.full(_NUMBERS, n, np.float32) for n in range(_ARRAYS)}
    path.write_bytes(Array(pack(arrays)).data)


def take_in(kind: str, sites: int, path: Path) -> None:
    """Take the replies in, and print the peak."""
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    from fedward.flower.grid import _unpacked
    from fedward_server.aggregation import Aggregation
    from fedward_server.reply_validation import Update, read_update

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    expected = {str(n): np.zeros(_NUMBERS, np.float32) for n in range(_ARRAYS)}
    strategy = FedAvg(weighted_by_key="num-examples")
    gathered, held = Aggregation(fold=kind == "folded"), []
    before = peak()
    for site in range(sites):
        message = _unpacked(reply(site, path))
        update = read_update(message, f"site {site}", 1, expected)
        assert isinstance(update, Update), update
        if kind == "folded":
            gathered.add(f"site {site}", update)
        else:
            del message.content["outcome"]
            held.append(message)
        del message, update
    arrays, _ = strategy.aggregate_train(1, gathered.messages(1) if kind == "folded" else held)
    assert np.all(arrays["3"].numpy()[:9] == 3)
    print(peak() - before)


def reply(site: int, path: Path) -> Any:
    """A reply as it comes from the link."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

    from fedward.protocol import TrainOutcome
    from fedward.tensors import PACKED

    packed = ArrayRecord()
    content = path.read_bytes()
    packed[PACKED] = Array("uint8", (len(content) - 128,), "numpy.ndarray", content)
    outcome = TrainOutcome(
        site=f"site {site}", round=1, patients=10, images=10, steps=1, seconds=1.0
    )
    return Message(
        RecordDict(
            {
                "arrays": packed,
                "metrics": MetricRecord({"num-examples": 10.0}),
                "outcome": ConfigRecord(outcome.to_flat()),
            }
        ),
        dst_node_id=site + 1,
        message_type="train",
    )


def peak() -> float:
    """This program's own peak, MiB; the counters of getrusage begin with those of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def main(kind: str, sites: int, folder: Path) -> None:
    """One process's part."""
    if kind == "make":
        make(folder / "reply")
    else:
        take_in(kind, sites, folder / "reply")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
