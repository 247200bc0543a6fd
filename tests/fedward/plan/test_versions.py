"""Plans survive a release: hashes stay, and a plan says which schema version it needs."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, Field, ValidationError, create_model

from fedward.errors import PlanError, SchemaError
from fedward.plan import (
    SCHEMA_VERSION,
    Plan,
    canonical,
    from_canonical,
    load_plan,
    parse_plan,
    plan_hash,
    schema_needed,
)
from fedward.plan.schema import Section, Stage, Training
from fedward.plan.versions import Since, used, vocabulary
from fedward.strategies import STRATEGIES

STUDIES = Path(__file__).parents[3] / "studies"
KNOWN = Path(__file__).with_name("schema_versions.json")
# Hospitals have signed these off. A change here changes the studies.
HASHES = {
    "blood-cells.toml": "abe199c85dcee9b935d48fe2417f359ffa60ac29412eb5776c6afc7499f17b97",
    "brain-tumour.toml": "3988744c02ab58f0f267f1e43702da2241e5632dac05a3aae0d5d034d2d6e545",
    "covid-ct-transfer.toml": "39dcc977c9ffe2c9c409dfe6ef45aedfbb07205c21a9ec54ddec82911373e33b",
    "covid-ct-wan.toml": "78aae1391bdf164cf2a87116e337642a4f2f6af1ee1f17eb0bbd88b51bd147a3",
    "covid-ct.toml": "b1d744ea7d37a8cc51b8b66459b2e020d8f45990b0b3675bf57492bc04b813f0",
    "demo/classification.toml": "24ae18985b809b73c2d4406ff6119088d3fbd6a8985f6ad83b7e49c7172bf4f4",
    "demo/frozen.toml": "38ee7be88b986e2030c6dba54aa17e857f9b18ba8c63bf373d69a4a227bf1fc8",
    "demo/private.toml": "1951d1058517154810f91a5fde3593d289851a559500d89d3fd2939939404275",
    "demo/segmentation.toml": "a8f7271850ce997edc2ad193d2b182284abf8ea9c44ce17d767e709310116899",
    "ham10000-wan.toml": "9ad5244200f9f8296fa27ed2ddcd4034bfe55d56b7cbac14a7db05e824dfcc71",
    "hippocampus-wan.toml": "e81633225f9a7a830385df2a1b9f8e18a940fcac2ddf93b759c1f0211a83ffce",
    "hippocampus.toml": "6e3daf33ea7d0389d7993a8b6550d2ca8fe109d5be1d3a5a511837ef636016e4",
    "histology.toml": "09192cff5d751346f4145af9f0666de7bb5e260d3b3cd4270b712adb0b9ab819",
    "lgg-mri-wan.toml": "2659103cd2cbf45c8bfe8d525d362f8cbaf9ae8358c9c8511e9c3d1bc4e01c88",
    "lungs-private.toml": "a6f442dcb05166668ccadcadb64dda89824cc67ab79ec4ca44fa7602909cf25e",
    "lungs-synthetic.toml": "0da60c20f19c8ec6a51b61223bc36e36feed4c890c99eb2ed097f5d2bb6b6cd2",
    "lungs-wan.toml": "d9dd3cefe5759c3af50f63ea057e5dbeacc0a0cec5fd7763333d0c0d79831d53",
    "lungs.toml": "18dfe63b6bbc33b72904c9a0c72d38dc9dba369c2695a5b6e9c8c4df4cba862c",
    "pneumonia-transfer.toml": "decc016c586b946014362a157df8cb736cc2a411dc50767996a8b7fed66499f2",
    "pneumonia.toml": "bc6354f77eb99ff5568d4fd78ea7cffad3372c316cb484cbb0d08e4db3450ea2",
    "retina.toml": "ae108450ebdce03c0b70fc4d0223d06ab55a7b0960cd7978161a5fea6fe7716c",
    "skin.toml": "a4954d40253851827b4ca1157e696390f9253f67895c26ff4d1f97613aa253da",
}


class Added(Section):
    """A table that a later release adds."""

    number: float = 0.5
    words: tuple[str, ...] = ("one",)


@cache
def later(section: type[BaseModel]) -> type[BaseModel]:
    """A section as a later release has it: a new key of every kind, in it and in its tables."""
    fields: dict[str, Any] = {
        "added_number": (int, 3),
        "added_choice": (Literal["old", "new"], "old"),
        "added_nothing": (float | None, None),
        "added_list": (tuple[str, ...], ()),
        "added_map": (dict[str, float], Field(default_factory=dict)),
        "added_table": (Added, Added()),
        "added_optional_table": (Added | None, None),
        "added_tables": (tuple[Added, ...], ()),
    }
    for name, field in section.model_fields.items():
        annotation = _later_annotation(field.annotation)
        if annotation is field.annotation:
            continue
        if field.metadata:  # such as the version that a table came with
            annotation = Annotated[(annotation, *field.metadata)]
        if isinstance(field.default, BaseModel):
            default: Any = later(type(field.default)).model_validate(field.default.model_dump())
            fields[name] = (annotation, default)
        else:
            fields[name] = (annotation, ... if field.is_required() else field.default)
    return create_model(f"Later{section.__name__}", __base__=section, **fields)


def _later_annotation(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return later(annotation)
    parts = get_args(annotation)
    changed = tuple(_later_annotation(part) for part in parts)
    if all(new is old for new, old in zip(changed, parts, strict=True)):
        return annotation
    if get_origin(annotation) in (Union, UnionType):
        return Union[changed]  # noqa: UP007
    assert get_origin(annotation) is tuple, annotation
    return tuple[changed]


def _plans() -> Iterator[str]:
    for path in sorted(STUDIES.rglob("*.toml")):
        if "study" in tomllib.loads(path.read_text("utf-8")):
            yield path.relative_to(STUDIES).as_posix()


def test_every_ready_study_has_its_hash_on_record() -> None:
    assert {name: plan_hash(load_plan(STUDIES / name)) for name in _plans()} == HASHES


@pytest.mark.parametrize("name", HASHES)
def test_new_keys_at_every_level_change_no_hash(name: str) -> None:
    text = (STUDIES / name).read_text("utf-8")
    plan, newer = parse_plan(text), _read(later(Plan), text)
    for table in (newer, newer.training, newer.split, newer.preprocessing.augmentation):
        assert type(table).__name__.startswith("Later")
    assert all(type(stage).__name__ == "LaterStage" for stage in newer.stages)
    assert canonical(newer) == canonical(plan)
    assert plan_hash(newer) == HASHES[name]
    assert from_canonical(canonical(newer)) == plan


def _read(schema: Any, text: str) -> Plan:
    plan = schema.model_validate(tomllib.loads(text))
    assert isinstance(plan, Plan)
    return plan


def test_optional_tables_and_settings_keep_their_text_too(classification: str) -> None:
    text = classification.replace('name = "cnn"', 'name = "cnn"\ninitial_weights.file = "w"')
    text += '\n[strategy]\nname = "fedadam"\nsettings = {eta = 0.2}\n[[stages]]\nname = "a"\n'
    text += "rounds = 1\nlearning_rate = 0.1\n"
    text = text.replace("rounds = 3\nlearning_rate = 1e-3\n", "").replace(
        'file = "w"', f'file = "w"\ninitial_weights.sha256 = "{"0" * 64}"'
    )
    newer = _read(later(Plan), text)
    assert type(newer.model.initial_weights).__name__ == "LaterInitialWeights"
    assert canonical(newer) == canonical(parse_plan(text))
    assert '"settings":{"eta":0.2}' in canonical(newer)


# Which version a plan needs.


class NewerStage(Stage):
    """A stage with a new key."""

    freeze: Annotated[bool, Since(3)] = False


class NewerTraining(Training):
    """Training with a new key, a new word of a choice, and a new word in a list."""

    warmup: Annotated[int, Since(2)] = 0
    optimizer: Annotated[Literal["sgd", "adam", "adamw", "lion"], Since(4, "lion")] = "adamw"
    log: tuple[Annotated[Literal["loss", "norm"], Since(5, "norm")], ...] = ("loss",)


class NewerPlan(Plan):
    """A plan of a later release."""

    training: NewerTraining
    stages: tuple[NewerStage, ...] = ()
    added: Annotated[Added | None, Since(6)] = None


STAGES = '[[stages]]\nname = "a"\nrounds = 1\nlearning_rate = 0.1\n'


@pytest.mark.parametrize(
    ("old", "new", "needed"),
    [
        ("loss =", "warmup = 0\nloss =", {}),
        ("loss =", "warmup = 2\nloss =", {"training.warmup": 2}),
        ("loss =", 'optimizer = "adam"\nloss =', {}),
        ("loss =", 'optimizer = "lion"\nloss =', {'training.optimizer = "lion"': 4}),
        ("loss =", 'log = ["loss"]\nloss =', {}),
        ("loss =", 'log = ["loss", "norm"]\nloss =', {'training.log = "norm"': 5}),
        ("[study]", "added = {}\n[study]", {"added": 6}),
        ("[study]", "added = {number = 1.0}\n[study]", {"added": 6}),
        ("rounds = 3\nlearning_rate = 1e-3", "warmup = 1", {"training.warmup": 2}),
        (
            "rounds = 3\nlearning_rate = 1e-3",
            "warmup = 1 # freeze",
            {"training.warmup": 2, "stages.freeze": 3},
        ),
    ],
)
def test_a_plan_needs_the_smallest_version_that_knows_what_it_uses(
    classification: str, old: str, new: str, needed: dict[str, int]
) -> None:
    text = classification.replace(old, new)
    if "rounds = 3" not in text:
        text += STAGES + ("freeze = true\n" if "freeze" in new else "")
    plan = _read(NewerPlan, text)
    assert used(plan) == needed
    version = max(needed.values(), default=1)
    assert schema_needed(plan) == version
    assert json.loads(canonical(plan)).get("schema", 1) == version
    if not needed:
        assert from_canonical(canonical(plan)).study.name == "chest"
        return
    # A plan of a version that is known, with what that version has not, is refused by its key.
    told = "newer schema" if version > SCHEMA_VERSION else "this key is not known"
    with pytest.raises(SchemaError, match=told):
        from_canonical(canonical(plan))


def test_a_new_setting_of_a_strategy_needs_its_version(
    classification: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fedadam = STRATEGIES["fedadam"].settings
    monkeypatch.setitem(fedadam, "tau", replace(fedadam["tau"], since=2))
    plain = classification + '[strategy]\nname = "fedadam"\n'
    assert used(parse_plan(plain)) == {}
    plan = parse_plan(plain + "settings = {tau = 0.1, eta = 0.1}\n")
    assert used(plan) == {"strategy.settings.tau": 2}
    assert vocabulary(Plan)["strategy.settings.fedadam.tau"] == 2
    # The same setting of another strategy is as old as it was.
    assert used(parse_plan(plain.replace("fedadam", "fedyogi") + "settings = {tau = 0.1}")) == {}


@pytest.mark.parametrize("stated", [None, SCHEMA_VERSION + 1, 1, True, "2", 2.0, [], -1])
@pytest.mark.parametrize(
    "change",
    [
        {"training": {"warmup": 2}},
        {"added": {"number": 1.0}},
        {"model": {"name": "a-later-model"}},
        {"strategy": {"name": "a-later-strategy"}},
        {"strategy": {"name": "fedadam", "settings": {"later": 1.0}}},
    ],
)
def test_a_plan_with_unknown_words_is_refused_also_where_it_hides_its_version(
    classification: str, change: dict[str, dict[str, Any]], stated: Any
) -> None:
    content = json.loads(canonical(parse_plan(classification)))
    for section, keys in change.items():
        content[section] = content.get(section, {}) | keys
    if stated is not None:
        content["schema"] = stated
    with pytest.raises(SchemaError):
        from_canonical(json.dumps(content, sort_keys=True, separators=(",", ":")))


@pytest.mark.parametrize("stated", [1, 0, -1, True, False, "2", 1.0, 2.0, None, [], {}])
def test_a_plan_has_one_text_whatever_version_is_stated(classification: str, stated: Any) -> None:
    # Else a denied plan would come back under another hash.
    content = json.loads(canonical(parse_plan(classification))) | {"schema": stated}
    with pytest.raises(PlanError, match="canonical"):
        from_canonical(json.dumps(content, sort_keys=True, separators=(",", ":")))


def test_the_version_of_another_plan_is_none_of_this_one(
    classification: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that knows version 2 takes neither a hidden nor an exaggerated version."""
    fedadam = STRATEGIES["fedadam"].settings
    monkeypatch.setitem(fedadam, "tau", replace(fedadam["tau"], since=2))
    monkeypatch.setattr("fedward.plan.load.SCHEMA_VERSION", 3)
    text = classification + '[strategy]\nname = "fedadam"\nsettings = {tau = 0.1}\n'
    right = canonical(parse_plan(text))
    assert from_canonical(right) == parse_plan(text)
    for wrong in (right.replace('"schema":2,', ""), right.replace('"schema":2', '"schema":3')):
        assert wrong != right
        with pytest.raises(PlanError, match="canonical"):
            from_canonical(wrong)


