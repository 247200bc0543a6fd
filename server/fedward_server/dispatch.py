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

from fedward.child_process import end_with_parent
from fedward.errors import ConfigError, Interrupted, ServiceError, StudyError
from fedward_server.registry import Registry
from fedward_server.registry.records import Study

_LOG = logging.getLogger("fedward.server")
_LOOK: Final = 0.5
_LONGEST: Final = 60.0
# Ends in a row, without a round between them, after which a study is given up.
MOST_ENDS: Final = 6
# What is away or told to end says nothing of the study.
_NOT_ITS_FAULT: Final = frozenset(
    {
        ServiceError.exit_code,
        Interrupted.exit_code,
        ConfigError.exit_code,
        -signal.SIGTERM,
    }
)
_GRACE: Final = 10.0


@dataclass
class _Ends:
    """How often the runner of a study ended after the same round."""

    round: int
    times: int = 0


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
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ends: dict[str, _Ends] = {}
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
        for study, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                self._note(study, code)
                del self._running[study]
        for one in self._registry.studies.list("submitted", "running", "paused"):
            if one.wanted == "run" and one.id not in self._running:
                self._start(one.id)

    def _start(self, study: str) -> None:
        if time.monotonic() < self._not_before.get(study, 0.0):
            return
        command = [sys.executable, "-m", "fedward_server.runner", "--config", str(self._config)]
        # Two runners of one study would pull each other's replies.
        alone = end_with_parent(signal.SIGKILL)
        process = subprocess.Popen([*command, "--study", study], preexec_fn=alone)
        self._running[study] = process
        _LOG.info("study %s runs", study)

    def _note(self, study: str, code: int) -> None:
        if code == 0:
            self._ends.pop(study, None)
            return
        found = self._registry.studies.get(study)
        ends = self._ends.get(study)
        if ends is None or ends.round != found.round:
            ends = self._ends[study] = _Ends(found.round)
        ends.times += 1
        if code not in _NOT_ITS_FAULT and ends.times >= MOST_ENDS:
            self._give_up(found, code, ends.times)
            return
        pause = min(_LONGEST, 2.0 ** (ends.times - 1)) if ends.times > 1 else 0.0
        self._not_before[study] = time.monotonic() + pause
        _LOG.warning("the runner of %s ended (%d); it goes on in %.0f s", study, code, pause)

    def _give_up(self, found: Study, code: int, times: int) -> None:
        """What ends each time after the same round does so for ever."""
        del self._ends[found.id]
        self._not_before.pop(found.id, None)
        if found.ended or found.wanted != "run":
            return
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        why = found.reason if found.state == "paused" else ""
        error = StudyError(
            "a study's runner must get on",
            value=f"{how}, {times} times in a row after round {found.round}"
            + (f"; {why.rstrip('.')}" if why else ""),
            fix="See the service's log; `study resume` tries again from that round",
        )
        _LOG.error("%s: %s", found.id, error)
        self._registry.studies.set_state(found.id, "failed", str(error))

    def _end(self) -> None:
        for process in self._running.values():
            process.terminate()
        end = time.monotonic() + _GRACE
        for process in self._running.values():
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
