"""Keep what a study reached; where disk or database cannot take it, wait until they can."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save
from sqlalchemy.exc import InterfaceError, OperationalError

from fedward.errors import FedwardError, OutputError
from fedward.integrity import about_model
from fedward.models import save_model
from fedward.plan.load import canonical
from fedward.plan.schema import Plan
from fedward.protocol import SiteFacts
from fedward_server.job import Job
from fedward_server.registry import Registry
from fedward_server.registry.records import State, Study
from fedward_server.report import write_metrics, write_report
from fedward_server.report.summary import delivered, few_sites, unmeasured
from fedward_server.results import Arm, StudyResults

# A study's state on disk after each round: whole or not there, and never half.
#
# A round is one folder, written beside, synced and renamed. It holds the model and what the
# strategy remembers (safetensors) and everything else as JSON, which holds the digest of the
# former; a third file holds the digest of the JSON.

_KEEP: Final = 2
_STATE: Final = "state.json"
_TENSORS: Final = "state.safetensors"
_DIGEST: Final = "state.sha256"


class _State(BaseModel):
    """The JSON half."""

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    plan_hash: str
    seed: int
    complete: bool
    memory_stage: str
    arm: Arm
    facts: dict[str, SiteFacts]
    bad_answers: dict[str, int] = {}
    tensors_sha256: str


class Checkpoints:
    """The checkpoints of one study.

    Parameters
    ----------
    folder : Path
        The study's; made when it is missing.
    plan_hash : str
        A checkpoint of another plan is not taken.
    """

    def __init__(self, folder: Path, plan_hash: str) -> None:
        self._folder, self._hash = folder, plan_hash
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def save(self, job: Job) -> None:
        """Keep what stands.

        Raises
        ------
        OutputError
            The disk is full or cannot be written; the last checkpoint is as it was.
        """
        done = len(job.arm.rounds) + int(job.complete)
        part = self._folder / f".part-{os.getpid()}"
        try:
            for left in self._folder.glob(".part-*"):
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir(mode=0o700)
            self._write(part, job)
            target = self._folder / f"round-{done:06d}"
            # A round is trained again only when its checkpoint was lost; then this one counts.
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
            _sync(self._folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise OutputError(
                "a checkpoint must be writable",
                value=os.strerror(error.errno or 0),
                fix="Make room in the state folder; the study goes on from its last round",
            ) from None
        for old in self._found()[:-_KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, job: Job) -> bool:
        """Bring a job to its last whole checkpoint; whether there was one.

        A checkpoint that is damaged is passed over for the one before it, and the log says so.

        Raises
        ------
        OutputError
            There are checkpoints, and none is whole.
        """
        found = self._found()
        for path in reversed(found):
            try:
                self._read(path, job)
            except (OSError, ValueError, ValidationError, SafetensorError, KeyError):
                _LOG.warning("the checkpoint of %s is damaged or of another plan", path.name)
            else:
                return True
        if found:
            raise OutputError(
                "a checkpoint of this study must be whole",
                value=f"none of {len(found)} is",
                fix="Restore the study's folder from a backup, or submit the study again",
            )
        return False

    def _found(self) -> list[Path]:
        return sorted(self._folder.glob("round-[0-9]*"))

    def _write(self, folder: Path, job: Job) -> None:
        # Not ascontiguousarray, which makes a vector of a scalar.
        tensors = save({name: np.asarray(v, order="C") for name, v in _arrays(job).items()})
        state = _State(
            plan_hash=self._hash,
            seed=job.seed,
            complete=job.complete,
            arm=job.arm,
            memory_stage=job.memory_stage,
            facts=job.facts,
            bad_answers=job.bad_answers,
            tensors_sha256=hashlib.sha256(tensors).hexdigest(),
        )
        _write(folder / _TENSORS, tensors)
        content = state.model_dump_json().encode()
        _write(folder / _STATE, content)
        _write(folder / _DIGEST, hashlib.sha256(content).hexdigest().encode())
        _sync(folder)

    def _read(self, folder: Path, job: Job) -> None:
        # JSON has no tuples; read as JSON, pydantic takes its lists for them.
        content, digest = (folder / _STATE).read_bytes(), folder / _DIGEST
        # Earlier releases wrote none; a release that writes one never leaves it out.
        if digest.exists() and digest.read_bytes() != hashlib.sha256(content).hexdigest().encode():
            raise ValueError("damaged")
        state = _State.model_validate_json(content)
        tensors = (folder / _TENSORS).read_bytes()
        if hashlib.sha256(tensors).hexdigest() != state.tensors_sha256:
            raise ValueError("damaged")
        if state.plan_hash != self._hash:
            raise ValueError("another plan")
        kinds: dict[str, dict[str, NDArray[Any]]] = {
            kind: {} for kind in ("model", "average", "best", "memory", "site")
        }
        for name, value in load(tensors).items():
            kind, _, rest = name.partition("/")
            kinds[kind][rest] = value
        job.arrays, job.memory = kinds["model"], kinds["memory"]
        job.average, job.best = kinds["average"] or dict(job.arrays), kinds["best"]
        job.site_states = {}
        for name, value in kinds["site"].items():
            site, _, inner = name.partition("/")
            job.site_states.setdefault(int(site), {})[inner] = value
        job.arm, job.seed, job.complete = state.arm, state.seed, state.complete
        job.memory_stage, job.facts = state.memory_stage, dict(state.facts)
        job.bad_answers = dict(state.bad_answers)


def _arrays(job: Job) -> dict[str, NDArray[Any]]:
    same = all(job.average[name] is value for name, value in job.arrays.items())
    parts = {"model": job.arrays, "average": {} if same else job.average, "memory": job.memory}
    parts["best"] = job.best
    parts["site"] = {
        f"{n}/{name}": v for n, kept in job.site_states.items() for name, v in kept.items()
    }
    return {f"{kind}/{name}": v for kind, arrays in parts.items() for name, v in arrays.items()}


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_LOG = logging.getLogger("fedward.server")
_LONGEST: Final = 30.0
# A database that is away, locked for long, or has no room.
AWAY: Final = (OperationalError, InterfaceError)


class StudyPersistence:
    """What stands of a study, on disk and in the registry.

    Parameters
    ----------
    folder : Path
        The study's.
    registry, study, plan : Registry, Study, Plan
        What is kept, and where.
    results : StudyResults
        The report's data; brought up to date.
    stop : threading.Event
        Ends the waiting.
    """

    def __init__(
        self,
        folder: Path,
        registry: Registry,
        study: Study,
        plan: Plan,
        results: StudyResults,
        stop: threading.Event,
    ) -> None:
        self._folder, self._registry, self._study, self._plan = folder, registry, study, plan
        self._results, self._stop, self._unwritten = results, stop, ""
        self._checkpoints = Checkpoints(folder / "rounds", study.plan_sha256)

    def restore(self, job: Job) -> bool:
        """Bring a job to its last checkpoint, and the registry to it too; whether there was one.

        Whoever was killed between the two has finished a round that the registry lacks.
        """
        if not self._checkpoints.restore(job):
            return False
        self._until_done(lambda: self._catch_up(job))
        return True

    def keep(self, job: Job) -> None:
        """Checkpoint first: what the registry tells has happened for good."""
        if self._until_done(lambda: self._checkpoints.save(job)):
            self.tell(job)

    def tell(self, job: Job) -> None:
        """Bring the registry up to date."""
        self._until_done(lambda: self._tell(job))

    def deliver(self, job: Job) -> None:
        """Write model and report, and end the study."""
        self._results.complete = True
        if self._until_done(lambda: self._deliver(job)):
            self._until_done(lambda: self._finish(job))

    def _finish(self, job: Job) -> None:
        self._registry.studies.save_results(self._study.id, self._results)
        told = [unmeasured(job.arm)] if job.arm.unmeasured else []
        chosen = delivered(job.arm, self._plan.metrics.primary)
        told += [one for one in (chosen, few_sites(job.arm, self._plan), self._unwritten) if one]
        self._registry.studies.set_state(self._study.id, "finished", " ".join(told))

    def _catch_up(self, job: Job) -> None:
        known = {one.round for one in self._registry.studies.rounds(self._study.id)}
        for result in job.arm.rounds:
            if result.round not in known:
                self._registry.studies.save_round(self._study.id, result)

    def _tell(self, job: Job) -> None:
        self._results.arms = [job.arm]
        self._results.sites = [job.facts[name] for name in sorted(job.facts)]
        self._results.unchecked = [
            name
            for name in sorted(job.facts)
            if (limit := job.limits.get(name)) is None or None in (limit.patients, limit.images)
        ]
        self._results.synthetic = any(one.synthetic for one in self._results.sites)
        if job.arm.rounds:
            self._registry.studies.save_round(self._study.id, job.arm.rounds[-1])
        self._registry.studies.save_results(self._study.id, self._results)
        for name, facts in job.facts.items():
            if self._registry.sites.find(name) is not None:
                self._registry.sites.set_facts(name, facts)

    def _deliver(self, job: Job) -> None:
        try:
            about = about_model(self._study.id, self._plan, "shared")
            about = self._registry.sign_model(about, job.average)
            self._results.model_sha256 = save_model(
                self._folder / "model.safetensors", job.average, about
            )
            (self._folder / "plan.json").write_text(canonical(self._plan), "utf-8")
            write_metrics(self._results, self._folder / "metrics.json")
            self._report()
        except OSError as error:
            raise OutputError(
                "results must be written", value=error.strerror, fix="Free the disk"
            ) from None

    def _report(self) -> None:
        self._unwritten = ""
        try:
            write_report([self._results], self._folder / "report.html")
        except OSError:
            raise  # there may be room later
        except Exception as error:  # the model is delivered without it
            _LOG.exception("the report could not be written")
            self._unwritten = f"The report could not be written ({type(error).__name__})."

    def _until_done(self, act: Callable[[], None]) -> bool:
        """Do it, now or when there is room again; whether it was done before the stop."""
        pause = 0.5
        while True:
            try:
                act()
            except (OutputError, *AWAY) as error:
                self._hindered(error)
                if self._stop.wait(pause):
                    return False
                pause = min(2 * pause, _LONGEST)
            else:
                if pause > 0.5:
                    self._state("running")
                return True

    def _hindered(self, error: Exception) -> None:
        reason = "the registry must be writable. Make room, or bring its database back."
        if isinstance(error, FedwardError):
            reason = str(error)
        _LOG.warning("the study waits: %s", reason)
        self._state("paused", reason)

    def _state(self, state: State, reason: str = "") -> None:
        # On a full disk the reason may have no room either; the log has it.
        if not self._stop.is_set():
            with suppress(FedwardError, *AWAY):
                self._registry.studies.set_state(self._study.id, state, reason)
