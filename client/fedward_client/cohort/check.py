"""Check whether a dataset, or a frozen cohort of it, can be used for a plan."""

from __future__ import annotations

import copy
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from fedward.dp.accounting import (
    calibrate,
    default_delta,
    epsilon_spent,
    sampling_rate,
    steps_in_round,
)
from fedward.errors import DataError, ModelError, PlanError, PrivacyError
from fedward.models import build_model, describe, to_arrays, trainable_names
from fedward.models.registry import example_inputs, outline
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import (
    Column,
    Patch,
    Plan,
    Preprocessing,
    Privacy,
    Stage,
    TableInput,
    Task,
)
from fedward.protocol import RoundOrder
from fedward.rule_codes import MASK_SHAPE
from fedward_client.cohort.finding import Finding, Status, finding
from fedward_client.cohort.freeze import is_tilted, is_uneven
from fedward_client.cohort.patient_key import patient_key_finding
from fedward_client.cohort.probe import Probe, as_site, probe
from fedward_client.cohort.selection import Kinds, selected
from fedward_client.config import DatasetSection
from fedward_client.data.channels import lacks_too_much, names_of
from fedward_client.data.prepare import prepared_bytes
from fedward_client.data.sample import LeftOut, Sample, unnamed
from fedward_client.data.split import split_by_patient
from fedward_client.data.table_rows import Cells, absent_columns, outcomes
from fedward_client.training.device import choose_device
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

# What a study would take of this machine: room, memory and time.

_STEPS: Final = 2  # of each round that is timed
_PATIENCE: Final = 20.0  # seconds after which the first, slower round has to do
_STATE: Final = {"adam": 2, "adamw": 2, "sgd": 1}  # numbers an optimiser keeps for each trained one
# What privacy is set to while a step is timed: its cost in time does not depend on these.
_TIMED: Final = {"epsilon": 8.0, "delta": 1e-3, "sampling_rate": 1.0}


class Cost(BaseModel):
    """What a study would take; estimates."""

    model_config = ConfigDict(extra="forbid")
    prepared_bytes: int = Field(description="prepared images and labels on disk")
    free_disk_bytes: int = Field(description="free where the state folder lies")
    parameters: int = Field(description="of the model")
    training_bytes: int = Field(
        description="model, gradients (with privacy: of each image), optimiser and one batch"
    )
    activation_bytes: int = Field(
        default=0, description="what a step keeps of its images until it has the gradients"
    )
    memory_bytes: int = Field(description="of the machine or its GPU")
    device: str
    steps: int = Field(description="of training over the whole study")
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
    plan: Plan,
    images: int,
    training: int,
    patients: int,
    probe: Probe | None,
    room: Room,
    *,
    measure: bool = True,
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
    measure : bool
        Whether to time it.
    """
    in_step = _images_in_step(plan, training, patients)
    per_round = steps_in_round(plan, training, patients)
    seconds = None
    if measure and probe and probe.prepared:
        seconds = _time(plan, probe, in_step, per_round, room)
    inputs = round(in_step * (plan.preprocessing.patch or Patch()).per_image)
    steps = per_round * (plan.passes_until(plan.last_round) - plan.is_centering(1))
    return Cost(
        prepared_bytes=_prepared_bytes(plan, images, probe),
        parameters=describe(plan).parameters,
        free_disk_bytes=shutil.disk_usage(room.state).free,
        training_bytes=training_bytes(plan, inputs),
        activation_bytes=activation_bytes(plan, inputs),
        memory_bytes=room.memory(),
        device=str(choose_device(room.device)),
        steps=steps,
        seconds=seconds,
        seconds_per_step=None if seconds is None else seconds / steps,
    )


def _prepared_bytes(plan: Plan, images: int, probe: Probe | None) -> int:
    """Bytes of all prepared images; where each keeps its size, by those that were tried."""
    if plan.preprocessing.patch is None or probe is None or not probe.prepared:
        return prepared_bytes(plan, images)
    each = [
        one.pixels.nbytes + one.mask.nbytes + one.whole.truth.nbytes
        for one in probe.prepared
        if one.mask is not None and one.whole is not None
    ]
    return round(images * float(np.mean(each)))


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


def activation_bytes(plan: Plan, in_step: int) -> int:
    """Bytes that autograd keeps of one batch, in the stage that keeps most.

    Found by a forward pass without storage. Private steps keep what flows back as well.
    """
    at_once = max(1, min(in_step, Runtime().physical_batch))
    model = copy.deepcopy(outline(plan)).train()
    kept = 0
    for stage in plan.training_stages:
        trained = trainable_names(model, stage.train)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        kept = max(kept, _kept(model, example_inputs(plan, 2, "meta")))
    return (2 if plan.privacy.on else 1) * at_once * kept // 2


def _kept(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the tensors that a forward pass of a model on the ``meta`` device keeps."""
    sizes: dict[int, int] = {}
    storages = []  # else the next tensor may be told by the number of one that is gone

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages.append(storage := tensor.untyped_storage())
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage()._cdata, None)
    return sum(sizes.values())


