from __future__ import annotations

import hashlib
import json
import random
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fedward.errors import PlanError
from fedward.plan import Plan, canonical, from_canonical, parse_plan, plan_from, plan_hash
from fedward.plan.schema import Privacy
from fedward.plan.text import to_toml, toml_text

Change = Callable[[str, dict[str, Any]], dict[str, Any]]
GOLDEN = "fd4d41cc6a23caa179a614b9aa4a2df2b769e7ca6e90f7503d58dc267e03869b"

DEFAULTS: dict[str, Any] = {
    "study.title": "",
    "study.intended_use": "",
    "task.dimensions": 2,
    "task.multi_label": False,
    "task.modality": ("any",),
    "images.series_description": (),
    "images.image_type": (),
    "images.body_part": (),
    "images.intent": (),
    "images.kernel": (),
    "preprocessing.patch": None,
    "preprocessing.spacing": None,
    "preprocessing.resize": "stretch",
    "preprocessing.channels": 1,
    "preprocessing.channel": (),
    "preprocessing.window": None,
    "preprocessing.percentiles": None,
    "preprocessing.intensity": "zscore",
    "preprocessing.gantry_tilt": "refuse",
    "preprocessing.augmentation.flip": (),
    "preprocessing.augmentation.rotate": 0.0,
    "preprocessing.augmentation.scale": 0.0,
    "preprocessing.augmentation.shift": 0.0,
    "preprocessing.augmentation.contrast": 0.0,
    "preprocessing.augmentation.brightness": 0.0,
    "preprocessing.augmentation.noise": 0.0,
    "preprocessing.augmentation.gamma": 0.0,
    "preprocessing.augmentation.blur": 0.0,
    "preprocessing.augmentation.low_resolution": 0.0,
    "preprocessing.augmentation.drop_channel": 0.0,
    "preprocessing.augmentation.bias_field": 0.0,
    "table": None,
    "split.validation": 0.1,
    "split.test": 0.2,
    "split.seed": 0,
    "split.given": False,
    "model.channels": None,
    "model.taps": None,
    "model.dropout": 0.0,
    "model.deep_supervision": False,
    "model.feature_centering": False,
    "model.initial_weights": None,
    "training.rounds": None,
    "training.learning_rate": None,
    "training.local_epochs": None,
    "training.local_steps": None,
    "training.batch_size": 32,
    "training.optimizer": "adamw",
    "training.momentum": 0.0,
    "training.weight_decay": 0.0,
    "training.schedule": "cosine",
    "training.warmup_rounds": 0,
    "training.keep": "last",
    "training.averaged_rounds": None,
    "training.patience": None,
    "training.gradient_clipping": None,
    "training.class_weights": None,
    "training.label_smoothing": 0.0,
    "stages": (),
    "strategy.name": "fedavg",
    "strategy.settings": {},
    "strategy.weighting": "images",
    "strategy.max_share": 0.8,
    "strategy.max_norm_ratio": 10.0,
    "strategy.averaging": 0.0,
    "privacy.unit": "patient",
    "privacy.epsilon": None,
    "privacy.delta": None,
    "privacy.clipping_norm": None,
    "privacy.sampling_rate": None,
    "privacy.images_per_patient": 1,
    "privacy.centering_steps": None,
    "privacy.audit": False,
    "participation.sites": 2,
    "participation.quorum": None,
    "participation.deadline": 3600.0,
    "participation.retries": 1,
    "participation.minimum_patients": 2,
    "metrics.evaluate_every": 1,
    "metrics.epsilon": 4.0,
    "metrics.images_per_patient": 1,
    "personal": None,
    "compression": None,
}

TIED = {
    "model.taps",
    "table",
    "preprocessing.channel",
    "preprocessing.augmentation.drop_channel",
    "model.feature_centering",
    "model.deep_supervision",
    "preprocessing.gantry_tilt",
    "preprocessing.patch",
    "version",
    *(f"task.{key}" for key in ("kind", "dimensions", "multi_label")),
    "model.name",
    "stages",
    *(f"strategy.{key}" for key in ("name", "settings")),
    *(f"training.{key}" for key in ("local_epochs", "local_steps", "loss")),
    *(f"training.{key}" for key in ("momentum", "label_smoothing", "gradient_clipping")),
    *(f"training.{key}" for key in ("keep", "averaged_rounds")),
    *(f"privacy.{key}" for key in ("mechanism", "unit", "epsilon", "delta")),
    *(f"privacy.{key}" for key in ("clipping_norm", "sampling_rate", "centering_steps")),
    *(f"metrics.{key}" for key in ("primary", "report.0", "report.1")),
}


