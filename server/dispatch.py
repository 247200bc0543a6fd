"""One runner process per study that should run; started again when it ends without an end."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedward.orphans import end_with_parent
from server.registry import Registry

_LOG = logging.getLogger("fedward.server")
_LOOK: Final = 0.5
_CALM: Final = 60.0
_LONGEST: Final = 60.0
_GRACE: Final = 10.0


@dataclass
class _Runner:
    process: subprocess.Popen[bytes]
    started: float


class Dispatcher:
    """Keeps a runner process for every study that should run.

    Parameters
    ----------
    config : Path
        The server's configuration file.
    registry : Registry
        Which studies there are.
    """

    def __init__(self, config: Path, registry: Registry) -> None:
        self._config, self._registry = config, registry
        self._running: dict[str, _Runner] = {}
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}

    def run(self, stop: threading.Event) -> None:
        """Look after the studies until stopped; then end their runners, which go on later."""
        try:
            while not stop.wait(_LOOK):
                try:
                    self.look()
                except Exception as error:  # a database that is away for a moment
                    _LOG.warning("the registry did not answer: %s", type(error).__name__)
        finally:
            self._end()

    def look(self) -> None:
        """Start what should run, and note what ended."""
        for study, runner in list(self._running.items()):
            code = runner.process.poll()
            if code is not None:
                del self._running[study]
                self._note(study, code, time.monotonic() - runner.started)
        for one in self._registry.studies.list("submitted", "running", "paused"):
            if one.wanted == "run" and one.id not in self._running:
                self._start(one.id)

    def _start(self, study: str) -> None:
        if time.monotonic() < self._not_before.get(study, 0.0):
            return
        command = [sys.executable, "-m", "server.runner", "--config", str(self._config)]
        # Two runners of one study would pull each other's replies.
        alone = end_with_parent(signal.SIGKILL)
        process = subprocess.Popen([*command, "--study", study], preexec_fn=alone)
        self._running[study] = _Runner(process, time.monotonic())
        _LOG.info("study %s runs", study)

    def _note(self, study: str, code: int, seconds: float) -> None:
        if code == 0:
            self._failures.pop(study, None)
            return
        failures = 1 if seconds > _CALM else self._failures.get(study, 0) + 1
        self._failures[study] = failures
        pause = min(_LONGEST, 2.0 ** (failures - 1)) if failures > 1 else 0.0
        self._not_before[study] = time.monotonic() + pause
        _LOG.warning("the runner of %s ended (%d); it goes on in %.0f s", study, code, pause)

    def _end(self) -> None:
        for runner in self._running.values():
            runner.process.terminate()
        end = time.monotonic() + _GRACE
        for runner in self._running.values():
            try:
                runner.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                runner.process.kill()
                runner.process.wait()
