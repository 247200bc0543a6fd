"""Crews: results in order, whatever their workers do; what is lost is lost alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedward_client.worker_pool import Limits, WorkerPool

MODULE = """
import os, signal, time
from pathlib import Path
from fedward_client.worker_pool import take_longer

def spend(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def work(item):
    kind, _, rest = item.partition(":")
    if kind == "slow":
        time.sleep(0.3)
    if kind == "hang":
        time.sleep(600)
    if kind == "trickle":
        for _ in range(25):
            time.sleep(0.1)
            spend(0.01)
    if kind == "large":
        take_longer(400_000_000)
    if kind in ("busy", "large"):
        spend(1.5)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "once" and not Path(rest).exists():
        Path(rest).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory":
        return len(bytes(4 << 30))
    return f"{item} {os.getpid()}"

def careful(item):
    try:
        return work(item)
    except MemoryError:
        return "too much"
"""
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """Work that a spawned process can import."""
    import importlib
    import sys

    folder = tmp_path_factory.mktemp("work")
    (folder / "crew_work.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("crew_work")
    sys.path.remove(str(folder))


def words(results):
    return [None if result is None else result.split()[0] for result in results]


def test_results_come_in_order_from_several_processes(module):
    items = ["slow:0", *(f"quick:{k}" for k in range(40))]
    with WorkerPool(module.work, Limits(workers=2, seconds=30)) as crew:
        assert not crew.workers  # nothing is started before there is work
        found = list(crew.in_order(items))
        pids = {worker.process.pid for worker in crew.workers}
        assert words(crew.in_order(["again"])) == ["again"]
        assert {worker.process.pid for worker in crew.workers} == pids
    assert words(found) == items
    assert len({result.split()[1] for result in found}) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_who_hangs_or_dies_costs_only_its_item(module, tmp_path):
    items = ["a", "die", "b", "hang", "c", f"once:{tmp_path / 'x'}", "d"]
    began = time.monotonic()
    with WorkerPool(module.work, Limits(workers=2, seconds=1.0)) as crew:
        found = words(crew.in_order(items))
    assert found == ["a", None, "b", None, "c", items[5], "d"]
    assert time.monotonic() - began < 30


def test_an_item_may_have_more_time_than_others(module):
    with WorkerPool(module.work, Limits(workers=1, seconds=0.05)) as crew:
        assert words(crew.in_order(["slow"], lambda _: 20.0)) == ["slow"]
        assert words(crew.in_order(["slow"])) == [None]


def test_memory_is_bounded_beside_the_program(module):
    with WorkerPool(module.careful, Limits(workers=1, memory=1 << 30)) as crew:
        assert words(crew.in_order(["memory", "a"])) == ["too", "a"]


def test_items_are_taken_only_a_little_ahead(module):
    taken = []

    def items():
        for k in range(500):
            taken.append(k)
            yield f"quick:{k}"

    with WorkerPool(module.work, Limits(workers=2, seconds=30)) as crew:
        results = crew.in_order(items())
        for _ in range(3):
            next(results)
        assert len(taken) < 40
        results.close()  # the rest is not wanted: nobody stays at work
        assert all(worker.item is None for worker in crew.workers)
        assert words(crew.in_order(["fresh"])) == ["fresh"]


def test_a_worker_that_waits_for_a_slow_disk_or_a_busy_machine_has_its_time(module):
    # A tenth of its time on the processor: five times the limit passes by the clock.
    with WorkerPool(module.work, Limits(workers=1, seconds=0.5)) as crew:
        assert words(crew.in_order(["trickle:"])) == ["trickle:"]
        assert words(crew.in_order(["busy:"])) == [None]


def test_a_large_item_may_take_longer(module):
    with WorkerPool(module.work, Limits(workers=1, seconds=0.5)) as crew:
        assert words(crew.in_order(["large:"])) == ["large:"]


def test_a_worker_that_hangs_ends_with_whoever_started_it(module, tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import crew_work\n"
        "from fedward_client.worker_pool import Limits, Worker\n"
        "worker = Worker(crew_work.work, 1 << 30, 60.0)\n"
        "while not worker.ready:\n"
        "    worker.take()\n"
        "worker.give('hang:')\n"
        "print(worker.process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    folder = str(Path(module.__file__).parent)
    parent = subprocess.Popen(
        [sys.executable, "-c", program, folder],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with parent:
        assert parent.stdout is not None
        worker = Path("/proc") / parent.stdout.readline().strip()
        assert worker.exists()
        parent.kill()
    give_up = time.monotonic() + 10
    while worker.exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not worker.exists()
