"""Child processes: they end with their parent, and start again when they end before it."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_CALM: Final = 60.0
_LONGEST: Final = 30.0
# Exit codes that another try does not change: what the configuration says is wrong.
_HOPELESS: Final = frozenset({2, 19})


def end_with_parent(signal: int) -> Callable[[], None]:
    """What a new process does first (``preexec_fn``) so that it ends with this one.

    Parameters
    ----------
    signal : int
        What it gets when this process ends.
    """
    parent = os.getpid()

    def promise() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal)
        # Whoever is gone already sends nothing. Not "is it 1?": in a container the parent is.
        if os.getppid() != parent:
            os._exit(1)

    return promise


@dataclass
class _Child:
    name: str
    command: Sequence[str]
    log: logging.Logger
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    not_before: float = 0.0

    def look(self) -> int:
        """Start it if it does not run; an exit code that ends everything, or 0."""
        code = None if self.process is None else self.process.poll()
        if code is not None:
            if code in _HOPELESS:
                return code
            self._plan_next(code)
        if self.process is None and time.monotonic() >= self.not_before:
            promise = end_with_parent(signal.SIGTERM)
            self.process = subprocess.Popen(list(self.command), preexec_fn=promise)
            self.started = time.monotonic()
        return 0

    def _plan_next(self, code: int) -> None:
        calm = time.monotonic() - self.started > _CALM
        self.failures = 1 if calm else self.failures + 1
        pause = min(_LONGEST, 0.2 * 2.0 ** (self.failures - 1)) if self.failures > 1 else 0.0
        self.log.warning("the %s ended (%d); it starts again in %.1f s", self.name, code, pause)
        self.process, self.not_before = None, time.monotonic() + pause


def supervise(
    commands: Mapping[str, Sequence[str]],
    stop: threading.Event,
    log: logging.Logger,
    grace: float = 10.0,
) -> int:
    """Keep processes running until stopped: the first restart is at once, later ones wait longer.

    Parameters
    ----------
    commands : mapping
        Names in messages, and the commands.
    stop : threading.Event
        Ends all.
    log : logging.Logger
        Told of processes that end.
    grace : float
        Seconds that all have to end in; what still runs then is killed.

    Returns
    -------
    int
        0 after a stop; otherwise the exit code of a process that no other start can mend.
    """
    children = [_Child(name, command, log) for name, command in commands.items()]
    try:
        while not stop.wait(0.1):
            for child in children:
                if code := child.look():
                    return code
    finally:
        _end([(child.name, child.process) for child in children if child.process], log, grace)
    return 0


def _end(
    running: Sequence[tuple[str, subprocess.Popen[bytes]]], log: logging.Logger, grace: float
) -> None:
    for _, process in reversed(running):
        process.terminate()
    end = time.monotonic() + grace
    for name, process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("the %s did not end within %g seconds and is killed", name, grace)
            process.kill()
            process.wait()
