"""Can a dataset, or a frozen cohort of it, serve a plan."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from client.cohort.budget import Budget, cost_findings, privacy_finding
from client.cohort.cost import Cost, Room, expect
from client.cohort.finding import Finding
from client.cohort.findings import (
    left_out_finding,
    modality_finding,
    model_finding,
    patient_findings,
    probe_findings,
    sample_finding,
    task_findings,
)
from client.cohort.patient_key import patient_key_finding
from client.cohort.probe import probe
from client.config import DatasetSection
from client.data.types import LeftOut, Sample, unnamed
from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan


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
    left_out: Sequence[LeftOut] = (),
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
    left_out : sequence of LeftOut
        What the reader did not take; counted by reason.
    """
    findings = [*task_findings(dataset.as_task(), plan), model_finding(plan)]
    fits = all(one.status != "fail" for one in findings)
    taken = _of_modality(samples, modalities, plan)
    findings.append(sample_finding(len(samples)))
    if left_out:
        findings.append(left_out_finding(left_out))
    if samples:
        findings.append(modality_finding(plan, len(samples), taken))
    parts: dict[str, int] = {}
    classes: dict[str, int] = {}
    cost: Cost | None = None
    budget: Budget | None = None
    if taken:
        findings.append(patient_key_finding(taken, plan, dataset.images_are_patients))
    if fits and taken:
        people, parts, classes = patient_findings(dataset, plan, taken)
        findings += people
        training = parts.get("train", 0)
        tried = probe(taken, plan)
        findings += probe_findings(plan, tried)
        if training:
            per_image = unnamed(taken) > 0
            one, budget = privacy_finding(plan, training, sum(parts.values()), per_image)
            findings.append(one)
            if budget or not plan.privacy.on:
                images = round(len(taken) * training / sum(parts.values()))
                timed = tried if measure else None
                cost = expect(plan, len(taken), images, training, timed, room)
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
