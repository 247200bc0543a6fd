from __future__ import annotations

import ast
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fedward.errors import PlanError
from fedward.networks import spec as network_spec
from fedward.plan import plan_from, schema
from fedward.strategies import spec as strategy_spec

Change = Callable[[str, dict[str, Any]], dict[str, Any]]
STAGE = {"name": "head", "rounds": 2, "learning_rate": 0.01}
NONE: dict[str, Any] = {"training.rounds": None, "training.learning_rate": None}
DP = {"mechanism": "dp-sgd", "epsilon": 3.0, "delta": 1e-4, "clipping_norm": 1.0}
LITE = {"model.name": "efficientnet-lite0"}
WEIGHTS = {"file": "w.pth", "sha256": "0" * 64}

# base plan, changes, key that the error must name, words of the rule, words of the next step
AGE = {"name": "age", "kind": "number", "range": [0, 100]}
FIRST = "table.column.0"
SEX = {"name": "sex", "kind": "category", "values": ["f", "m"]}
BOXES: dict[str, Any] = {
    "task.kind": "detection",
    "model": {"name": "retinanet"},
    "training.loss": "focal_giou",
    "metrics": {"report": ["map50"], "primary": "map50"},
}
THREE: dict[str, Any] = {"preprocessing.size": [32, 32, 32]}
BROKEN: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("c", {"task.classes": ["a", "a"]}, "task.classes", "must differ", "rename"),
    ("c", {"task.classes": ["a"]}, "task.classes", "at least two classes", "name the other"),
    ("s", {"task.multi_label": True}, "task.multi_label", "belongs to classification", "remove"),
    (
        "c",
        {"preprocessing.size": [32, 32, 32]},
        "preprocessing.size",
        "needs 2 side lengths",
        "write",
    ),
    ("c", {"task.dimensions": 3}, "preprocessing.size", "needs 3 side lengths", "write"),
    ("c", {"task.modality": ["CT", "any"]}, "task.modality", "stands alone", "list modalities"),
    ("c", {"task.modality": ["CT", "CT"]}, "task.modality", "must differ", "name each once"),
    ("c", {"metrics.report": ["auc", "auc"]}, "metrics.report", "must differ", "name each once"),
    ("c", {"metrics.report": ["auc", "dice"]}, "metrics.report", "no metric dice", "remove"),
    ("s", {"metrics.report": ["dice", "auc"]}, "metrics.report", "no metric auc", "remove"),
    (
        "c",
        {"preprocessing.augmentation.flip": ["depth"]},
        "preprocessing.augmentation.flip",
        "no depth axis",
        "remove",
    ),
    (
        "c",
        {"training.warmup_rounds": 3},
        "training.warmup_rounds",
        "more rounds than warmup_rounds",
        "lower",
    ),
    (
        "c",
        {**NONE, "stages": [STAGE], "training.warmup_rounds": 2},
        "training.warmup_rounds",
        "more rounds than warmup_rounds",
        "lower",
    ),
    (
        "c",
        {"training.gradient_clipping": 1.0, "privacy": DP},
        "training.gradient_clipping",
        "bounds each patient",
        "remove",
    ),
    ("c", {"preprocessing.patch": {}}, "preprocessing.patch", "need not show", "remove"),
    ("c", {**BOXES, "preprocessing.patch": {}}, "preprocessing.patch", "need not show", "remove"),
    ("c", {**BOXES, "table": {"column": [AGE]}}, "table", "one feature vector", "remove it"),
    ("c", {**BOXES, "task.multi_label": True}, "task.multi_label", "classification", "remove"),
    ("c", {**BOXES, "task.dimensions": 3, **THREE}, "model.name", "2D only", "another"),
    (
        "s",
        {"preprocessing.patch": {"flips": ["depth"]}},
        "preprocessing.patch.flips",
        "no depth axis",
        "remove",
    ),
    (
        "s",
        {"preprocessing.patch": {"flips": ["vertical", "vertical"]}},
        "preprocessing.patch.flips",
        "must differ",
        "name each once",
    ),
    (
        "s",
        {"preprocessing.patch": {}, "preprocessing.resize": "fit"},
        "preprocessing.resize",
        "keeps its size",
        "remove resize",
    ),
    (
        "s",
        {"preprocessing.patch": {}, "privacy.audit": True},
        "privacy.audit",
        "whole images",
        "remove audit",
    ),
    (
        "s",
        {"preprocessing.patch": {}, "preprocessing.size": [64, 60]},
        "preprocessing.size",
        "halves the image 3",
        "multiple of 8",
    ),
    ("c", {"training.loss": "dice_ce"}, "training.loss", "takes cross_entropy or focal", "change"),
    ("c", {"task.multi_label": True}, "training.loss", "multi-label takes bce", "change"),
    ("s", {"training.loss": "bce"}, "training.loss", "takes dice_ce or dice_focal", "change"),
    (
        "c",
        {"training.loss": "focal", "training.label_smoothing": 0.1},
        "training.label_smoothing",
        "belongs to cross_entropy",
        "remove",
    ),
    (
        "c",
        {"training.class_weights": [1.0]},
        "training.class_weights",
        "2 outputs",
        "one weight per",
    ),
    (
        "s",
        {"training.class_weights": [1.0]},
        "training.class_weights",
        "2 outputs",
        "one weight per",
    ),
    ("c", {"model.name": "unet"}, "model.name", "does not do classification", "choose another"),
    ("s", {"model.name": "cnn"}, "model.name", "does not do segmentation", "choose another"),
    (
        "c",
        {**LITE, "task.dimensions": 3, "preprocessing.size": [32, 32, 32]},
        "model.name",
        "2D only",
        "choose another",
    ),
    ("c", LITE, "model.initial_weights", "needs initial_weights", "name the file"),
    (
        "c",
        {**LITE, "model.initial_weights": WEIGHTS},
        "preprocessing.channels",
        "takes 3 channels",
        "set channels = 3",
    ),
    (
        "s",
        {"preprocessing.size": [64, 60]},
        "preprocessing.size",
        "halves the image 3",
        "multiple of 8",
    ),
    (
        "s",
        {"model.channels": [8, 16, 32, 64, 128], "preprocessing.size": [64, 72]},
        "preprocessing.size",
        "halves the image 4",
        "multiple of 16",
    ),
    ("c", {"model.taps": [3, 5]}, "model.taps", "has no taps", "remove"),
    (
        "c",
        {
            **LITE,
            "model.initial_weights": WEIGHTS,
            "preprocessing.channels": 3,
            "model.taps": [5, 3],
        },
        "model.taps",
        "taps must rise",
        "sort them",
    ),
    (
        "s",
        {"model.name": "basicunet", "preprocessing.size": [64, 72]},
        "preprocessing.size",
        "halves the image 4",
        "multiple of 16",
    ),
    (
        "c",
        {"model.name": "resnet18", "model.dropout": 0.1},
        "model.dropout",
        "has no dropout",
        "remove dropout",
    ),
    (
        "c",
        {"model.name": "densenet121", "model.channels": [4, 8]},
        "model.channels",
        "has fixed widths",
        "remove channels",
    ),
    (
        "c",
        {"model.name": "resnet18", "model.channels": [4, 8]},
        "model.channels",
        "takes four widths",
        "change the widths",
    ),
    ("c", {"stages": [STAGE]}, "training.rounds", "stages carry rounds", "remove"),
    ("c", NONE, "training.rounds", "without [[stages]] needs rounds", "add"),
    ("c", {**NONE, "stages": [STAGE, STAGE]}, "stages", "names must differ", "rename"),
    ("c", {"strategy.settings.mu": 1.0}, "strategy.settings.mu", "knows no settings", "remove"),
    (
        "c",
        {"strategy.name": "fedadam", "strategy.settings.mu": 1.0},
        "strategy.settings.mu",
        "knows beta_1, beta_2, eta, tau",
        "remove",
    ),
    (
        "c",
        {"strategy.name": "fednova", "training.optimizer": "adamw", "training.momentum": 0},
        "training.optimizer",
        "fednova works with the steps of SGD",
        "choose sgd",
    ),
    (
        "c",
        {
            "strategy.name": "scaffold",
            "training.optimizer": "sgd",
            "training.momentum": 0.9,
            "participation.sites": 2,
        },
        "training.momentum",
        "scaffold needs SGD without momentum",
        "set momentum to 0",
    ),
    (
        "s",
        {"model.deep_supervision": True},
        "model.deep_supervision",
        "do not answer by themselves",
        "remove deep_supervision",
    ),
    (
        "c",
        {"training.keep": "best", "split.validation": 0.0},
        "split.validation",
        "keep = best compares rounds by their figures",
        "raise validation",
    ),
    (
        "s",
        {"training.patience": 3, "metrics.report": ["dice", "loss"], "metrics.primary": "loss"},
        "metrics.primary",
        "patience compares rounds by loss",
        "choose another",
    ),
    (
        "c",
        {"training.keep": "averaged"},
        "training.averaged_rounds",
        "go together",
        "give both",
    ),
    (
        "c",
        {"training.keep": "averaged", "training.averaged_rounds": 2, "training.patience": 2},
        "training.patience",
        "nobody knows which rounds are the last",
        "remove it",
    ),
    (
        "c",
        {"training.keep": "averaged", "training.averaged_rounds": 900},
        "training.averaged_rounds",
        "the last stage has",
        "lower averaged_rounds",
    ),
    (
        "c",
        {
            "training.keep": "averaged",
            "training.averaged_rounds": 2,
            "strategy.averaging": 0.5,
        },
        "strategy.averaging",
        "both average",
        "keep one",
    ),
    (
        "c",
        {"training.keep": "best", "personal": {"method": "fedbn"}},
        "training.keep",
        "a site's own layers are those of the last round",
        "remove keep",
    ),
    (
        "c",
        {"strategy.name": "afl", "split.validation": 0.0, "participation.sites": 2},
        "split.validation",
        "afl weighs sites by their figures",
        "raise validation",
    ),
    (
        "s",
        {
            "strategy.name": "afl",
            "metrics.report": ["dice", "loss"],
            "metrics.primary": "loss",
            "participation.sites": 2,
        },
        "metrics.primary",
        "no counts with noise give",
        "choose another",
    ),
    ("c", {"compression": {"method": "top-k"}}, "compression.share", "needs a share", "add"),
    (
        "c",
        {"compression": {"method": "int8", "share": 0.1}},
        "compression.share",
        "does not belong to `int8`",
        "remove",
    ),
    (
        "c",
        {"compression": {"method": "bfloat16", "rounding": "stochastic"}},
        "compression.rounding",
        "rounds nothing by chance",
        "remove",
    ),
    (
        "c",
        {
            "compression": {"method": "int8"},
            "strategy.name": "scaffold",
            "training.optimizer": "sgd",
        },
        "compression.method",
        "must arrive as it is",
        "choose another strategy",
    ),
    (
        "c",
        {"compression": {"method": "top-k", "share": 0.1}, "strategy.name": "fedmedian"},
        "compression.method",
        "compares single parameters",
        "choose another method",
    ),
    ("c", {"personal": {}}, "personal.method", "needs a method, or alone", "add one"),
    ("c", {"personal": {"method": "ditto"}}, "personal.weight", "needs weight", "add"),
    (
        "c",
        {"personal": {"method": "fedbn", "rounds": 2}},
        "personal.rounds",
        "rounds belongs to method `fine-tuning`",
        "remove it",
    ),
    (
        "c",
        {"personal": {"method": "fedbn", "local": ["fc.*"]}},
        "personal.local",
        "local belongs to methods `fedper` and `fedrep`",
        "remove it",
    ),
    ("c", {"strategy.name": "fedprox"}, "strategy.settings.mu", "needs mu", "add"),
    ("c", {"strategy.name": "krum"}, "strategy.settings.malicious", "needs malicious", "add"),
    ("c", {"strategy.name": "multikrum"}, "strategy.settings.malicious", "needs malicious", "add"),
    ("c", {"strategy.name": "bulyan"}, "strategy.settings.malicious", "needs malicious", "add"),
    (
        "c",
        {"strategy.name": "fedprox", "strategy.settings.mu": -0.5},
        "strategy.settings.mu",
        "at least 0, not -0.5",
        "change",
    ),
    (
        "c",
        {"strategy.name": "fedtrimmedavg", "strategy.settings.beta": 0.5},
        "strategy.settings.beta",
        "below 0.5",
        "change",
    ),
    (
        "c",
        {"strategy.name": "fedadam", "strategy.settings.tau": 0},
        "strategy.settings.tau",
        "above 0",
        "change",
    ),
    (
        "c",
        {"strategy.name": "krum", "strategy.settings.malicious": 0.5},
        "strategy.settings.malicious",
        "a whole number",
        "change",
    ),
    ("c", {"participation.quorum": 3}, "participation.quorum", "must not exceed sites", "lower"),
    (
        "c",
        {
            "strategy.name": "krum",
            "strategy.settings.malicious": 1,
            "participation.sites": 6,
            "participation.quorum": 4,
        },
        "participation.quorum",
        "needs 5 updates",
        "raise quorum",
    ),
    (
        "c",
        {
            "strategy.name": "bulyan",
            "strategy.settings.malicious": 1,
            "participation.sites": 12,
        },
        "participation.quorum",
        "needs 7 updates",
        "raise quorum",
    ),
    (
        "c",
        {
            "strategy.name": "multikrum",
            "strategy.settings": {"malicious": 0, "keep": 4},
            "participation.sites": 6,
        },
        "strategy.settings.keep",
        "not exceed the 3 updates",
        "lower it",
    ),
    (
        "s",
        {"privacy": DP},
        "privacy.sampling_rate",
        "depends on the sampling rate",
        "give sampling_rate",
    ),
    # rules within one section
    (
        "c",
        {"preprocessing.spacing": [1.0]},
        "preprocessing.spacing",
        "one entry per",
        "equally long",
    ),
    (
        "c",
        {"preprocessing.window": [0.0, 1.0], "preprocessing.percentiles": [1.0, 99.0]},
        "preprocessing.window",
        "exclude each other",
        "keep one",
    ),
    ("c", {"preprocessing.window": [1, 0]}, "preprocessing.window", "must rise", "swap"),
    ("c", {"preprocessing.percentiles": [9, 9]}, "preprocessing.percentiles", "must rise", "swap"),
    (
        "c",
        {"preprocessing.percentiles": [1, 101]},
        "preprocessing.percentiles",
        "within 0 and 100",
        "into that range",
    ),
    (
        "c",
        {"preprocessing.intensity": "imagenet"},
        "preprocessing.channels",
        "needs three channels",
        "set channels = 3",
    ),
    ("c", {"split.test": 0.95}, "split.test", "leave patients to train on", "below 1"),
    ("c", {"training.local_steps": 5}, "training.local_epochs", "exactly one", "write one"),
    ("c", {"training.local_epochs": None}, "training.local_epochs", "exactly one", "write one"),
    ("c", {"training.rounds": None}, "training.rounds", "go together", "give both"),
    ("c", {"training.momentum": 0.9}, "training.momentum", "belongs to optimizer", "leave it out"),
    ("s", {"privacy.delta": None}, "privacy.delta", "needs delta", "add"),
    (
        "s",
        {"privacy": {"mechanism": "dp-sgd"}},
        "privacy.epsilon",
        "needs epsilon, delta, clipping_norm",
        "add",
    ),
    (
        "c",
        {"privacy": {**DP, "mechanism": "none"}},
        "privacy.epsilon",
        "takes no epsilon, delta, clipping_norm",
        "remove",
    ),
    ("c", {"privacy.sampling_rate": 0.1}, "privacy.sampling_rate", "takes no", "remove"),
    (
        "c",
        {"privacy": {**DP, "sampling_rate": 0.1, "centering_steps": 3}},
        "privacy.centering_steps",
        "belong to model.feature_centering",
        "set it",
    ),
    (
        "c",
        {"model.feature_centering": True, "privacy.centering_steps": 3},
        "privacy.centering_steps",
        "takes no",
        "remove",
    ),
    (
        "s",
        {"model.feature_centering": True},
        "model.feature_centering",
        "for the one feature vector of an image, not for segmentation",
        "remove it",
    ),
    (
        "c",
        {"model.feature_centering": True, "model.dropout": 0.1},
        "model.dropout",
        "features without dropout",
        "remove dropout",
    ),
    (
        "c",
        {"model.feature_centering": True, "strategy.name": "control-variates"},
        "model.feature_centering",
        "no place for what control-variates sends or keeps",
        "another strategy",
    ),
    (
        "c",
        {
            "model.feature_centering": True,
            "training.rounds": None,
            "training.learning_rate": None,
            "stages": [{"name": "feature-centering", "rounds": 1, "learning_rate": 0.1}],
        },
        "stages",
        "the round that measures the mean is called feature-centering",
        "rename",
    ),
    ("c", {"preprocessing.channels": 2}, "preprocessing.channels", "must be 1 or 3", "name the"),
    (
        "c",
        {"preprocessing.channel": [{"name": "t1"}, {"name": "t2"}]},
        "preprocessing.channels",
        "there are 2 named channels",
        "set channels = 2",
    ),
    (
        "c",
        {"preprocessing.channels": 2, "preprocessing.channel": [{"name": "a"}, {"name": "a"}]},
        "preprocessing.channel",
        "must differ",
        "rename",
    ),
    (
        "c",
        {"preprocessing.channel": [{"name": "ct", "window": [2, 1]}]},
        "preprocessing.channel.0.window",
        "must rise",
        "swap",
    ),
    (
        "c",
        {
            "preprocessing.channels": 3,
            "preprocessing.channel": [{"name": name} for name in "abc"],
            "preprocessing.intensity": "imagenet",
        },
        "preprocessing.intensity",
        "of colours, not of channels",
        "zscore",
    ),
    (
        "c",
        {"preprocessing.augmentation.drop_channel": 0.5},
        "preprocessing.augmentation.drop_channel",
        "two named channels",
        "remove it",
    ),
    ("s", {"table": {"column": [AGE]}}, "table", "one feature vector of an image", "remove it"),
    ("c", {"table": {"column": [AGE, {**AGE, "name": "AGE"}]}}, "table.column", "differ", "rename"),
    ("c", {"table": {"column": [{**AGE, "range": [9, 9]}]}}, f"{FIRST}.range", "rise", "swap"),
    ("c", {"table": {"column": [{**AGE, "values": ["a", "b"]}]}}, f"{FIRST}.values", "cat", "r"),
    ("c", {"table": {"column": [{**AGE, "range": None}]}}, f"{FIRST}.range", "needs", "add"),
    ("c", {"table": {"column": [{**SEX, "values": ["m"]}]}}, f"{FIRST}.values", "two", "add"),
    ("c", {"table": {"column": [{**SEX, "values": ["m", "M"]}]}}, f"{FIRST}.values", "differ", "n"),
    ("c", {"table": {"column": [{**SEX, "unit": "y"}]}}, f"{FIRST}.unit", "number", "remove"),
    ("c", {"table": {"column": [{**SEX, "range": [0, 1]}]}}, f"{FIRST}.range", "number", "remove"),
    ("c", {"metrics.primary": "f1"}, "metrics.primary", "one of the metrics in report", "add it"),
    (
        "c",
        {"strategy.name": "control-variates", "privacy": DP},
        "strategy.name",
        "noise of an update does not cover what control-variates sends besides it",
        "another strategy",
    ),
    (
        "c",
        {"strategy.name": "control-variates", "participation.sites": 1},
        "participation.sites",
        "control-variates needs 2 sites",
        "raise sites",
    ),
]


