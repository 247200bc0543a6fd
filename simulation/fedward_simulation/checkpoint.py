"""The state of a run that has not ended, so that the same command goes on where it stopped.

One folder holds what the run is (plan, options, images) and, for each arm, the aggregator's own
checkpoints (:mod:`fedward_server.checkpoints`). Writing is bounded: a round's state is
written when some seconds have passed since the last write, and at the end of the arm.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

from fedward.errors import OutputError
from fedward.files import write_text
from fedward_server.checkpoints import Checkpoints
from fedward_server.job import Job
from fedward_server.privacy_spent import settle

FOLDER: Final = "checkpoints"
_RUN: Final = "run.json"
_LOCK: Final = "run.lock"
_SHARE: Final = 20  # a write may take a twentieth of the time
_AFRESH: Final = (
    "Give the same command again to go on with that run, choose another --out, or start afresh "
    "with --fresh"
)
_LOG = logging.getLogger("fedward.simulation")


class RunCheckpoints:
    """The checkpoints of one run.

    Parameters
    ----------
    out : Path
        The run's output folder.
    about : mapping
        What the run is, in JSON's types: plan, seed, options, versions.
    seconds : float
        Least time between two writes of an arm's state; 0 writes after each round.

    Attributes
    ----------
    spent : float
        Wall seconds of the earlier processes of this run.
    """

    def __init__(self, out: Path, about: Mapping[str, Any], seconds: float) -> None:
        self._folder, self._seconds = out / FOLDER, seconds
        self._about: dict[str, Any] = json.loads(json.dumps(about))
        self._lock: IO[bytes] | None = None
        self._data, self.spent = "", 0.0

    def found(self) -> bool:
        """Whether there is an unfinished run here, which is this one as far as is known yet.

        Raises
        ------
        OutputError
            It is another run, or its description is damaged.
        """
        if not any(self._folder.glob("*/round-*")):
            return False
        known = self._read()
        if changes := _changes(known["about"], self._about):
            raise OutputError(
                "the output folder holds an unfinished run of something else",
                value="; ".join(changes),
                fix=_AFRESH,
                where="--out",
            )
        return True

    def begin(self, data: str) -> bool:
        """Take the folder for this process; whether it goes on with an unfinished run.

        Parameters
        ----------
        data : str
            SHA-256 of the prepared images and of their division.

        Raises
        ------
        OutputError
            The unfinished run had other images, another process is at it, or the folder cannot be
            written.
        """
        goes_on = self.found()
        if goes_on:
            known = self._read()
            if known["data"] != data:
                raise OutputError(
                    "the output folder holds an unfinished run on other images",
                    value=f"SHA-256 {data[:12]}…, not {known['data'][:12]}…",
                    fix=_AFRESH,
                    where="--out",
                )
            self.spent = float(known["seconds"])
        self._data = data
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(error) from None
        self._take()
        self.note_time(0.0)
        return goes_on

    def note_time(self, seconds: float) -> None:
        """Write down how long this process has been at the run, wall seconds."""
        run = {"about": self._about, "data": self._data, "seconds": self.spent + seconds}
        write_text(self._folder / _RUN, json.dumps(run, sort_keys=True, indent=1) + "\n")

    def arm(self, name: str, plan_sha256: str) -> ArmFolder:
        """Where an arm's state is kept."""
        return ArmFolder(self._folder / name, plan_sha256, self._seconds)

    def clear(self) -> None:
        """Forget the run: it has ended, or is to start afresh.

        Raises
        ------
        OutputError
            Another process is at it.
        """
        if self._folder.is_dir():
            self._take()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take(self) -> None:
        if self._lock is not None:
            return
        try:
            file = (self._folder / _LOCK).open("ab")
        except OSError as error:
            raise _unwritable(error) from None
        try:
            # Of this process alone: workers that outlive it for a moment do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise OutputError(
                "one process at a time may run into an output folder",
                fix="Wait until the other one ends, or choose another --out",
                where="--out",
            ) from None
        self._lock = file  # the system lets go of it however the process ends

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads((self._folder / _RUN).read_text("utf-8"))
            return {
                "about": dict(known["about"]),
                "data": str(known["data"]),
                "seconds": float(known["seconds"]),
            }
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(
                "the description of the unfinished run must be readable",
                value=_RUN,
                fix="Choose another --out, or start afresh with --fresh",
                where="--out",
            ) from None


