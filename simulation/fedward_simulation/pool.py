"""Worker processes that keep their sites warm; or this process itself, where one is enough."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")
_STATE: dict[str, Any] = {}
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Workers that share one state, made before they start.

    On Linux they are forked, so that prepared images are shared and nothing is imported again.
    Work for a site goes to the worker that has it warm.

    Parameters
    ----------
    state : object
        Handed to each task as its first argument.
    workers : int
        Processes; 0 runs everything in this process, as one GPU context wants it.
    """

    def __init__(self, state: object, workers: int) -> None:
        self._state, self.workers = state, workers
        self._workers = [_Worker(state) for _ in range(workers)]
        try:
            with _signals_held():
                ready = [worker.submit(_ready) for worker in self._workers]
            for future in ready:
                future.result()
        except BaseException:
            self.close()
            raise

    def submit(self, place: int, task: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Run ``task(state, *arguments)`` in the worker of that place."""
        if not self._workers:
            return _at_once(task, self._state, *arguments)
        return self._workers[place % len(self._workers)].submit(task, *arguments)

    def close(self) -> None:
        """End the workers, also those at work."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process, and the tasks that wait for it.

    They wait here and not at the process, so that its death costs only the task that it was at.
    """

    def __init__(self, state: object) -> None:
        self._state, self._executor = state, _start(state)
        self._waiting: deque[tuple[Future[Any], tuple[Any, ...]]] = deque()
        self._lock, self._busy = threading.Lock(), False

    def submit(self, *call: Any) -> Future[Any]:
        promise: Future[Any] = Future()
        with self._lock:
            self._waiting.append((promise, call))
            idle, self._busy = not self._busy, True
        if idle:
            self._next()
        return promise

    def close(self) -> None:
        with self._lock:
            for promise, _ in self._waiting:
                promise.cancel()
            self._waiting.clear()
            executor = self._executor
        processes = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        for process in processes:
            process.join(5)

    def _next(self) -> None:
        with self._lock:
            if not self._waiting:
                self._busy = False
                return
            promise, call = self._waiting.popleft()
            try:
                running = self._executor.submit(_run, *call)
            except BrokenProcessPool:
                self._executor = _start(self._state)
                running = self._executor.submit(_run, *call)
        running.add_done_callback(partial(self._done, promise))

    def _done(self, promise: Future[Any], finished: Future[Any]) -> None:
        if finished.cancelled():
            promise.cancel()
        elif error := finished.exception():
            promise.set_exception(error)
        else:
            promise.set_result(finished.result())
        self._next()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Have signals wait while processes are forked: what a handler raises within a fork is lost.

    A mask would hold back those of this thread alone; the system gives a signal to any thread, and
    Python runs its handler in this one.
    """
    handlers = {name: signal.getsignal(name) for name in _ENDING}
    if threading.current_thread() is not threading.main_thread() or None in handlers.values():
        yield
        return
    came: list[int] = []
    for name in handlers:
        signal.signal(name, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
        for number in came:
            signal.raise_signal(number)


def _start(state: object) -> ProcessPoolExecutor:
    method = "fork" if sys.platform == "linux" else "spawn"
    return ProcessPoolExecutor(
        1, multiprocessing.get_context(method), initializer=_enter, initargs=(state,)
    )


def _ready(state: object) -> int:
    return os.getpid()


def _enter(state: object) -> None:
    # Ctrl-C, and a batch system's SIGTERM, reach the whole process group; the parent alone decides
    # how to end. A worker that ended first would look like a site that failed.
    for name in _ENDING:
        signal.signal(name, signal.SIG_IGN)
    _STATE["state"] = state
    # The thread that was forked still believes in the parent's OpenMP threads, which are not here:
    # it would wait for them for ever. A new thread starts its own.
    _STATE["thread"] = ThreadPoolExecutor(1)
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()


def _die_with(parent: int) -> None:
    # Forked siblings hold each other's pipes open, so a killed parent would leave them waiting.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _run(task: Callable[..., Result], *arguments: object) -> Result:
    thread: ThreadPoolExecutor = _STATE["thread"]
    return thread.submit(task, _STATE["state"], *arguments).result()


def _at_once(task: Callable[..., Result], *arguments: object) -> Future[Result]:
    future: Future[Result] = Future()
    try:
        future.set_result(task(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future
