"""The gate: names, ids, dates, paths and pixels are planted in everything, and none gets out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_values import sample
from sklearn.metrics import roc_auc_score

from fedward.dp.accounting import calibrate, epsilon_spent
from fedward.errors import DataError, EgressError, FedwardError, PolicyError
from fedward.models import build_model, to_arrays
from fedward.plan.schema import Plan
from fedward.protocol import Refusal, SiteFacts, TrainOutcome
from fedward.rule_codes import RuleCode
from fedward.tasks.classification import CLASSIFICATION, ClassificationCounts, rates
from fedward.tasks.segmentation import SegmentationCounts
from fedward_client.audit.log import AuditLog
from fedward_client.audit.verify import entries
from fedward_client.egress.disclosure import release
from fedward_client.egress.gate import Gate, expected_arrays, refusal_for
from fedward_client.policy.decide import DatasetFacts, StudyRequest, decide
from fedward_client.policy.settings import METRICS, Limits, PolicySection
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

PLANTED = (
    "DOE^JANE",
    "1.2.840.113619.2.55.3",
    "/data/ward-7/scan.dcm",
    "1961-04-03",
    "19610403",
    "MRN 00481516",
    "ward-7",
    "C:\\images\\x.dcm",
    "4815162342",
)
FACTS = DatasetFacts(40, 40, {"no": 20, "yes": 20})
EXACT = {"counts": "minimum-cells", "count_noise": 0.0}
LOOSE = Limits(minimum_count=1, rounding=9, require_privacy=False, **EXACT)


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
    values = {
        "site": "north",
        "round": 1,
        "patients": 30,
        "images": 30,
        "steps": 4,
        "loss": 0.5,
        "seconds": 1.23456789,
        **changes,
    }
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
            Refusal.model_construct(
                site=text, round=1, kind="error", code=RuleCode.MODEL, values={"model": text}
            )
        ).to_flat()
    )
    facts = SiteFacts(
        site="north",
        patients=40,
        images=40,
        train_patients=30,
        validation_patients=5,
        test_patients=5,
        train_images=30,
        validation_images=5,
        test_images=5,
        left_out_reasons=(text, "no image"),
        left_out_counts=(1, 2),
    )
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
        pixels.astype(np.float32),
        pixels.astype(np.uint16),
        arrays[first].astype(np.float64),
        np.full_like(arrays[first], np.nan),
        np.array(["x"] * arrays[first].size, object).reshape(arrays[first].shape),
    ):
        with pytest.raises(EgressError):
            gate.check_update({**arrays, first: wrong}, expected_arrays(plan, 1), outcome(), 1)
    small = gate_of(plan, tmp_path, max_upload_mib=0.0001)
    with pytest.raises(PolicyError, match="larger"):
        small.check_update(arrays, expected_arrays(plan, 1), outcome(), 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"patients": 41},
        {"images": 41},
        {"round": 2},
        {"site": "south"},
        {"seconds": float("inf")},
        {"epsilon": 3.0},
    ],
)
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
        gate_of(plan, tmp_path, Limits(minimum_count=50, **EXACT)).check_counts(counts, record, 1)
    facts = trainer.describe().model_copy(update={"class_counts": (20, 3)})
    assert gate_of(plan, tmp_path, Limits(minimum_count=5)).check_facts(facts).class_counts == ()


def test_before_a_plan_is_known_only_a_refusal_leaves(plan: Plan, tmp_path: Path) -> None:
    gate = gate_of(None, tmp_path)
    with pytest.raises(EgressError):
        gate.check_update({}, {}, outcome(), 1)
    refusal = Refusal(site="north", round=0, code=RuleCode.PROTOCOL)
    assert gate.check_refusal(refusal) == refusal


@given(text=st.text(max_size=80), code=st.sampled_from(RuleCode))
def test_a_refusal_says_codes_only(text: str, code: RuleCode) -> None:
    gate = Gate(None, LOOSE, site="north", facts=None, max_upload_mib=1.0)
    said = refusal_for(FedwardError(text, value=text, where=text), "north", 1)
    made = gate.check_refusal(said)
    assert gate.check_refusal(made) == made
    assert (made.code, made.values) == (RuleCode.ERROR, {})
    told = gate.check_refusal(
        refusal_for(FedwardError(text, code=code, values=sample(code)), "north", 1)
    )
    assert (told.code, told.values) == (code, sample(code))
    for values in (
        {**sample(code), "more": text},
        {**sample(code), text: text},
        {**dict.fromkeys(code.kinds, text), "more": 1},
        {**sample(code), **dict.fromkeys([*code.kinds][:1] or ["more"], (text, "x"))},
    ):
        odd = Refusal.model_construct(site=text, round=1, kind="data", code=code, values=values)
        assert gate.check_refusal(odd).code is RuleCode.DATA


def private_outcome(plan: Plan, **changes: Any) -> TrainOutcome:
    mechanism = calibrate(plan, 30)
    steps = mechanism.steps // plan.rounds
    spent = epsilon_spent(mechanism.noise_multiplier, mechanism.sampling_rate, steps, 1e-4)
    values = {
        "loss": None,
        "steps": steps,
        "noise_multiplier": mechanism.noise_multiplier,
        "sampling_rate": mechanism.sampling_rate,
        "delta": 1e-4,
        "epsilon": spent,
        **changes,
    }
    return outcome(**values)


PRIVATE = {"mechanism": "dp-sgd", "epsilon": 4.0, "delta": 1e-4, "clipping_norm": 1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 19610403},
        {"noise_multiplier": 19610403.0},
        {"sampling_rate": 0.19610403},
        {"delta": 0.19610403},
        {"epsilon": 1.9610403},
        {"patients": 29},
        {"noise_multiplier": None},
        {"delta": None},
    ],
)
def test_no_number_of_a_private_update_is_free(
    make_plan: Callable[..., Plan], tmp_path: Path, changes: dict[str, Any]
) -> None:
    plan: Plan = make_plan(privacy=PRIVATE)
    arrays, gate = to_arrays(build_model(plan, 0)), gate_of(plan, tmp_path)
    passed = gate.check_update(
        arrays, expected_arrays(plan, 1), private_outcome(plan, loss=0.25), 1
    )
    assert passed.loss is None  # exact, and so not covered by ε
    with pytest.raises(EgressError):
        gate.check_update(arrays, expected_arrays(plan, 1), private_outcome(plan, **changes), 1)


def test_what_a_trainer_makes_passes_with_and_without_privacy(
    make_plan: Callable[..., Plan],
    make_site: Callable[..., Any],
    make_order: Callable[..., Any],
    tmp_path: Path,
) -> None:
    for privacy in (PRIVATE, {"mechanism": "none"}):
        plan: Plan = make_plan(privacy=privacy)
        trainer = Trainer(plan, make_site("north"), Runtime(randomness="seeded"))
        arrays, made = trainer.train(to_arrays(build_model(plan, 0)), make_order(plan, 1))
        gate = gate_of(plan, tmp_path)
        passed = gate.check_update(arrays, expected_arrays(plan, 1), made, 1)
        assert (passed.patients, passed.steps) == (made.patients, made.steps)
        assert gate.check_facts(trainer.describe()).train_patients == made.patients


@pytest.mark.parametrize("changes", [{"steps": 19610403}, {"delta": 0.1}, {"sampling_rate": 0.1}])
def test_no_number_of_an_open_update_is_free(
    plan: Plan, tmp_path: Path, changes: dict[str, Any]
) -> None:
    arrays = to_arrays(build_model(plan, 0))
    with pytest.raises(EgressError):
        gate_of(plan, tmp_path).check_update(
            arrays, expected_arrays(plan, 1), outcome(**changes), 1
        )


def test_a_loss_of_few_patients_and_one_that_policy_forbids_stay(
    plan: Plan, tmp_path: Path
) -> None:
    arrays, expected = to_arrays(build_model(plan, 0)), expected_arrays(plan, 1)
    for limits in (Limits(minimum_count=31), Limits(metrics=("auc",))):
        gate = gate_of(plan, tmp_path, limits)
        assert gate.check_update(arrays, expected, outcome(), 1).loss is None
    assert {one.event for one in entries(tmp_path / "audit")} == {"withheld"}


def test_an_array_that_carries_more_than_numbers_stays(plan: Plan, tmp_path: Path) -> None:
    arrays, expected = to_arrays(build_model(plan, 0)), expected_arrays(plan, 1)
    first = next(iter(arrays))
    named = np.dtype(np.float32, metadata={"patient": "DOE^JANE"})
    masked = np.ma.masked_array(arrays[first], fill_value=19610403.0)
    for wrong in (arrays[first].astype(named), masked):
        with pytest.raises(EgressError):
            gate_of(plan, tmp_path).check_update({**arrays, first: wrong}, expected, outcome(), 1)


def test_facts_that_cannot_be_true_of_the_cohort_stay(plan: Plan, tmp_path: Path) -> None:
    right = {
        "site": "north",
        "patients": 40,
        "images": 40,
        "train_patients": 30,
        "validation_patients": 5,
        "test_patients": 5,
        "train_images": 30,
        "validation_images": 5,
        "test_images": 5,
        "class_counts": (15, 15),
        "left_out_reasons": ("no label", "no image"),
        "left_out_counts": (7, 2),
    }
    gate = gate_of(plan, tmp_path, Limits(minimum_count=5))
    passed = gate.check_facts(SiteFacts(**right))  # type: ignore[arg-type]
    assert (passed.left_out_reasons, passed.left_out_counts) == (("no label",), (7,))
    for wrong in (
        {"site": "south"},
        {"patients": 19610403},
        {"test_images": 11},
        {"class_counts": (31, 5)},
        {"class_counts": (15,)},
        {"left_out_counts": (19610403, 7)},
    ):
        with pytest.raises(EgressError):
            gate.check_facts(SiteFacts(**{**right, **wrong}))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=2, max_size=4),
    seed=st.integers(0, 99),
    multi=st.booleans(),
    least=st.integers(1, 12),
    metrics=st.sets(st.sampled_from(METRICS)).map(tuple),
)
def test_what_is_left_of_counts_is_still_a_record_and_holds_no_small_class(
    sizes: list[int], seed: int, multi: bool, least: int, metrics: tuple[Any, ...]
) -> None:
    rng, classes = np.random.default_rng(seed), len(sizes)
    labels = np.repeat(np.arange(classes), sizes)
    p = rng.random((len(labels), classes))
    targets = rng.random((len(labels), classes)) < 0.3 if multi else labels
    counts = ClassificationCounts.from_scores(
        p if multi else p / p.sum(axis=1, keepdims=True), targets.astype(np.int64)
    )
    arrays, withheld = release(counts, Limits(minimum_count=least, metrics=metrics, rounding=2))
    made = ClassificationCounts.from_arrays(arrays)  # as the aggregator reads them
    for cells in (arrays["scores"], arrays["calibration"][0]):
        assert ((cells == 0) | (cells >= least)).all()
    tp, fn, fp, tn = rates(made)
    for size in (tp + fn, fp + tn):
        assert ((size == 0) | (size >= least)).all()
    figures = made.figures(CLASSIFICATION.metric_names)
    # An implied figure leaves with the figures of the same counts.
    implied = {one.name for one in CLASSIFICATION.metrics if one.implied}
    hidden = figures.keys() - {*metrics, *implied}
    assert all(figures[name] is None for name in hidden)
    if not withheld and least == 1:
        assert figures == pytest.approx(
            counts.figures(CLASSIFICATION.metric_names), abs=0.02, nan_ok=True
        )


def test_coarse_scores_keep_the_auc() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, 300)
    score = 1 / (1 + np.exp(-rng.normal(truth * 1.5, 1.0)))
    counts = ClassificationCounts.from_scores(np.stack([1 - score, score], axis=1), truth)
    arrays, _ = release(counts, Limits(minimum_count=5))
    made = ClassificationCounts.from_arrays(arrays)
    assert made.figures(["auc"])["auc"] == pytest.approx(roc_auc_score(truth, score), abs=0.01)
    assert int((arrays["scores"] > 0).sum()) < int((counts.scores > 0).sum()) / 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    images=st.integers(0, 12),
    digits=st.integers(0, 3),
    least=st.integers(1, 8),
    metrics=st.sets(st.sampled_from(METRICS)).map(tuple),
)
def test_what_is_left_of_segmentation_sums_is_still_a_record(
    seed: int, images: int, digits: int, least: int, metrics: tuple[Any, ...]
) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 3, (2, images, 8, 8)).astype(np.uint8)
    masks[:, rng.random(images) < 0.5] %= 2  # class 2 is rare
    counts = SegmentationCounts.from_masks(
        masks[0], masks[1], 2, np.ones((images, 2)), hd95=True, losses=rng.random(images)
    )
    arrays, _ = release(counts, Limits(minimum_count=least, metrics=metrics, rounding=digits))
    made = SegmentationCounts.from_arrays(arrays)
    assert ((made.counts == 0) | (made.counts >= least)).all()
    figures = made.figures(("dice", "iou", "hd95", "loss"))
    # An implied figure leaves with the figures of the same counts.
    implied = {one.name for one in CLASSIFICATION.metrics if one.implied}
    hidden = figures.keys() - {*metrics, *implied}
    assert all(figures[name] is None for name in hidden)
    np.testing.assert_allclose(made.sums, np.round(made.sums, digits))


@pytest.mark.parametrize(
    ("code", "values", "kept"),
    [
        (RuleCode.EPSILON, {"asked": 8.0, "limit": 4.0}, True),
        (RuleCode.EPSILON, {"asked": 8.0}, False),
        (RuleCode.EPSILON, {"asked": 8.0, "limit": 4.0, "more": 1.0}, False),
        (RuleCode.EPSILON, {"asked": 19610403.0, "limit": 4.0}, False),
        (RuleCode.EPSILON, {"asked": 0.19610403, "limit": 4.0}, False),
        (RuleCode.EPSILON, {"asked": float("nan"), "limit": 4.0}, False),
        (RuleCode.EPSILON, {"asked": float("inf"), "limit": 4.0}, False),
        (RuleCode.EPSILON, {"asked": 1e300, "limit": 4.0}, False),
        (RuleCode.EPSILON, {"asked": "8", "limit": 4.0}, False),
        (RuleCode.EPSILON, {"asked": True, "limit": 4.0}, False),
        (RuleCode.TRAINED_ONCE, {"round": 3}, True),
        (RuleCode.TRAINED_ONCE, {"round": 3.0}, False),
        (RuleCode.TRAINED_ONCE, {"round": True}, False),
        (RuleCode.TRAINED_ONCE, {"round": 19610403}, False),
        (RuleCode.TRAINED_ONCE, {"round": 4815162342}, False),
        (RuleCode.PENDING, {}, True),
        (RuleCode.PENDING, {"value": "DOE"}, False),
        (RuleCode.MODEL, {"model": "cnn"}, True),
        (RuleCode.MODEL, {"model": "yes"}, False),  # a class of the plan
        (RuleCode.MODEL, {"model": "/data/cnn"}, False),
        (RuleCode.IMAGES_USABLE, {"reasons": ("no label", "no image")}, True),
        (RuleCode.IMAGES_USABLE, {"reasons": ["no label", "no image"]}, False),
        (RuleCode.IMAGES_USABLE, {"reasons": ("no label", "no label")}, False),
        (RuleCode.IMAGES_USABLE, {"reasons": ("no label", "DOE^JANE")}, False),
        (RuleCode.IMAGES_USABLE, {"reasons": ("no label", 1961)}, False),
        ("the planted sentence", {}, False),
        ("epsilon", {"asked": 8.0, "limit": 4.0}, False),
        (None, {}, False),
    ],
)
def test_values_are_those_that_a_code_declares(
    plan: Plan, tmp_path: Path, code: Any, values: dict[str, Any], kept: bool
) -> None:
    said = Refusal.model_construct(site="north", round=1, kind="policy", code=code, values=values)
    made = gate_of(plan, tmp_path).check_refusal(said)
    assert (made.code, made.values) == ((code, values) if kept else (RuleCode.POLICY, {}))
    told = [one.fields["parts"] for one in entries(tmp_path / "audit")]
    assert told == ([] if kept else [["code"]])


def test_every_violation_leaves_in_its_own_words(plan: Plan, tmp_path: Path) -> None:
    asked = StudyRequest(
        "tiny-1", plan, "f" * 64, "a" * 64, 12_345_678, DatasetFacts(3, 3, {"no": 3, "yes": 0})
    )
    policy = PolicySection.model_validate(
        {"models": ["unet"], "max_parameters": 10_000_000, "max_upload_mib": 2.5}
    )
    decision, gate = decide(policy, asked), gate_of(plan, tmp_path)
    assert len(decision.violations) == 9
    for one in decision.violations:
        error = PolicyError(one.code, values=one.values)
        made = gate.check_refusal(refusal_for(error, "north", 0))
        assert (made.kind, made.rule, made.value) == ("policy", one.rule, one.words())
        assert "3" not in made.value.replace("12.35 million", "")  # how few patients there are
