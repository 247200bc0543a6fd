"""Workers: they keep their state, die alone, end when told, and leave Ctrl-C to the parent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import pytest
import torch

from fedward.console import interruptible
from fedward_simulation.pool import Pool, cores

pytestmark = pytest.mark.integration


def pid(state: object) -> int:
    return os.getpid()


def count(state: dict[str, int]) -> int:
    state["calls"] += 1
    return state["calls"]


def slow(state: object, seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def die(state: object) -> None:
    time.sleep(0.2)  # so that other tasks are waiting by then
    os.kill(os.getpid(), signal.SIGKILL)


def total(state: object) -> float:
    torch.set_num_threads(2)
    return float(torch.ones(1 << 22).exp().sum())


def fail(state: object) -> None:
    raise ValueError("as asked")


def interrupted(state: object) -> str:
    os.kill(os.getpid(), signal.SIGINT)
    return "still here"


@contextmanager
def opened(state: object, workers: int) -> Iterator[Pool]:
    pool = Pool(state, workers)
    try:
        yield pool
    finally:
        pool.close()


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def soon(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_place_keeps_its_worker_and_a_worker_its_state(workers: int) -> None:
    with opened({"calls": 0}, workers) as pool:
        processes = [pool.submit(place, pid).result() for place in range(4)]
        assert processes[:2] == processes[2:]
        assert len(set(processes)) == max(1, workers)
        assert (os.getpid() in processes) == (workers == 0)
        assert [pool.submit(0, count).result() for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_stays_with_its_task(workers: int) -> None:
    with opened(None, workers) as pool:
        bad, good = pool.submit(0, fail), pool.submit(0, pid)
        with pytest.raises(ValueError, match="as asked"):
            bad.result()
        assert good.result() > 0


def test_a_killed_worker_costs_its_task_only() -> None:
    with opened({"calls": 0}, 2) as pool:
        first, other = pool.submit(0, pid).result(), pool.submit(1, pid).result()
        killed, waiting = pool.submit(0, die), [pool.submit(0, count) for _ in range(2)]
        beside = pool.submit(1, pid)
        with pytest.raises(BrokenProcessPool):
            killed.result(20)
        assert [task.result(20) for task in waiting] == [1, 2]
        assert beside.result(20) == other
        assert pool.submit(0, pid).result(20) not in (first, other)


def test_an_idle_worker_that_is_killed_is_replaced() -> None:
    with opened(None, 1) as pool:
        first = pool.submit(0, pid).result()
        os.kill(first, signal.SIGKILL)
        assert soon(lambda: gone(first))
        time.sleep(0.2)
        assert pool.submit(0, pid).result(20) != first


def test_closing_ends_processes_at_work_and_drops_what_waits() -> None:
    with opened(None, 2) as pool:
        processes = [pool.submit(place, pid).result() for place in range(2)]
        started = time.monotonic()
        running, waiting = pool.submit(0, slow, 60.0), pool.submit(0, pid)
        assert not running.done()
    assert time.monotonic() - started < 5
    assert waiting.cancelled()
    assert all(soon(lambda p=process: gone(p)) for process in processes)  # type: ignore[misc]


def test_ctrl_c_does_not_reach_the_workers() -> None:
    with opened(None, 1) as pool:
        assert pool.submit(0, interrupted).result() == "still here"


def test_cores_are_those_that_this_process_may_use() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_a_parent_that_computed_on_several_threads_leaves_workers_free_to() -> None:
    """After a fork, OpenMP waits for threads that only the parent has."""
    expected = total(None)
    pool = Pool(None, 1)
    try:
        assert pool.submit(0, total).result(timeout=60) == expected
    finally:
        pool.close()


def test_a_signal_during_the_fork_is_not_lost() -> None:
    """Was: raised within a fork's own callbacks, where Python drops it, and the run went on."""
    sent: list[int] = []

    def send() -> None:
        if not sent:
            sent.append(os.getpid())
            os.kill(os.getpid(), signal.SIGTERM)

    os.register_at_fork(after_in_parent=send)
    with pytest.raises(KeyboardInterrupt), interruptible():
        Pool(None, 1)
    assert sent == [os.getpid()]
