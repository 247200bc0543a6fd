from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedward.errors import PlanError
from fedward.plan import from_canonical, load_plan, parse_plan, plan_from

Change = Callable[[str, dict[str, Any]], dict[str, Any]]

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"training.round": 3}, "training.round", "this key is not known"),
    ({"extra.section": 3}, "extra", "this key is not known"),
    ({"stages": [{"name": "a", "foo": 1}]}, "stages.0.rounds", "required"),
    ({"training.rounds": "3"}, "training.rounds", "must be a whole number"),
    ({"training.rounds": True}, "training.rounds", "must be a whole number"),
    ({"training.rounds": 3.0}, "training.rounds", "must be a whole number"),
    ({"training.learning_rate": "0.1"}, "training.learning_rate", "must be a number"),
    ({"training.learning_rate": True}, "training.learning_rate", "must be a number"),
    ({"training.learning_rate": math.nan}, "training.learning_rate", "finite"),
    ({"training.learning_rate": math.inf}, "training.learning_rate", "finite"),
    ({"training.learning_rate": 0}, "training.learning_rate", "must be greater than 0"),
    ({"training.weight_decay": math.inf}, "training.weight_decay", "finite"),
    ({"training.batch_size": 5000}, "training.batch_size", "must be at most 4096"),
    ({"split.test": 1}, "split.test", "must be less than 1"),
    ({"split.given": 1}, "split.given", "must be true or false"),
    ({"split.seed": -1}, "split.seed", "must be at least 0"),
    ({"preprocessing.window": [-math.inf, math.inf]}, "preprocessing.window.0", "finite"),
    ({"preprocessing.size": 32}, "preprocessing.size", "must be a list"),
    ({"preprocessing.size": [[32]]}, "preprocessing.size.0", "must be a whole number"),
    ({"preprocessing.size": [8] * 4}, "preprocessing.size", "at most 3 entries"),
    ({"preprocessing.channels": 2}, "preprocessing.channels", "must be 1 or 3"),
    ({"preprocessing.channels": True}, "preprocessing.channels", "must be a whole number"),
    ({"task.dimensions": 2.0}, "task.dimensions", "must be a whole number"),
    ({"version": True}, "version", "must be a whole number"),
    ({"version": 1.0}, "version", "must be a whole number"),
    ({"version": 2}, "version", "must be 1"),
    ({"task.classes": []}, "task.classes", "at least 1 entries"),
    ({"task.classes": "a"}, "task.classes", "must be a list"),
    ({"task.kind": "registration"}, "task.kind", "'segmentation' or 'detection'"),
    ({"study.name": "No Spaces"}, "study.name", "must match the pattern"),
    ({"study.name": 3}, "study.name", "must be text"),
    ({"study.title": "x" * 201}, "study.title", "at most 200 characters"),
    ({"study.title": "\ud800"}, "study.title", "Unicode"),
    ({"training": [1]}, "training", "must be a table"),
    ({"strategy.settings": [1.0]}, "strategy.settings", "must be a table"),
    ({"strategy.settings.mu": True}, "strategy.settings.mu", "must be a number"),
    ({"strategy.settings.mu": math.nan}, "strategy.settings.mu", "finite"),
    ({"model.initial_weights": {"file": ""}}, "model.initial_weights.file", "at least 1 char"),
]


@pytest.mark.parametrize(("changes", "key", "rule"), WRONG)
def test_a_wrong_value_names_key_rule_and_next_step(
    changes: dict[str, Any], key: str, rule: str, classification: str, change: Change
) -> None:
    with pytest.raises(PlanError) as caught:
        plan_from(change(classification, changes))
    assert caught.value.where == key
    assert rule in caught.value.rule
    assert caught.value.fix
    str(caught.value).encode()  # can be printed and sent


@pytest.mark.parametrize(
    "path", ["version", "study", "task.kind", "training.loss", "metrics.primary"]
)
def test_what_is_required_is_asked_for(
    path: str, classification: str, change: Change, remove: object
) -> None:
    with pytest.raises(PlanError, match=rf"^{path}: this key is required\. Add it"):
        plan_from(change(classification, {path: remove}))


@pytest.mark.parametrize("text", ["", "version = 1", "a.b.c = nan", "version = [1, [2]]"])
def test_almost_nothing_is_an_error(text: str) -> None:
    with pytest.raises(PlanError, match=r"more to mend after this one"):
        parse_plan(text)


@pytest.mark.parametrize("text", ["version = ", "version = 1\nversion = 2", "[study", "\x00", "{}"])
def test_what_is_not_toml_is_an_error(text: str) -> None:
    with pytest.raises(PlanError, match=r"must be valid TOML"):
        parse_plan(text)


@pytest.mark.parametrize("depth", [200, 20_000])
def test_huge_nesting_is_an_error(depth: int, classification: str, change: Change) -> None:
    with pytest.raises(PlanError):
        parse_plan(f"version = {'[' * depth}{']' * depth}")
    with pytest.raises(PlanError):
        from_canonical(f'{{"version":{"[" * depth}{"]" * depth}}}')
    nested: Any = 1
    for _ in range(depth):
        nested = {"a": nested}
    with pytest.raises(PlanError):
        plan_from(change(classification, {"study.title": nested}))


@pytest.mark.parametrize("text", ["", "1", "[]", "null", "{", '{"version":NaN}', '"a"'])
def test_a_broken_plan_on_the_wire_is_an_error(text: str) -> None:
    with pytest.raises(PlanError):
        from_canonical(text)


def test_a_file_must_be_there_and_be_utf8(tmp_path: Path, classification: str) -> None:
    with pytest.raises(PlanError, match=r"must be readable \(got none\.toml\)\. Check"):
        load_plan(tmp_path / "none.toml")
    with pytest.raises(PlanError, match="must be readable"):
        load_plan(tmp_path)
    latin = tmp_path / "latin.toml"
    latin.write_bytes('title = "Brustkorb, Röntgen"'.encode("latin-1"))
    with pytest.raises(
        PlanError, match=r"must be UTF-8 text \(got latin\.toml\)\. Save it as UTF-8"
    ):
        load_plan(latin)


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path, classification: str) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + classification.replace("\n", "\r\n").encode())
    assert load_plan(path) == plan_from(tomllib.loads(classification))


def test_messages_hold_no_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        load_plan(tmp_path / "none.toml")
    assert str(tmp_path) not in str(caught.value)
