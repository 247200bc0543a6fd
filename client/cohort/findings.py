"""The questions of a check: what holds, what is doubtful, what fails, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from client.cohort.finding import Finding, Status, finding
from client.cohort.probe import Probe
from client.config import DatasetSection
from client.data.split import split_by_patient
from client.data.types import LeftOut, Sample, unnamed
from fedward.errors import DataError, ModelError, PlanError
from fedward.models import build_model, trainable_names
from fedward.plan.schema import Plan, Task


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
    strata = None
    if plan.task.kind == "classification":
        # As preprocessing divides them: multi-label by whether there is any finding.
        labels = [s.label or (0,) for s in samples]
        strata = [max(one) if plan.task.multi_label else one[0] for one in labels]
    parts = split_by_patient(patients, given, plan.split, strata)
    return {name: len({patients[k] for k in indices}) for name, indices in parts.items()}


def _by_class(plan: Plan, samples: Sequence[Sample]) -> dict[str, int]:
    if plan.task.kind == "segmentation":
        return {}
    pairs = set()
    for sample in samples:
        label = sample.label or ()
        set_ = [k for k, flag in enumerate(label) if flag] if plan.task.multi_label else label
        pairs |= {(k, sample.patient) for k in set_}
    counts = Counter(k for k, _ in pairs)
    return {name: counts[k] for k, name in enumerate(plan.task.classes)}


def probe_findings(plan: Plan, probe: Probe) -> Iterator[Finding]:
    """What a few real images say: whether they can be prepared, and how their size changes."""
    tried = len(probe.prepared) + sum(probe.left_out.values())
    listed = ", ".join(f"{reason}: {n}" for reason, n in sorted(probe.left_out.items()))
    status: Status = "pass" if not probe.left_out else "warn" if probe.prepared else "fail"
    yield finding(
        "preprocessing",
        status,
        f"{len(probe.prepared)} of {tried} images that were tried could "
        f"be prepared{'; ' + listed if listed else ''}",
        "See the reasons on the data page",
    )
    if not probe.prepared:
        return
    size = " x ".join(map(str, plan.preprocessing.size))
    yield finding(
        "image size",
        "warn" if probe.enlarged else "pass",
        f"{probe.enlarged} of {len(probe.prepared)} are smaller than {size} on some side",
        "They are enlarged or padded; a smaller preprocessing.size would serve them better",
    )
    if probe.outside:
        yield finding(
            "window",
            "warn",
            f"{probe.outside} of {len(probe.prepared)} images lie wholly outside the plan's window",
            "See that pixels and window have the same unit",
        )
    if plan.task.kind == "segmentation":
        names = [name for k, name in enumerate(plan.task.classes, start=1) if k in probe.labels]
        missing = [name for name in plan.task.classes if name not in names]
        yield finding(
            "masks",
            "warn" if missing else "pass",
            f"classes seen in {len(probe.prepared)} masks: {', '.join(names) or 'none'}",
            f"Look at the preview for {', '.join(missing)}",
        )


def _words(task: Task) -> str:
    return f"{'multi-label ' if task.multi_label else ''}{task.dimensions}D {task.kind}"
