"""Rules that hold between sections of a plan; each says which keys, which rule and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from fedward.plan import settings

if TYPE_CHECKING:
    from fedward.plan.schema import Plan

_LOSSES = {
    "classification": {"cross_entropy", "focal"},
    "multi-label": {"bce"},
    "segmentation": {"dice_ce", "dice_focal"},
}


def check(plan: Plan) -> None:
    """Raise for the first rule that the plan breaks."""
    for where, rule in _broken(plan):
        raise PydanticCustomError("plan_rule", "{rule}", {"rule": rule, "where": where})


def _broken(plan: Plan) -> Iterator[tuple[str, str]]:
    yield from _task_rules(plan)
    yield from _model_rules(plan)
    yield from _stage_rules(plan)
    yield from _strategy_rules(plan)
    yield from _participation_rules(plan)


def _task_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    from fedward.plan.schema import CLASSIFICATION_METRICS, SEGMENTATION_METRICS

    task, segmentation = plan.task, plan.task.kind == "segmentation"
    if len(set(task.classes)) != len(task.classes):
        yield "task.classes", "class names must differ; rename one"
    if not segmentation and not task.multi_label and len(task.classes) < 2:
        yield "task.classes", "classification needs at least two classes; name the other one too"
    if segmentation and task.multi_label:
        yield "task.multi_label", "multi_label belongs to classification; remove it"
    if len(plan.preprocessing.size) != task.dimensions:
        yield (
            "preprocessing.size",
            f"a {task.dimensions}D task needs {task.dimensions} side lengths; write that many",
        )
    if "any" in task.modality and len(task.modality) > 1:
        yield "task.modality", "`any` stands alone; list modalities, or only `any`"
    for key, names in (
        ("task.modality", task.modality),
        ("metrics.report", plan.metrics.report),
    ):
        if len(set(names)) != len(names):
            yield key, "its entries must differ; name each once"
    wrong = set(plan.metrics.report) - (
        SEGMENTATION_METRICS if segmentation else CLASSIFICATION_METRICS
    )
    if wrong:
        yield "metrics.report", f"{task.kind} has no metric {', '.join(sorted(wrong))}; remove it"
    if "depth" in plan.preprocessing.augmentation.flip and task.dimensions == 2:
        yield "preprocessing.augmentation.flip", "a 2D task has no depth axis; remove `depth`"
    kind = "multi-label" if task.multi_label else task.kind
    if plan.training.loss not in _LOSSES[kind]:
        yield (
            "training.loss",
            f"{kind} takes {' or '.join(sorted(_LOSSES[kind]))}, not {plan.training.loss}; "
            "change it",
        )
    if plan.training.label_smoothing and plan.training.loss != "cross_entropy":
        yield "training.label_smoothing", "label_smoothing belongs to cross_entropy; remove it"
    weights = plan.training.class_weights
    if weights is not None and len(weights) != task.outputs:
        yield (
            "training.class_weights",
            f"the model has {task.outputs} outputs, but there are {len(weights)} weights; "
            "write one weight per output",
        )


def _model_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    from fedward.plan.schema import SEGMENTERS

    model, segmentation = plan.model, plan.task.kind == "segmentation"
    if (model.name in SEGMENTERS) != segmentation:
        yield "model.name", f"{model.name} does not do {plan.task.kind}; choose another model"
    if model.name == "efficientnet-lite0":
        if plan.task.dimensions == 3:
            yield "model.name", "efficientnet-lite0 is 2D only; choose another model"
        if model.initial_weights is None:
            yield (
                "model.initial_weights",
                "efficientnet-lite0 keeps the public statistics of its weights frozen, so it needs "
                "initial_weights; name the file and its SHA-256",
            )
        if plan.preprocessing.channels != 3:
            yield "preprocessing.channels", "efficientnet-lite0 takes 3 channels; set channels = 3"
    if model.taps is not None and model.name != "efficientnet-lite0":
        yield "model.taps", f"{model.name} has no taps; remove them"
    if model.taps is not None and list(model.taps) != sorted(set(model.taps)):
        yield "model.taps", "taps must rise from block to block; sort them and name each once"
    if model.name in SEGMENTERS:
        # BasicUNet takes a sixth width for its last, full-size layer.
        spare = 2 if model.name == "basicunet" else 1
        levels = len(model.channels) - spare if model.channels else 4 if spare == 2 else 3
        if any(side % 2**levels for side in plan.preprocessing.size):
            yield (
                "preprocessing.size",
                f"{model.name} halves the image {levels} times; "
                f"make each side a multiple of {2**levels}",
            )


def _stage_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.stages and plan.training.rounds is not None:
        yield (
            "training.rounds",
            "stages carry rounds and learning rates; remove them from [training]",
        )
    if not plan.stages and plan.training.rounds is None:
        yield (
            "training.rounds",
            "a plan without [[stages]] needs rounds and learning_rate; add them",
        )
    if len({stage.name for stage in plan.stages}) != len(plan.stages):
        yield "stages", "stage names must differ; rename one"


def _strategy_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    yield from settings.broken(plan.strategy.name, plan.strategy.settings)


def _participation_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    part, name, given = plan.participation, plan.strategy.name, plan.strategy.settings
    malicious = int(given.get("malicious", 0))
    if part.quorum is not None and part.quorum > part.sites:
        yield "participation.quorum", "quorum must not exceed sites; lower it"
    need = settings.updates_needed(name, malicious)
    if part.needed < need:
        yield (
            "participation.quorum",
            f"{name} against {malicious} malicious sites needs {need} updates; raise quorum",
        )
    if given.get("keep", 1) > part.needed:
        yield (
            "strategy.settings.keep",
            f"keep must not exceed the {part.needed} updates of a quorum; lower it or raise quorum",
        )
    if (
        plan.privacy.on
        and plan.training.local_epochs is None
        and plan.privacy.sampling_rate is None
    ):
        yield (
            "privacy.sampling_rate",
            "with local_steps the cost of privacy depends on the sampling rate; give sampling_rate",
        )
