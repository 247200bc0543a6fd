"""What a study would take of this machine: room, memory and time."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from client.cohort.probe import Probe, as_site
from client.data.preprocess import prepared_bytes
from client.training.batches import count_steps
from client.training.device import choose_device
from client.training.runtime import Runtime
from client.training.trainer import Trainer
from fedward.models import build_model, describe, to_arrays, trainable_names
from fedward.models.registry import outline
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan, Privacy, Stage
from fedward.privacy import sampling_rate, steps_per_round
from fedward.protocol import RoundOrder

_STEPS: Final = 2  # of each round that is timed
_PATIENCE: Final = 20.0  # seconds after which the first, slower round has to do
_STATE: Final = {"adam": 2, "adamw": 2, "sgd": 1}  # numbers an optimiser keeps for each trained one
# What privacy is set to while a step is timed: its cost in time does not depend on these.
_TIMED: Final = {"epsilon": 8.0, "delta": 1e-3, "sampling_rate": 1.0}


class Cost(BaseModel):
    """What a study would take; estimates, and none of activations, which depend on the device."""

    model_config = ConfigDict(extra="forbid")
    prepared_bytes: int = Field(description="prepared images and labels on disk")
    free_disk_bytes: int = Field(description="free where the state folder lies")
    parameters: int = Field(description="of the model")
    training_bytes: int = Field(
        description="model, gradients (with privacy: of each image), optimiser and one batch"
    )
    memory_bytes: int = Field(description="of the machine or its GPU")
    device: str
    steps: int = Field(description="over the whole study")
    seconds_per_step: float | None = Field(description="measured; none when it was not")
    seconds: float | None = Field(description="of training over the whole study")


@dataclass(frozen=True)
class Room:
    """The machine.

    Attributes
    ----------
    state : Path
        The site's state folder, where prepared images go.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
    """

    state: Path
    device: str = "auto"

    def memory(self) -> int:
        """Bytes of the device."""
        device = choose_device(self.device)
        if device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[1])
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def expect(
    plan: Plan, images: int, training: int, patients: int, probe: Probe | None, room: Room
) -> Cost:
    """Estimate what a study takes.

    Parameters
    ----------
    images, training : int
        All images, and those to train on.
    patients : int
        To train on.
    probe : Probe or None
        Prepared images with which to time a step; None leaves the time out.
    """
    in_step = _images_in_step(plan, training, patients)
    per_round = _steps(plan, training, patients)
    seconds = _time(plan, probe, in_step, per_round, room) if probe and probe.prepared else None
    steps = per_round * plan.rounds
    return Cost(
        prepared_bytes=prepared_bytes(plan, images),
        parameters=describe(plan).parameters,
        free_disk_bytes=shutil.disk_usage(room.state).free,
        training_bytes=training_bytes(plan, round(in_step)),
        memory_bytes=room.memory(),
        device=str(choose_device(room.device)),
        steps=steps,
        seconds=seconds,
        seconds_per_step=None if seconds is None else seconds / steps,
    )


def training_bytes(plan: Plan, in_step: int) -> int:
    """Bytes of model, gradients, optimiser and one batch, in the stage that trains most."""
    model = outline(plan)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = max(
        sum(sizes.get(name, 0) for name in trainable_names(model, stage.train))
        for stage in plan.schedule
    )
    at_once = max(1, min(in_step, Runtime().physical_batch))
    # Opacus holds the gradient of every image of a chunk, and their sum.
    gradients = trained * (1 + at_once if plan.privacy.on else 1)
    batch = at_once * plan.preprocessing.channels * int(np.prod(plan.preprocessing.size))
    return 4 * (sum(sizes.values()) + gradients + trained * _STATE[plan.training.optimizer] + batch)


def _images_in_step(plan: Plan, training: int, patients: int) -> float:
    """Expected number."""
    if not plan.privacy.on:
        return min(plan.training.batch_size, training)
    drawn = sampling_rate(plan, patients) * patients
    return drawn * min(plan.privacy.images_per_patient, max(1.0, training / patients))


def _steps(plan: Plan, training: int, patients: int) -> int:
    if plan.privacy.on:
        return steps_per_round(plan, sampling_rate(plan, patients))
    return count_steps(
        training,
        plan.training.batch_size,
        epochs=plan.training.local_epochs,
        steps=plan.training.local_steps,
    )


def _time(plan: Plan, probe: Probe, in_step: float, per_round: int, room: Room) -> float | None:
    """Seconds of all rounds, from a few real steps of each stage."""
    try:
        return sum(
            stage.rounds * per_round * _time_step(plan, stage, probe, room.device) * in_step
            for stage in plan.schedule
        )
    except (MemoryError, torch.cuda.OutOfMemoryError):
        return None


def _time_step(plan: Plan, stage: Stage, probe: Probe, device: str) -> float:
    """Seconds of a training step for each image in it."""
    short = _shortened(plan, stage)
    runtime = Runtime(device=str(choose_device(device)), threads=os.cpu_count() or 1)
    trainer = Trainer(short, as_site(probe, plan), runtime)
    arrays = to_arrays(build_model(plan, seed=0))
    text, digest = canonical(short), plan_hash(short)
    taken = 0.0
    for number in (1, 2):  # the first round also warms up
        order = RoundOrder(plan=text, plan_hash=digest, round=number, account=False)
        _, outcome = trainer.train(arrays, order)
        taken = outcome.seconds
        if taken > _PATIENCE:
            break
    return taken / (_STEPS * len(probe.prepared))


def _shortened(plan: Plan, stage: Stage) -> Plan:
    """The same training, of two short rounds over few images."""
    training = {
        "rounds": None,
        "learning_rate": None,
        "local_epochs": None,
        "local_steps": _STEPS,
        "batch_size": 4096,
    }
    privacy: Privacy = plan.privacy.model_copy(update=_TIMED if plan.privacy.on else {})
    return plan.model_copy(
        update={
            "training": plan.training.model_copy(update=training),
            "privacy": privacy,
            "stages": (stage.model_copy(update={"rounds": 2}),),
        }
    )