# What each version knows is on record.


def test_every_key_and_word_says_since_which_version_it_exists() -> None:
    """A key that a release added needs ``Since``; without it, an older site could not say why it
    refuses the plan. After a release: ``python -m tools.schema_versions > FILE``."""
    released, now = json.loads(KNOWN.read_text("utf-8")), vocabulary(Plan)
    gone = {name: since for name, since in released.items() if now.get(name) != since}
    assert not gone, "what a released version knows stays as it is"
    newest = max(released.values())
    unmarked = {name for name in now.keys() - released.keys() if now[name] <= newest}
    assert not unmarked, f"mark these with Since({newest + 1}), see fedward/plan/versions.py"


def test_what_is_new_has_a_default() -> None:
    def missing(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in section.model_fields.items():
            since = vocabulary(Plan)[prefix + name]
            above = vocabulary(Plan)[prefix.removesuffix(".")] if prefix else 1
            if field.is_required() and since > above:
                yield prefix + name
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from missing(inner, f"{prefix}{name}.")

    assert list(missing(Plan)) == []


def test_a_plan_file_states_no_schema_of_its_own(classification: str) -> None:
    with pytest.raises(PlanError, match="not known"):
        parse_plan("schema = 1\n" + classification)
    with pytest.raises(ValidationError):
        Plan.model_validate({"schema": 1, **tomllib.loads(classification)})