@pytest.fixture(autouse=True)
def _strategy_that_sends_more(control_variates: object) -> None:
    """For the rules that no shipped strategy can break."""


@pytest.mark.parametrize(("base", "changes", "key", "rule", "fix"), BROKEN)
def test_a_broken_rule_names_key_rule_and_next_step(
    base: str,
    changes: dict[str, Any],
    key: str,
    rule: str,
    fix: str,
    classification: str,
    segmentation: str,
    change: Change,
) -> None:
    plan = change({"c": classification, "s": segmentation}[base], changes)
    with pytest.raises(PlanError) as caught:
        plan_from(plan)
    error = caught.value
    assert error.where == key
    assert rule in error.rule
    assert error.value == stated_value(plan, key)
    assert fix in error.fix[:1].lower() + error.fix[1:]
    assert str(error).startswith(f"{key}: ") and rule in str(error) and error.fix in str(error)


def stated_value(plan: dict[str, Any], key: str) -> str | None:
    """What the plan says under a key, as a message shows it; None where it says nothing."""
    found: Any = plan
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    text = None if found is None else json.dumps(found, ensure_ascii=False)
    return text if text is None or len(text) <= 80 else f"{text[:77]}..."


def test_a_rule_between_sections_tells_the_value(classification: str, change: Change) -> None:
    plan = change(classification, {"model.name": "unet"})
    with pytest.raises(PlanError, match=r'^model\.name: .* \(got "unet"\)'):
        plan_from(plan)


