"""The checkpoints of a study: where it stands after each round, on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedward.errors import OutputError
from fedward.protocol import SiteFacts
from fedward_server.job import Job
from fedward_server.results import Arm

_LOG = logging.getLogger("fedward.server")


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
