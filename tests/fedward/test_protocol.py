"""Records on the wire: they come back as they went, and nothing else gets in or is quoted."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_values import sample

from fedward.errors import PlanError, ProtocolError
from fedward.plan import canonical, plan_hash
from fedward.printable import printable
from fedward.protocol import (
    OPTIONAL,
    EvaluateOutcome,
    Record,
    Refusal,
    RefusalKind,
    RoundOrder,
    SiteFacts,
    TrainOutcome,
)
from fedward.rule_codes import GENERAL, RuleCode

NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._ -]{0,63}\Z")
COUNTS = st.integers(0, 2**60)
FIGURES = st.floats(allow_nan=False, allow_infinity=False)
MAYBE = st.none() | FIGURES
PARTS = st.sampled_from(["validation", "test"])
TEXTS = (
    st.text(st.characters(codec="utf-8"), max_size=200)
    .map(printable)
    .filter(lambda text: len(text) <= 200)
)
SECRET = "DOE^JANE-1.2.840.113619"

RECORDS: dict[type[Record], st.SearchStrategy[Record]] = {
    SiteFacts: st.builds(
        SiteFacts,
        site=NAMES,
        synthetic=st.booleans(),
        **dict.fromkeys(
            [
                part + kind
                for kind in ("patients", "images")
                for part in ("", "train_", "validation_", "test_")
            ],
            COUNTS,
        ),
        class_counts=st.lists(COUNTS, max_size=5).map(tuple),
        left_out_reasons=st.lists(TEXTS.map(lambda text: text[:64]), max_size=3).map(tuple),
        left_out_counts=st.lists(COUNTS, max_size=3).map(tuple),
    ),
    TrainOutcome: st.builds(
        TrainOutcome,
        site=NAMES,
        round=COUNTS,
        patients=COUNTS,
        images=COUNTS,
        steps=COUNTS,
        loss=MAYBE,
        seconds=FIGURES,
        cpu_seconds=FIGURES,
        epsilon=MAYBE,
        delta=MAYBE,
        noise_multiplier=MAYBE,
        sampling_rate=MAYBE,
    ),
    EvaluateOutcome: st.builds(
        EvaluateOutcome, site=NAMES, round=COUNTS, part=PARTS, images=COUNTS, seconds=FIGURES
    ),
    Refusal: st.builds(
        lambda site, round_, code: Refusal(site=site, round=round_, code=code, values=sample(code)),
        NAMES,
        COUNTS,
        st.sampled_from(RuleCode),
    ),
}
EXAMPLES: list[Record] = [
    SiteFacts(
        site="a",
        patients=1,
        images=1,
        train_patients=1,
        validation_patients=0,
        test_patients=0,
        train_images=1,
        validation_images=0,
        test_images=0,
        class_counts=(1, 0),
    ),
    TrainOutcome(site="a", round=1, patients=1, images=1, steps=1, seconds=0.5),
    EvaluateOutcome(site="a", round=1, part="test", images=1, seconds=0.5),
    Refusal(site="a", round=1, code=RuleCode.EPSILON, values=sample(RuleCode.EPSILON)),
]
one_of_each = pytest.mark.parametrize("record", EXAMPLES, ids=lambda r: type(r).__name__)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_record_comes_back_as_it_went(kind: type[Record], data: st.DataObject) -> None:
    record = data.draw(RECORDS[kind])
    flat = record.to_flat()
    assert kind.from_flat(flat) == record
    assert None not in flat.values()
    assert all(isinstance(v, bool | int | float | str | list) for v in flat.values())


def test_an_order_comes_back_with_its_plan(make_plan: Any) -> None:
    plan = make_plan()
    order = RoundOrder(
        plan=canonical(plan), plan_hash=plan_hash(plan), round=3, part="test", seed=4
    )
    again = RoundOrder.from_flat(order.to_flat())
    assert again == order
    assert again.read_plan() == plan


def refuse(kind: type[Record], flat: dict[str, Any]) -> str:
    with pytest.raises(ProtocolError) as caught:
        kind.from_flat(flat)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return str(caught.value)


@one_of_each
def test_an_unknown_key_is_refused_and_not_quoted(record: Record) -> None:
    told = refuse(type(record), {**record.to_flat(), SECRET: SECRET})
    assert SECRET not in told
    assert type(record).__name__ in told


@one_of_each
def test_a_missing_key_is_named(record: Record) -> None:
    for key, field in type(record).model_fields.items():
        if field.is_required():
            flat = {k: v for k, v in record.to_flat().items() if k != key}
            assert refuse(type(record), flat).startswith(f"{key}:")


@one_of_each
def test_a_wrong_type_is_refused_and_not_quoted(record: Record) -> None:
    for key, value in record.to_flat().items():
        wrong: list[Any] = [b"x", None, {"a": 1}, [SECRET, 1]]
        wrong += [f"../{SECRET}"] if key in {"site", "part"} else []
        wrong += [SECRET] if not isinstance(value, str) else [7]
        for other in wrong:
            told = refuse(type(record), {**record.to_flat(), key: other})
            assert SECRET not in told


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_are_finite(value: float) -> None:
    for key in ("loss", "seconds", "cpu_seconds", "epsilon", "delta"):
        assert refuse(TrainOutcome, {**EXAMPLES[1].to_flat(), key: value}).startswith(key)


@pytest.mark.parametrize("value", [-1, True, 1.0, "1"])
def test_counts_are_whole_and_not_negative(value: object) -> None:
    refuse(TrainOutcome, {**EXAMPLES[1].to_flat(), "patients": value})


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(version: object) -> None:
    refuse(Refusal, {**EXAMPLES[3].to_flat(), "version": version})


@pytest.mark.parametrize("name", ["", ".x", "a/b", "a\nb", "x" * 65, "a\n", "../a"])
def test_a_site_name_is_short_and_plain(name: str) -> None:
    refuse(Refusal, {**EXAMPLES[3].to_flat(), "site": name})


def test_texts_have_a_limit() -> None:
    sentence = {"site": "a", "round": 1, "rule": "no"}  # of a release before codes
    assert Refusal.from_flat({**sentence, "rule": "x" * 500}).code is RuleCode.ERROR
    refuse(Refusal, {**sentence, "rule": "x" * 501})
    refuse(Refusal, {**sentence, "value": "x" * 201})


@pytest.mark.parametrize(
    ("code", "values"),
    [
        ("epsilon", {"asked": 8.0}),
        ("epsilon", {"asked": 8.0, "limit": SECRET}),
        ("epsilon", {"asked": 8.0, "limit": 4.0, SECRET: 1.0}),
        ("epsilon", {"asked": 19610403.0, "limit": 4.0}),
        ("epsilon", {"asked": 8, "limit": 4.0}),
        ("epsilon", {"asked": math.inf, "limit": 4.0}),
        ("epsilon", {"asked": math.nan, "limit": 4.0}),
        ("trained-once", {"round": 10**400}),
        ("trained-once", {"round": -(10**13)}),
        ("trained-once", {"round": True}),
        ("trained-once", {"round": 19610403}),
        ("model", {"model": SECRET}),
        ("model", {"model": ["cnn"]}),
        ("model", {"model": b"cnn"}),
        ("images-usable", {"reasons": "no label"}),
        ("images-usable", {"reasons": ["no label", SECRET]}),
        ("images-usable", {"reasons": ["no label"] * 9}),
        ("images-usable", {"reasons": [["no label"]]}),
        ("pending", {"": 1}),
        (SECRET, {}),
        ("", {}),
        ("EPSILON", {"asked": 8.0, "limit": 4.0}),
        ("a" * 64 + "\x1b", {}),
        (None, {}),
        (7, {}),
    ],
)
def test_a_refusal_has_no_place_for_a_text(code: Any, values: dict[str, Any]) -> None:
    flat = {"site": "a", "round": 1, "code": code}
    flat |= {f"value.{name}": value for name, value in values.items()}
    assert SECRET not in refuse(Refusal, flat)
    refuse(Refusal, {"site": "a", "round": 1, "code": "epsilon", "values": values})
    refuse(Refusal, {"site": "a", "round": 1, "code": "pending", "rule": SECRET})
    refuse(Refusal, {"site": "a", "round": 1, "code": "pending", "value": SECRET})


@pytest.mark.parametrize("kind", get_args(RefusalKind))
def test_what_another_release_says_is_told_in_general(kind: RefusalKind) -> None:
    newer = {"code": "a-rule-of-next-year", "value.patient": SECRET}
    older = {"rule": f"a rule of {SECRET}", "value": SECRET, "charged": False}
    for told in (newer, older):
        made = Refusal.from_flat({"site": "a", "round": 1, "kind": kind, **told})
        assert (made.kind, made.code, made.values) == (kind, GENERAL[kind], {})
        assert SECRET not in repr(made) + json.dumps(made.to_flat())
    assert made.charged is False
    refuse(Refusal, {"site": "a", "round": 1, "kind": SECRET, **newer})
    refuse(Refusal, {"site": "a", "round": 1, "kind": SECRET, **older})


def test_a_plan_with_another_hash_is_refused(make_plan: Any) -> None:
    plan = make_plan()
    flat = RoundOrder(plan=canonical(plan), plan_hash=plan_hash(plan), round=1).to_flat()
    told = refuse(RoundOrder, {**flat, "plan": canonical(plan) + " "})
    assert "hash" in told
    assert canonical(plan) not in told
    refuse(RoundOrder, {**flat, "plan_hash": "A" * 64})
    refuse(RoundOrder, {**flat, "part": "all"})
    assert get_args(RoundOrder.model_fields["part"].annotation) == ("validation", "test")


def test_what_is_hashed_must_be_a_plan() -> None:
    import hashlib

    for text in ("", "[]", "{}", "{", "null", "[" * 100_000):
        digest = hashlib.sha256(text.encode()).hexdigest()
        order = RoundOrder.from_flat({"plan": text, "plan_hash": digest, "round": 1})
        with pytest.raises(PlanError):
            order.read_plan()


class NextFacts(SiteFacts):
    """Facts of a later release: a field that readers may ignore, and one that they may not."""

    cores: Annotated[int | None, OPTIONAL] = None
    unit: str | None = None


def test_facts_of_the_next_release_are_read_without_what_is_optional() -> None:
    facts = NextFacts(**EXAMPLES[0].model_dump(), cores=4)
    flat = facts.to_flat()
    assert flat["optional"] == ["cores"]
    assert SiteFacts.from_flat(flat) == EXAMPLES[0]
    assert NextFacts.from_flat(flat) == facts
    assert NextFacts.from_flat(EXAMPLES[0].to_flat()).cores is None
    told = refuse(SiteFacts, NextFacts(**EXAMPLES[0].model_dump(), cores=4, unit="mm").to_flat())
    assert "unit" not in told


@one_of_each
@pytest.mark.parametrize(
    "optional", [SECRET, [], ["other"], [1], [[SECRET]], {SECRET: 1}, None, True, [SECRET, 1]]
)
def test_an_unknown_key_is_ignored_only_where_the_record_names_it(
    record: Record, optional: Any
) -> None:
    told = refuse(type(record), {**record.to_flat(), SECRET: SECRET, "optional": optional})
    assert SECRET not in told


@one_of_each
def test_a_known_field_is_read_also_where_it_is_called_optional(record: Record) -> None:
    names = list(type(record).model_fields)
    assert type(record).from_flat({**record.to_flat(), "optional": names}) == record
    refuse(type(record), {**record.to_flat(), "site": 1, "optional": names})


def test_a_kind_of_refusal_that_a_later_release_added_is_an_error() -> None:
    flat = {**EXAMPLES[3].to_flat(), "kind": "a-later-kind"}
    assert Refusal.from_flat(flat).kind == "error"
    refuse(Refusal, {**flat, "kind": ["policy"]})