def _images_in_step(plan: Plan, training: int, patients: int) -> float:
    """Expected number."""
    if not plan.privacy.on:
        return min(plan.training.batch_size, training)
    drawn = sampling_rate(plan, patients) * patients
    return drawn * min(plan.privacy.images_per_patient, max(1.0, training / patients))


def _time(plan: Plan, probe: Probe, in_step: float, per_round: int, room: Room) -> float | None:
    """Seconds of all rounds, from a few real steps of each stage."""
    try:
        return sum(
            stage.rounds * per_round * _time_step(plan, stage, probe, room.device) * in_step
            for stage in plan.training_stages
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


# What a plan costs this site: privacy, room, memory and time.


class Budget(BaseModel):
    """What the plan's privacy would cost this site."""

    model_config = ConfigDict(extra="forbid")
    epsilon: float = Field(description="ε that all planned steps would spend, at most")
    delta: float
    noise_multiplier: float
    sampling_rate: float = Field(description="chance of a patient to be in a step")
    steps: int = Field(description="over the whole study")
    patients: int = Field(description="that would train")
    per_image: bool = Field(
        default=False,
        description="the images name no patients, and each counts as one: ε bounds "
        "what is learnt about an image",
    )


def privacy_finding(
    plan: Plan, patients: int, everyone: int, per_image: bool = False
) -> tuple[Finding, Budget | None]:
    """What the plan's privacy costs with so many training patients, of so many in the cohort.

    `per_image` says that the images name no patients, and each counts as one.
    """
    target = plan.privacy
    if target.epsilon is None or target.delta is None:
        fix = "Updates may tell about patients; agree to that only knowingly"
        return finding("privacy", "warn", "the plan asks for none: unbounded", fix), None
    try:
        one = calibrate(plan, patients)
        spent = epsilon_spent(one.noise_multiplier, one.sampling_rate, one.steps, target.delta)
    except PrivacyError as error:
        return finding("privacy", "fail", error.rule, error.fix), None
    budget = Budget(
        epsilon=spent,
        delta=target.delta,
        noise_multiplier=one.noise_multiplier,
        sampling_rate=one.sampling_rate,
        steps=one.steps,
        patients=patients,
        per_image=per_image,
    )
    fixes = []
    if target.delta > (most := default_delta(everyone)):
        fixes.append(f"Ask for a delta of at most {most:.2g}, or let the policy say max_delta")
    if one.sampling_rate >= 1:
        each = "image" if per_image else "patient"
        fixes.append(f"Every {each} is in every step: a smaller sampling_rate needs less noise")
    found = (
        f"ε {spent:.3g} at δ {target.delta:g}: noise {one.noise_multiplier:.3g}, {one.steps} steps "
        f"with each of {patients} {'images' if per_image else 'patients'} at "
        f"{one.sampling_rate:.3g}{', per image' if per_image else ''}"
    )
    return finding("privacy", "warn" if fixes else "pass", found, "; ".join(fixes)), budget


def cost_findings(cost: Cost) -> Iterator[Finding]:
    """Whether the machine has the room that the plan needs."""
    disk, memory = cost.prepared_bytes, cost.training_bytes + cost.activation_bytes
    yield finding(
        "disk",
        "pass" if disk < cost.free_disk_bytes else "fail",
        f"{_size(disk)} for prepared images, {_size(cost.free_disk_bytes)} free",
        "Free some space, or put the state folder elsewhere",
    )
    yield finding(
        "memory",
        "pass" if memory < cost.memory_bytes else "fail",
        f"about {_size(memory)} for a step of training, {_size(cost.memory_bytes)} there",
        "Train on a larger machine, or with a smaller trainer.physical_batch or image",
    )
    if cost.seconds is not None:
        yield finding(
            "time",
            "pass",
            f"about {_duration(cost.seconds)} on {cost.device} for {cost.steps} "
            f"steps of {cost.seconds_per_step:.3g} s",
            "",
        )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


# The questions of a check: what holds, what is doubtful, what fails, and what to do.


def task_findings(ours: Task, plan: Plan) -> Iterator[Finding]:
    """Whether the dataset's labels are those that the plan is about."""
    theirs = plan.task
    same = (ours.kind, ours.dimensions, ours.multi_label) == (
        theirs.kind,
        theirs.dimensions,
        theirs.multi_label,
    )
    yield finding(
        "task",
        "pass" if same else "fail",
        f"the dataset is for {_words(ours)}, the plan for {_words(theirs)}",
        "Check another dataset, or correct task and dimensions in site.toml",
    )
    names = [[name.lower() for name in task.classes] for task in (ours, theirs)]
    fix = "Write the plan's names into site.toml, in the plan's order"
    if sorted(names[0]) == sorted(names[1]) and names[0] != names[1]:
        fix = "Put the classes in site.toml into the plan's order"
    found = f"the dataset has {', '.join(ours.classes)}; the plan {', '.join(theirs.classes)}"
    yield finding("classes", "pass" if names[0] == names[1] else "fail", found, fix)


def table_findings(
    table: TableInput, dataset: DatasetSection, samples: Sequence[Sample]
) -> Iterator[Finding]:
    """What the site's table says in each of the plan's columns."""
    cells = [sample.columns for sample in samples]
    declared = {name.casefold(): one for name, one in dataset.table.items()}
    for column in table.column:
        name = f"column {column.name}"
        own = declared.get(column.name.casefold())
        if own is None:
            fix = f"Add [datasets.NAME.table.{column.name}] to site.toml, then freeze again"
            yield finding(name, "fail", "the dataset does not give it to studies", fix)
        elif own.unit and own.unit != column.unit:
            found = f"here it is in {own.unit}; the plan wants {column.unit or 'no unit'}"
            fix = "Convert the column, correct its unit in site.toml, or ask for another plan"
            yield finding(name, "fail", found, fix)
        elif absent_columns(TableInput(column=(column,)), cells):
            yield finding(name, "fail", "the frozen cohort has none", "Freeze the dataset again")
        else:
            yield _column_finding(name, column, own.unit, cells)


def _column_finding(name: str, column: Column, unit: str, cells: Sequence[Cells]) -> Finding:
    counts = outcomes(column, cells)
    used = counts["given"] + counts["missing"]
    lost = len(cells) - used
    listed = ", ".join(f"{word}: {n}" for word, n in sorted(counts.items()))
    if not used:
        return finding(name, "fail", listed, "Compare words, unit and range with the plan's")
    if lost:
        return finding(name, "warn", listed, f"{lost} images are left out; see words and range")
    if column.unit and not unit:
        fix = f"State the unit of the column in site.toml; the plan's is {column.unit}"
        return finding(name, "warn", f"{listed}; the site states no unit", fix)
    return finding(name, "pass", listed, "")


def model_finding(plan: Plan) -> Finding:
    """Whether the plan's network can be built at all, and every stage trains some of it."""
    try:
        model = build_model(plan, seed=0)
        for stage in plan.schedule:
            trainable_names(model, stage.train)
    except (PlanError, ModelError) as error:
        return finding("model", "fail", error.rule, error.fix)
    parameters = sum(p.numel() for p in model.parameters())
    return finding("model", "pass", f"{plan.model.name}, {parameters:,} parameters", "")


def sample_finding(count: int) -> Finding:
    """Whether the dataset holds anything that a study could use."""
    return finding(
        "samples",
        "pass" if count else "fail",
        f"{count} that a study could use",
        "See the dataset's report for what was left out and why",
    )


def left_out_finding(left_out: Sequence[LeftOut]) -> Finding:
    """Files, rows and masks that the reader did not take, by reason."""
    counts = Counter(item.reason for item in left_out)
    listed = ", ".join(f"{reason}: {n}" for reason, n in sorted(counts.items()))
    return finding("left out", "warn", listed, "See the reasons on the data page")


def selection_finding(fitting: int, of: int) -> Finding:
    """How many samples fit the plan's patterns for headers."""
    return finding(
        "images",
        "warn" if fitting else "fail",
        f"{fitting} of {of} samples fit what the plan selects",
        "The others are left out; compare the plan's images with the headers here",
    )


def deidentification_finding(stated: Counter[str]) -> Finding:
    """What the images say of themselves that identifies a patient."""
    listed = ", ".join(f"{reason}: {n}" for reason, n in sorted(stated.items()))
    return finding(
        "de-identification",
        "warn" if stated else "pass",
        listed or "no image says that it shows or names its patient",
        "Look at these images; [datasets.NAME.deidentification] leaves them out or refuses them",
    )


def modality_finding(plan: Plan, before: int, samples: Sequence[Sample]) -> Finding:
    """How many samples are of a modality that the plan accepts."""
    wanted = ", ".join(plan.task.modality)
    status: Status = "pass" if len(samples) == before else "warn" if samples else "fail"
    return finding(
        "modality",
        status,
        f"{len(samples)} of {before} samples are {wanted}",
        "The others are left out; see the report for what there is",
    )


def is_refused(sample: Sample, plan: Plan) -> bool:
    """Whether a sample is a volume of a leaning gantry, and the plan leaves those out."""
    return is_tilted(sample) and plan.preprocessing.gantry_tilt == "refuse"


def is_lacking(sample: Sample, prep: Preprocessing) -> bool:
    """Whether the plan leaves an image out for the channels that it lacks."""
    names = names_of(sample)
    return bool(names) and lacks_too_much(names, prep)


def channel_finding(
    prep: Preprocessing, dataset: DatasetSection, samples: Sequence[Sample]
) -> Finding:
    """How many samples have each of the plan's channels."""
    unknown = [one.name for one in prep.channel if one.name not in dataset.channels]
    if dataset.channels and unknown:
        found = f"the dataset names {', '.join(dataset.channels)}; the plan {', '.join(unknown)}"
        fix = "Add [datasets.NAME.channels.CHANNEL] to site.toml, then freeze again"
        return finding("channels", "fail", found, fix)
    if not dataset.channels:
        listed = ", ".join(one.name for one in prep.channel)
        fix = "See that the planes of a file are these, or name them in site.toml"
        return finding("channels", "warn", f"planes are taken for {listed}, in this order", fix)
    have = Counter(name for sample in samples for name in names_of(sample))
    out = sum(is_lacking(sample, prep) for sample in samples)
    listed = ", ".join(f"{one.name}: {have[one.name]}" for one in prep.channel)
    lacking = any(have[one.name] < len(samples) for one in prep.channel)
    status: Status = "fail" if out == len(samples) else "warn" if lacking else "pass"
    found = f"of {len(samples)} samples have {listed}; {out} are left out"
    return finding(
        "channels", status, found, "Others have zeros there, or see the plan's `missing`"
    )


def tilt_finding(leaning: int, of: int) -> Finding:
    """Volumes that the plan leaves out since the scanner's gantry leant."""
    found = f"{leaning} of {of} volumes are of a leaning gantry, and the plan leaves them out"
    fix = 'With preprocessing.gantry_tilt = "correct" the plan sets them upright'
    return finding("gantry tilt", "warn" if leaning < of else "fail", found, fix)


def uneven_finding(uneven: int, of: int) -> Finding:
    """Volumes whose slices are unevenly apart."""
    found = f"{uneven} of {of} volumes have slices unevenly apart; they are resampled to even ones"
    return finding("slices", "warn", found, "Where slices are missing, export the series again")


def patient_findings(
    dataset: DatasetSection, plan: Plan, samples: Sequence[Sample]
) -> tuple[list[Finding], dict[str, int], dict[str, int]]:
    """Findings, patients of each part, and patients with each class."""
    count = len({sample.patient for sample in samples})
    least = max(plan.participation.minimum_patients, dataset.minimum_patients)
    found = [
        finding(
            "patients",
            "pass" if count >= least else "fail",
            f"{count}{' (each image counts as one)' if unnamed(samples) else ''}; the plan wants "
            f"{plan.participation.minimum_patients}, the site "
            f"{dataset.minimum_patients}",
            "Bring more patients",
        )
    ]
    try:
        parts = _parts(plan, samples)
        none = [name for name in ("train", "validation", "test") if not parts[name]]
        listed = ", ".join(f"{name} {n}" for name, n in parts.items())
        found.append(
            finding(
                "division",
                "warn" if none else "pass",
                f"patients: {listed}",
                f"Without {' and '.join(none)} patients the site measures less",
            )
        )
    except DataError as error:
        parts = {}
        found.append(finding("division", "fail", error.rule, error.fix))
    classes = _by_class(plan, samples)
    if classes:
        found.append(_class_finding(dataset, classes))
    return found, parts, classes


def _class_finding(dataset: DatasetSection, classes: dict[str, int]) -> Finding:
    empty = [name for name, n in classes.items() if n == 0]
    few = [name for name, n in classes.items() if n < dataset.minimum_patients]
    listed = ", ".join(f"{name} {n}" for name, n in classes.items())
    return finding(
        "patients of each class",
        "fail" if empty else "warn" if few else "pass",
        listed,
        f"Bring patients of {', '.join(empty or few)}, or check the labels",
    )


def _parts(plan: Plan, samples: Sequence[Sample]) -> dict[str, int]:
    patients, given = [s.patient for s in samples], [s.split for s in samples]
    strata = plan.task.spec.strata(plan.task, [s.label or (0,) for s in samples])
    parts = split_by_patient(patients, given, plan.split, strata)
    return {name: len({patients[k] for k in indices}) for name, indices in parts.items()}


def _by_class(plan: Plan, samples: Sequence[Sample]) -> dict[str, int]:
    if any(sample.mask is not None for sample in samples):
        return {}
    pairs = set()
    for sample in samples:
        label = sample.label or [int(row[-1]) - 1 for row in sample.boxes or ()]
        set_ = [k for k, flag in enumerate(label) if flag] if plan.task.multi_label else label
        pairs |= {(k, sample.patient) for k in set_}
    counts = Counter(k for k, _ in pairs)
    return {name: counts[k] for k, name in enumerate(plan.task.classes)}


_RESIZE: Final = (
    "Export masks at the size of their images; or, where masks are pictures of the same "
    "proportions, have them resized: resize = true in [datasets.NAME.masks], then freeze again"
)


def probe_findings(plan: Plan, probe: Probe) -> Iterator[Finding]:
    """What a few real images say: whether they can be prepared, and how their size changes."""
    rest = probe.of - probe.tried
    unseen = f"; {rest:,} of {probe.of:,} were not tried, --all tries each" if rest else ""
    listed = ", ".join(f"{reason}: {n}" for reason, n in sorted(probe.left_out.items()))
    status: Status = "pass" if not probe.left_out else "warn" if probe.done else "fail"
    yield finding(
        "preprocessing",
        status,
        f"{probe.done:,} of {probe.tried:,} images that were tried could be prepared"
        f"{'; ' + listed if listed else ''}{unseen}",
        _RESIZE if MASK_SHAPE in probe.left_out else "See the reasons on the data page",
    )
    if not probe.done:
        return
    yield _size_finding(plan, probe)
    if plan.preprocessing.spacing is not None and probe.unmeasured:
        yield finding(
            "spacing",
            "warn",
            f"{probe.unmeasured} of {probe.done} images state no spacing, and count as 1 "
            "mm where the plan resamples to a spacing",
            "Ask for a plan without preprocessing.spacing, or export images that state it",
        )
    if probe.lost:
        yield _cut_finding(plan, probe)
    if probe.outside:
        yield finding(
            "window",
            "warn",
            f"{probe.outside} of {probe.done} images lie wholly outside the plan's window",
            "See that pixels and window have the same unit",
        )
    if plan.task.has_masks:
        names = [name for k, name in enumerate(plan.task.classes, start=1) if k in probe.labels]
        missing = [name for name in plan.task.classes if name not in names]
        yield finding(
            "masks",
            "warn" if missing else "pass",
            f"classes seen in {probe.done} masks: {', '.join(names) or 'none'}",
            f"Look at the preview for {', '.join(missing)}",
        )


def _size_finding(plan: Plan, probe: Probe) -> Finding:
    """How many images have a side shorter than the model's input."""
    of, size = probe.done, " x ".join(map(str, plan.preprocessing.size))
    if plan.preprocessing.patch is None:
        return finding(
            "image size",
            "warn" if probe.enlarged else "pass",
            f"{probe.enlarged} of {of} are smaller than {size} on some side",
            "They are enlarged or padded; a smaller preprocessing.size would serve them better",
        )
    within = sum(
        all(n <= t for n, t in zip(sides, plan.preprocessing.size, strict=True))
        for sides in probe.sides
    )
    return finding(
        "image size",
        "warn" if within == of else "pass",
        f"{probe.enlarged} of {of} are smaller than a patch of {size} on some side, and padded; "
        f"{within} fit into one patch",
        "No image is larger than a patch, so patches cut nothing out: ask for a smaller "
        "preprocessing.size, or a finer spacing",
    )


def _cut_finding(plan: Plan, probe: Probe) -> Finding:
    """What the plan's crop of the middle costs, and settings that keep whole images."""
    lost, size = probe.lost, plan.preprocessing.size
    whole = [max(sides) for sides in zip(*probe.sides, strict=True)]
    steps = plan.preprocessing.spacing or ()
    coarse = [step * max(1.0, n / t) for step, n, t in zip(steps, whole, size, strict=True)]
    return finding(
        "foreground",
        "warn",
        f"{sum(one == 1 for one in lost)} of {probe.done} masks lose all that they mark, "
        f"since the plan keeps the middle of an image; {len(lost)} lose some",
        "Ask for settings that keep whole images: preprocessing.size = "
        f"[{', '.join(str(max(n, t)) for n, t in zip(whole, size, strict=True))}], or "
        f"preprocessing.spacing = [{', '.join(f'{step:.3g}' for step in coarse)}], or resize "
        '= "fit" without a spacing',
    )


def _words(task: Task) -> str:
    return f"{'multi-label ' if task.multi_label else ''}{task.dimensions}D {task.kind}"


class PlanCheck(BaseModel):
    """The answer of ``fedward-client data check``."""

    model_config = ConfigDict(extra="forbid")
    dataset: str
    cohort: str = Field(description="a frozen cohort's name; empty for the dataset as it is now")
    study: str
    plan_sha256: str
    can_serve: bool = Field(description="no finding fails")
    patients: dict[str, int] = Field(description="patients of each part, by the plan's division")
    patients_by_class: dict[str, int] = Field(description="classification only")
    findings: list[Finding]
    cost: Cost | None = Field(description="none when the plan does not fit at all")
    privacy: Budget | None = Field(description="none without privacy, or when it cannot be had")


def check_plan(
    name: str,
    cohort: str,
    dataset: DatasetSection,
    samples: Sequence[Sample],
    modalities: Sequence[str],
    plan: Plan,
    room: Room,
    *,
    measure: bool = True,
    every: bool = False,
    left_out: Sequence[LeftOut] = (),
    stated: Counter[str] | None = None,
) -> PlanCheck:
    """Hold samples against a plan.

    Parameters
    ----------
    name, cohort : str
        The dataset, and the frozen cohort if the samples are one's.
    samples : sequence of Sample
        What the site could bring.
    modalities : sequence of str
        The modality of each, "" where none is stated.
    room : Room
        The machine.
    measure : bool
        Whether to train a step or two to see how long it takes.
    every : bool
        Whether to prepare all images, not only some of each class.
    left_out : sequence of LeftOut
        What the reader did not take; counted by reason.
    stated : Counter, optional
        Samples that say of themselves what identifies a patient, by reason.
    """
    findings = [*task_findings(dataset.as_task(), plan), model_finding(plan)]
    if plan.table is not None:
        findings += table_findings(plan.table, dataset, samples)
    fits = all(one.status != "fail" for one in findings)
    taken = _of_modality(samples, modalities, plan)
    findings.append(sample_finding(len(samples)))
    if left_out:
        findings.append(left_out_finding(left_out))
    if samples:
        findings.append(modality_finding(plan, len(samples), taken))
    fitting = selected(taken, plan, Kinds())
    if len(fitting) < len(taken):
        findings.append(selection_finding(len(fitting), len(taken)))
        taken = list(fitting)
    if taken and stated is not None:
        findings.append(deidentification_finding(stated))
    if leaning := sum(is_refused(sample, plan) for sample in taken):
        findings.append(tilt_finding(leaning, len(taken)))
        taken = [sample for sample in taken if not is_refused(sample, plan)]
    if uneven := sum(map(is_uneven, taken)):
        findings.append(uneven_finding(uneven, len(taken)))
    if plan.preprocessing.channel and taken:
        findings.append(channel_finding(plan.preprocessing, dataset, taken))
        taken = [one for one in taken if not is_lacking(one, plan.preprocessing)]
        fits = fits and findings[-1].status != "fail"
    parts: dict[str, int] = {}
    classes: dict[str, int] = {}
    cost: Cost | None = None
    budget: Budget | None = None
    if taken:
        folder = dataset.patients.folder
        by = f"folder {folder} of its path" if folder and not cohort else ""  # a frozen one may not
        findings.append(patient_key_finding(taken, plan, dataset.images_are_patients, by))
    if fits and taken:
        people, parts, classes = patient_findings(dataset, plan, taken)
        findings += people
        training = parts.get("train", 0)
        tried = probe(taken, plan, every=every)
        findings += probe_findings(plan, tried)
        if training:
            per_image = unnamed(taken) > 0
            one, budget = privacy_finding(plan, training, sum(parts.values()), per_image)
            findings.append(one)
            if budget or not plan.privacy.on:
                images = round(len(taken) * training / sum(parts.values()))
                cost = expect(plan, len(taken), images, training, tried, room, measure=measure)
                findings += cost_findings(cost)
    return PlanCheck(
        dataset=name,
        cohort=cohort,
        study=plan.study.name,
        plan_sha256=plan_hash(plan),
        can_serve=all(one.status != "fail" for one in findings),
        patients=parts,
        patients_by_class=classes,
        findings=findings,
        cost=cost,
        privacy=budget,
    )


def _of_modality(samples: Sequence[Sample], modalities: Sequence[str], plan: Plan) -> list[Sample]:
    """Those that the plan accepts; what states no modality (NIfTI, pictures) is accepted."""
    wanted: set[str] = set(plan.task.modality)
    return [
        sample
        for sample, modality in zip(samples, modalities, strict=True)
        if "any" in wanted or not modality or modality in wanted
    ]
