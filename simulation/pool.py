"""Worker processes that keep their sites warm; or this process itself, where one is enough."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Result = TypeVar("Result")
_STATE: dict[str, Any] = {}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Workers that share one state, made before they start.

    On Linux they are forked, so that prepared images are shared and nothing is imported again.
    Each worker is a pool of one: work for a site goes to the worker that has it warm.

    Parameters
    ----------
    state : object
        Handed to each task as its first argument.
    workers : int
        Processes; 0 runs everything in this process, as one GPU context wants it.
    """

    def __init__(self, state: object, workers: int) -> None:
        self._state, self.workers = state, workers
        self._executors = [self._start() for _ in range(workers)]
        for future in [executor.submit(os.getpid) for executor in self._executors]:
            future.result()

    def submit(self, place: int, task: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Run ``task(state, *arguments)`` in the worker of that place."""
        if not self._executors:
            return _at_once(task, self._state, *arguments)
        index = place % len(self._executors)
        try:
            return self._executors[index].submit(_run, task, *arguments)
        except BrokenProcessPool:
            # A worker that was killed costs its running task; the next one gets a fresh worker.
            self._executors[index] = self._start()
            return self._executors[index].submit(_run, task, *arguments)

    def close(self) -> None:
        """End the workers, also those at work."""
        for executor in self._executors:
            processes = list((executor._processes or {}).values())
            executor.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(5)

    def _start(self) -> ProcessPoolExecutor:
        method = "fork" if sys.platform == "linux" else "spawn"
        return ProcessPoolExecutor(
            1, multiprocessing.get_context(method), initializer=_enter, initargs=(self._state,)
        )


def _enter(state: object) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _STATE["state"] = state


def _run(task: Callable[..., Result], *arguments: object) -> Result:
    return task(_STATE["state"], *arguments)


def _at_once(task: Callable[..., Result], *arguments: object) -> Future[Result]:
    future: Future[Result] = Future()
    try:
        future.set_result(task(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future