@dataclass(frozen=True)
class ArmFolder:
    """Where one arm's state is kept; travels to the process that trains the arm.

    Attributes
    ----------
    folder : Path
        The arm's.
    plan_sha256 : str
        Of the plan as the arm runs it.
    seconds : float
        Least time between two writes.
    """

    folder: Path
    plan_sha256: str
    seconds: float

    @property
    def rounds(self) -> int:
        """Rounds that the newest checkpoint holds, as far as its name says."""
        return max((int(one.name[6:]) for one in self.folder.glob("round-[0-9]*")), default=0)

    def open(self, job: Job) -> ArmCheckpoints:
        """Bring a job to its newest checkpoint, if there is one, and keep its rounds from now on.

        Raises
        ------
        OutputError
            There are checkpoints, and none is whole; or the folder cannot be written.
        """
        return ArmCheckpoints(self, job)


class ArmCheckpoints:
    """Writes the state of an arm's rounds, as often as is cheap.

    Parameters
    ----------
    place : ArmFolder
        Where.
    job : Job
        Brought to its newest checkpoint; its ``save`` is set.

    Attributes
    ----------
    standing : Job or None
        The job as it stood at the end of its newest round; None before there is one.
    wrote : callable
        Called after a write, for what else is to be brought up to date.
    """

    def __init__(self, place: ArmFolder, job: Job) -> None:
        self._seconds = place.seconds
        self.wrote: Callable[[], None] = lambda: None
        try:
            self._checkpoints = Checkpoints(place.folder, place.plan_sha256)
            found = self._checkpoints.restore(job)
        except OSError as error:
            raise _unwritable(error) from None
        except OutputError as error:
            raise OutputError(
                error.rule, value=error.value, fix="Start afresh with --fresh", where="--out"
            ) from None
        self.standing: Job | None = _copy(job) if found else None
        self._written, self._lock = found, threading.RLock()
        self._cost, self._last = 0.0, time.monotonic()
        job.save = self._keep

    def flush(self) -> None:
        """Write the newest round's state, unless that is done.

        Where it cannot be written the run goes on, and the log says so: what is in memory is not
        lost yet.
        """
        with self._lock:
            if self._written or self.standing is None:
                return
            began = time.monotonic()
            try:
                settle(self.standing.arm)  # a report that is left behind states the ε of its rounds
                self._checkpoints.save(self.standing)
                self._written = True
                self.wrote()
            except OutputError as error:
                _LOG.warning("the state of round %d: %s", len(self.standing.arm.rounds), error)
            self._last = time.monotonic()
            self._cost = self._last - began

    def _keep(self, job: Job) -> None:
        # A copy, since the next round changes the job before it has ended.
        with self._lock:
            self.standing, self._written = _copy(job), False
        pause = max(self._seconds, _SHARE * self._cost) if self._seconds else 0.0
        if job.complete or time.monotonic() - self._last >= pause:
            self.flush()


def _copy(job: Job) -> Job:
    """A job as it stands; arrays are not copied, since a round replaces them whole."""
    arm = job.arm.model_copy(
        update={"rounds": list(job.arm.rounds), "privacy": dict(job.arm.privacy)}
    )
    return replace(
        job,
        arm=arm,
        arrays=dict(job.arrays),
        average=dict(job.average),
        best=dict(job.best),
        memory=dict(job.memory),
        site_states=dict(job.site_states),
        facts=dict(job.facts),
        bad_answers=dict(job.bad_answers),
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is different, in words."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new)
        elif old != new:
            found.append(f"{key} {_short(new)}, not {_short(old)}")
    return found


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 40 else f"{text[:12]}…"


def _unwritable(error: OSError) -> OutputError:
    return OutputError(
        "the checkpoints of a run must be writable",
        value=os.strerror(error.errno or 0),
        fix="Free some space, or choose another --out",
        where="--out",
    )
