"""What a plan costs this site: privacy, room, memory and time."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field

from client.cohort.cost import Cost
from client.cohort.finding import Finding, finding
from fedward.errors import PrivacyError
from fedward.plan.schema import Plan
from fedward.privacy import calibrate, default_delta, epsilon_spent


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
    disk, memory = cost.prepared_bytes, cost.training_bytes
    yield finding(
        "disk",
        "pass" if disk < cost.free_disk_bytes else "fail",
        f"{_size(disk)} for prepared images, {_size(cost.free_disk_bytes)} free",
        "Free some space, or put the state folder elsewhere",
    )
    yield finding(
        "memory",
        "pass" if memory < cost.memory_bytes else "fail",
        f"at least {_size(memory)} for the model in training, {_size(cost.memory_bytes)} there",
        "Train on a larger machine",
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
