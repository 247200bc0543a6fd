"""The gate: names, ids, dates, paths and pixels are planted in everything, and none gets out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.audit.log import AuditLog
from client.audit.verify import entries
from client.egress.gate import Gate, expected_arrays
from client.egress.refusal import refusal_for
from client.policy.decide import DatasetFacts
from client.policy.settings import Limits
from client.training.runtime import Runtime
from client.training.trainer import Trainer
from fedward.errors import DataError, EgressError, FedwardError, PolicyError
from fedward.models import build_model, to_arrays
from fedward.plan.schema import Plan
from fedward.protocol import Refusal, SiteFacts, TrainOutcome

PLANTED = (
    "DOE^JANE", "1.2.840.113619.2.55.3", "/data/ward-7/scan.dcm", "1961-04-03", "19610403",
    "MRN 00481516", "ward-7", "C:\\images\\x.dcm", "4815162342",
)  # fmt: skip
FACTS = DatasetFacts(40, 40, {"no": 20, "yes": 20})
LOOSE = Limits(minimum_count=1, rounding=9, require_privacy=False)


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    made: Plan = make_plan()
    return made


@pytest.fixture
def gate(plan: Plan, tmp_path: Path) -> Gate:
    return gate_of(plan, tmp_path)


def gate_of(plan: Plan | None, folder: Path, limits: Limits = LOOSE, **more: Any) -> Gate:
    values: dict[str, Any] = {"site": "north", "facts": FACTS, "max_upload_mib": 64.0, **more}
    return Gate(plan, limits, audit=AuditLog(folder / "audit"), **values)


def outcome(**changes: Any) -> TrainOutcome:
    values = {"site": "north", "round": 1, "patients": 30, "images": 30, "steps": 4, "loss": 0.5,
              "seconds": 1.23456789, **changes}  # fmt: skip
    return TrainOutcome.model_construct(**values)


def test_a_right_update_passes_and_is_rounded(plan: Plan, tmp_path: Path) -> None:
    arrays = to_arrays(build_model(plan, 0))
    gate = gate_of(plan, tmp_path, Limits(rounding=2))
    passed = gate.check_update(arrays, expected_arrays(plan, 1), outcome(), 1)
    assert (passed.seconds, passed.loss) == (1.23, 0.5)


@pytest.mark.parametrize("text", PLANTED)
def test_no_planted_text_leaves_in_any_record(plan: Plan, tmp_path: Path, text: str) -> None:
    gate = gate_of(plan, tmp_path)
    arrays = to_arrays(build_model(plan, 0))
    first = next(iter(arrays))
    wrong: list[tuple[dict[str, Any], TrainOutcome]] = [
        ({**arrays, text: np.zeros(3, np.float32)}, outcome()),
        ({text if name == first else name: value for name, value in arrays.items()}, outcome()),
        (arrays, outcome(site=text)),
        (arrays, outcome(round=text)),
        (arrays, outcome(patients=text)),
        (arrays, TrainOutcome.model_construct(**outcome().model_dump(), note=text)),
    ]
    told = ""
    for values, record in wrong:
        try:
            passed = gate.check_update(values, expected_arrays(plan, 1), record, 1)
            told += json.dumps(passed.to_flat())
        except FedwardError as error:
            told += json.dumps(
                gate.check_refusal(refusal_for(error, "north", 1)).to_flat(), ensure_ascii=False
            )
    for kind in (DataError(text, value=text, where=text), RuntimeError(text), OSError(2, text)):
        told += json.dumps(gate.check_refusal(refusal_for(kind, "north", 1)).to_flat())
    told += json.dumps(
        gate.check_refusal(
            Refusal.model_construct(site=text, round=1, kind="error", rule=text, value=text)
        ).to_flat()
    )
    facts = SiteFacts(
        site="north", patients=40, images=40, train_patients=30, validation_patients=5,
        test_patients=5, train_images=30, validation_images=5, test_images=5,
        left_out_reasons=(text, "no image"), left_out_counts=(1, 2),
    )  # fmt: skip
    told += json.dumps(gate.check_facts(facts).to_flat())
    told += "".join(json.dumps(e.fields) for e in entries(tmp_path / "audit"))
    assert text not in told
    assert json.dumps(text)[1:-1] not in told


def test_pixels_in_place_of_weights_are_found_by_shape_dtype_and_size(
    plan: Plan, tmp_path: Path
) -> None:
    gate, arrays = gate_of(plan, tmp_path), to_arrays(build_model(plan, 0))
    first = next(iter(arrays))
    pixels = np.random.default_rng(0).integers(0, 4096, (512, 512))
    for wrong in (
        pixels.astype(np.float32), pixels.astype(np.uint16),
        arrays[first].astype(np.float64), np.full_like(arrays[first], np.nan),
        np.array(["x"] * arrays[first].size, object).reshape(arrays[first].shape),
    ):  # fmt: skip
        with pytest.raises(EgressError):
            gate.check_update({**arrays, first: wrong}, expected_arrays(plan, 1), outcome(), 1)
    small = gate_of(plan, tmp_path, max_upload_mib=0.0001)
    with pytest.raises(PolicyError, match="larger"):
        small.check_update(arrays, expected_arrays(plan, 1), outcome(), 1)


@pytest.mark.parametrize(
    "changes",
    [{"patients": 41}, {"images": 41}, {"round": 2}, {"site": "south"}, {"seconds": float("inf")},
     {"epsilon": 3.0}],
)  # fmt: skip
def test_an_outcome_that_cannot_be_true_stays(
    plan: Plan, tmp_path: Path, changes: dict[str, Any]
) -> None:
    arrays = to_arrays(build_model(plan, 0))
    with pytest.raises(EgressError):
        gate_of(plan, tmp_path).check_update(
            arrays, expected_arrays(plan, 1), outcome(**changes), 1
        )


def test_small_counts_are_withheld(
    plan: Plan, make_site: Callable[..., Any], make_order: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = Trainer(plan, make_site("north"), Runtime(randomness="seeded"))
    model = to_arrays(build_model(plan, 0))
    counts, record = trainer.evaluate(model, make_order(plan, 1, part="test"))
    whole, _ = gate_of(plan, tmp_path).check_counts(counts, record, 1)
    for name, value in counts.items():
        np.testing.assert_allclose(whole[name], value)
    with pytest.raises(PolicyError, match="enough"):
        gate_of(plan, tmp_path, Limits(minimum_count=50)).check_counts(counts, record, 1)
    facts = trainer.describe().model_copy(update={"class_counts": (20, 3)})
    assert gate_of(plan, tmp_path, Limits(minimum_count=5)).check_facts(facts).class_counts == ()


def test_before_a_plan_is_known_only_a_refusal_leaves(plan: Plan, tmp_path: Path) -> None:
    gate = gate_of(None, tmp_path)
    with pytest.raises(EgressError):
        gate.check_update({}, {}, outcome(), 1)
    refusal = Refusal(site="north", round=0, rule="a message must be a known, valid record")
    assert gate.check_refusal(refusal) == refusal


@given(text=st.text(max_size=80))
def test_a_refusal_says_fixed_sentences_only(text: str) -> None:
    gate = Gate(None, LOOSE, site="north", facts=None, max_upload_mib=1.0)
    made = gate.check_refusal(Refusal(site="north", round=1, rule=text[:500], value=text[:200]))
    fixed = gate.check_refusal(made)
    assert fixed == made
    if made.rule != text:
        assert made.rule == "an unexpected error stopped the site"