def _shuffled(table: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    items = list(table.items())
    rng.shuffle(items)
    return {k: _shuffled(v, rng) if isinstance(v, dict) else v for k, v in items}


def test_the_hash_of_a_plan_is_the_one_on_record(classification: str) -> None:
    # A change here means that every hash that a site has signed off changes with it.
    assert plan_hash(parse_plan(classification)) == GOLDEN


def test_the_hash_is_that_of_sorted_compact_json(segmentation: str) -> None:
    plan = parse_plan(segmentation)
    expected = json.dumps(
        plan.model_dump(mode="json", exclude_defaults=True),
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    )
    assert canonical(plan) == expected
    assert plan_hash(plan) == hashlib.sha256(expected.encode()).hexdigest()


def test_a_default_keeps_its_value_for_good() -> None:
    # Canonical text leaves defaults out: with another default an old hash would mean another study.
    # A new key adds a line here; a line that is here never changes.
    assert dict(_defaults(Plan)) == DEFAULTS


def test_a_plan_of_the_previous_release_keeps_its_hash(classification: str) -> None:
    class Newer(Privacy):
        added: bool = False

    class NewerPlan(Plan):
        privacy: Newer

    newer = NewerPlan.model_validate(tomllib.loads(classification))
    assert plan_hash(newer) == GOLDEN
    assert from_canonical(canonical(newer)) == parse_plan(classification)


def _defaults(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _defaults(inner, f"{prefix}{name}.")
        elif not field.is_required():
            yield prefix + name, field.get_default(call_default_factory=True)


@pytest.mark.parametrize("seed", range(5))
def test_order_does_not_change_the_hash(seed: int, classification: str) -> None:
    plan = tomllib.loads(classification)
    assert plan_hash(plan_from(_shuffled(plan, random.Random(seed)))) == GOLDEN


def test_comments_and_spaces_do_not_change_the_hash(classification: str) -> None:
    text = classification.replace("\n", "  # a comment\n").replace(" = ", "=")
    assert plan_hash(parse_plan(text)) == GOLDEN


def test_written_out_defaults_do_not_change_the_hash(classification: str) -> None:
    assert plan_hash(parse_plan(to_toml(parse_plan(classification)))) == GOLDEN


def test_another_way_to_write_a_number_does_not_change_the_hash(
    classification: str, change: Change
) -> None:
    def hashed(**changes: Any) -> str:
        return plan_hash(plan_from(change(classification, changes)))

    assert hashed(**{"training.learning_rate": 0.001}) == GOLDEN
    assert hashed(**{"training.weight_decay": 0}) == GOLDEN
    mu = {"strategy.name": "fedprox", "strategy.settings.mu": 1}
    assert hashed(**mu) == hashed(**{**mu, "strategy.settings.mu": 1.0})
    malicious = {"strategy.name": "krum", "participation.sites": 5}
    assert hashed(**malicious, **{"strategy.settings.malicious": 0}) == hashed(
        **malicious, **{"strategy.settings.malicious": 0.0}
    )


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list) and item:
            yield from _leaves(item, (*path, key))
        else:
            yield (*path, key)


def _other(value: Any) -> list[Any]:
    """Values near this one, some of which the schema allows in its place."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, value + 2, value - 2, value + 8]
    if isinstance(value, float):
        return [value + 0.125, value / 2]
    if isinstance(value, str):
        return [value + "x", "f" * 64, "adam", "constant", "fit", "unit", "patients", "iou", "CT"]
    if isinstance(value, list):
        return [["horizontal"], [{"name": "a", "rounds": 1, "learning_rate": 0.5}]]
    if isinstance(value, dict):
        return [{"mu": 0.5}]
    tables = [
        {"file": "w", "sha256": "0" * 64},
        {"method": "fedbn"},
        {"method": "int8"},
        {"foreground": 0.5},
    ]
    return [1, 0.5, [16, 32], [0.0, 1.0], [1.0, 1.0], *tables]


@pytest.mark.parametrize("base", ["classification", "segmentation"])
def test_any_value_changes_the_hash(base: str, request: pytest.FixtureRequest) -> None:
    plan = parse_plan(request.getfixturevalue(base))
    before, kept = plan_hash(plan), []
    for path in _leaves(plan.model_dump(mode="json")):
        hashes = {plan_hash(other) for other in _neighbours(plan, path)}
        assert before not in hashes, path
        if not hashes:
            kept.append(".".join(map(str, path)))
    # What no single change can alter: the rules tie it to another key, or it has one value only.
    assert set(kept) <= TIED


def _neighbours(plan: Plan, path: tuple[str | int, ...]) -> Iterator[Plan]:
    value: Any = plan.model_dump(mode="json")
    for key in path:
        value = value[key]
    for other in (other for other in _other(value) if other != value):
        dump: Any = plan.model_dump(mode="json")
        table = dump
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = other
        try:
            yield plan_from(dump)
        except PlanError:
            continue


NUMBERS = st.fixed_dictionaries(
    {
        "training.rounds": st.integers(1, 10_000),
        "training.learning_rate": st.floats(1e-12, 1e6),
        "training.batch_size": st.integers(1, 4096),
        "training.weight_decay": st.floats(0, 1e300),
        "training.class_weights": st.lists(st.floats(1e-300, 1e300), min_size=2, max_size=2),
        "split.seed": st.integers(0, 2**63 - 1),
        "split.validation": st.floats(0, 0.4),
        "split.test": st.floats(0, 0.5),
        "preprocessing.augmentation.rotate": st.floats(0, 180),
        "preprocessing.augmentation.noise": st.floats(0, 2),
        "participation.deadline": st.floats(1e-3, 1e12),
        "privacy": st.fixed_dictionaries(
            {
                "mechanism": st.just("dp-sgd"),
                "epsilon": st.floats(1e-6, 100),
                "delta": st.floats(1e-12, 0.5),
                "clipping_norm": st.floats(1e-6, 1e6),
                "sampling_rate": st.floats(1e-9, 1),
                "images_per_patient": st.integers(1, 64),
            }
        ),
    }
)


@given(numbers=NUMBERS, title=st.text(st.characters(codec="utf-8"), max_size=200))
def test_canonical_and_toml_read_back_as_the_same_plan(numbers: dict[str, Any], title: str) -> None:
    plan = plan_from(_with(numbers, title))
    again = from_canonical(canonical(plan))
    assert again == plan
    assert canonical(again) == canonical(plan)
    assert parse_plan(to_toml(plan)) == plan


def _with(numbers: dict[str, Any], title: str) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "version": 1,
        "study": {"name": "any", "title": title},
        "task": {"kind": "classification", "classes": ["a", "b"]},
        "preprocessing": {"size": [32, 32]},
        "model": {"name": "cnn"},
        "training": {"local_epochs": 1, "loss": "cross_entropy"},
        "metrics": {"report": ["auc"], "primary": "auc"},
    }
    for path, value in numbers.items():
        *parents, key = path.split(".")
        table = plan
        for parent in parents:
            table = table.setdefault(parent, {})
        table[key] = value
    return plan


def test_stages_and_weights_read_back_from_toml(classification: str, change: Change) -> None:
    stage = {"name": "head", "rounds": 2, "learning_rate": 0.01, "train": ["head.*", "odd[!a]?"]}
    plan = plan_from(
        change(
            classification,
            {
                "training.rounds": None,
                "training.learning_rate": None,
                "stages": [stage, {**stage, "name": "all"}],
                "model.initial_weights": {"file": "a\\b\x7f\n.pth", "sha256": "a" * 64},
            },
        )
    )
    assert parse_plan(to_toml(plan)) == plan


def test_keys_that_toml_would_misread_are_quoted() -> None:
    value = {"a b": {"c.d": 1, "": [1.5, True]}, "é": ["x"]}
    assert tomllib.loads(toml_text(value)) == value
