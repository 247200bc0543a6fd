"""Start trainer and connector within their walls, and start again what ends."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedward.child_process import end_with_parent

_LOG = logging.getLogger("fedward.daemon")
_WHICH: Final = ("trainer", "connector")
_CALM: Final = 60.0
_LONGEST: Final = 30.0
_GRACE: Final = 10.0
# Exit codes that another try does not change: what site.toml says is wrong.
HOPELESS: Final = frozenset({2, 19})


@dataclass
class Child:
    """One of the two processes."""

    which: str
    config: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    next_start: float = 0.0

    def start(self) -> None:
        """Start it."""
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedward_client.daemon.launch", self.which, str(self.config)],
            preexec_fn=end_with_parent(signal.SIGTERM),
        )

    def ended(self) -> int | None:
        """Its exit code once it has ended."""
        return None if self.process is None else self.process.poll()

    def note_end(self, code: int) -> None:
        """Plan the next start: at once the first time, later and later if it keeps ending."""
        calm = time.monotonic() - self.started > _CALM
        self.failures = 1 if calm else self.failures + 1
        pause = min(_LONGEST, 0.2 * 2.0 ** (self.failures - 1)) if self.failures > 1 else 0.0
        _LOG.warning("the %s ended (%d); it starts again in %.1f s", self.which, code, pause)
        self.process, self.next_start = None, time.monotonic() + pause


@dataclass
class Supervisor:
    """Keeps both processes running until it is told to stop.

    Attributes
    ----------
    config : Path
        The site's configuration.
    stop : threading.Event
        Ends both.
    """

    config: Path
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> int:
        """Run; gives the exit code, 0 after a stop."""
        children = [Child(which, self.config) for which in _WHICH]
        code = 0
        try:
            while not self.stop.wait(0.1):
                for child in children:
                    code = self._look(child)
                    if code:
                        return code
        finally:
            _end(children)
        return code

    def _look(self, child: Child) -> int:
        """Start what is not running; the exit code that ends everything, or 0."""
        code = child.ended()
        if code is not None:
            if code in HOPELESS:
                return code
            child.note_end(code)
        if child.process is None and time.monotonic() >= child.next_start:
            child.start()
        return 0


def _end(children: list[Child]) -> None:
    running = [(child.which, child.process) for child in children if child.process is not None]
    for _, process in running:
        process.terminate()
    end = time.monotonic() + _GRACE
    for name, process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _LOG.warning("the %s did not end within %g seconds and is killed", name, _GRACE)
            process.kill()
            process.wait()