def test_every_rule_in_the_source_has_a_broken_plan(
    classification: str, segmentation: str, change: Change
) -> None:
    stated = {
        (module.__file__, line)
        for module in (schema, network_spec, strategy_spec)
        for line in _statements_of_rules(Path(str(module.__file__)).read_text("utf-8"))
    }
    reached: set[tuple[str | None, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for base, changes, *_ in BROKEN:
            with contextlib.suppress(PlanError):
                plan_from(change({"c": classification, "s": segmentation}[base], changes))
    finally:
        sys.settrace(before)
    assert len(stated) > 30
    assert sorted(line for line in stated - reached) == []


def _statements_of_rules(source: str) -> list[int]:
    """Lines on which a rule is yielded or raised."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield):
            lines.append(node.lineno)
        if isinstance(node, ast.Raise) and "_refuse" in ast.unparse(node):
            lines.append(node.lineno)
    return lines


def test_the_two_base_plans_are_valid(
    classification: str, segmentation: str, change: Change
) -> None:
    assert plan_from(change(classification, {})).study.name == "chest"
    assert plan_from(change(segmentation, {})).privacy.on


def test_boundaries_are_allowed(classification: str, segmentation: str, change: Change) -> None:
    plan_from(change(classification, {"participation.quorum": 2}))
    plan_from(change(segmentation, {"preprocessing.size": [64, 72]}))
    krum = {
        "strategy.name": "krum",
        "strategy.settings.malicious": 1,
        "participation.sites": 5,
        "participation.quorum": 5,
    }
    plan_from(change(classification, krum))
    stages = {**NONE, "stages": [STAGE, {**STAGE, "name": "all", "train": ["*"]}]}
    plan = plan_from(change(classification, stages))
    assert plan.rounds == 4
    assert [plan.stage_of(round_)[0].name for round_ in (1, 2, 3, 4)] == [
        "head",
        "head",
        "all",
        "all",
    ]


def test_the_first_broken_key_is_named_and_the_others_counted(
    classification: str, change: Change
) -> None:
    plan = change(classification, {"training.rounds": 0, "training.batch_size": 0, "metrics.x": 1})
    with pytest.raises(PlanError, match=r"^training\.rounds: must be at least 1 .* 2 more to mend"):
        plan_from(plan)
