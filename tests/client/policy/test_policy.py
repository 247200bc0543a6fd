"""The site's policy: what it refuses, in which words, and that tightening never allows more."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedward.errors import ConfigError, PolicyError
from fedward.plan import Plan, plan_from
from fedward.rule_codes import RuleCode
from fedward_client.cohort.freeze import CohortFile, Item
from fedward_client.policy.approvals import MOST_PENDING, Approvals
from fedward_client.policy.decide import DatasetFacts, StudyRequest, decide, facts_of
from fedward_client.policy.hours import quiet_until
from fedward_client.policy.settings import PolicySection

COORDINATOR = "a" * 64
RULE = {"match": "tiny*", "dataset": "chest"}
BASE: dict[str, Any] = {"studies": [RULE], "coordinators": [COORDINATOR]}
FACTS = DatasetFacts(100, 200, {"no": 60, "yes": 40})


def policy_of(**changes: Any) -> PolicySection:
    return PolicySection.model_validate({**BASE, **changes})


@pytest.fixture
def request_of(make_plan: Callable[..., Plan]) -> Callable[..., StudyRequest]:
    def build(
        private: bool = True,
        facts: DatasetFacts | None = FACTS,
        personal: dict[str, Any] | None = None,
        **more: Any,
    ) -> StudyRequest:
        privacy = {"mechanism": "dp-sgd", "epsilon": 4.0, "delta": 1e-4, "clipping_norm": 1.0}
        own = {} if personal is None else {"personal": personal}
        plan = make_plan(privacy=privacy if private else {"mechanism": "none"}, **own)
        values = {
            "study": "tiny-1",
            "plan_hash": "f" * 64,
            "coordinator": COORDINATOR,
            "parameters": 1000,
            **more,
        }
        return StudyRequest(plan=plan, facts=facts, **values)

    return build


@pytest.mark.parametrize(
    ("changes", "request_changes", "rule"),
    [
        ({"coordinators": ["b" * 64]}, {}, RuleCode.COORDINATOR.text),
        ({"studies": []}, {}, RuleCode.STUDY.text),
        ({"models": ["unet"]}, {}, RuleCode.MODEL.text),
        ({"max_parameters": 999}, {}, RuleCode.PARAMETERS.text),
        ({"max_upload_mib": 0.001}, {}, RuleCode.UPLOAD.text),
        ({"own_models": False}, {"personal": {"method": "fedper"}}, RuleCode.OWN_MODELS.text),
        (
            {"studies": [{**RULE, "own_models": False}]},
            {"personal": {"alone": True}},
            RuleCode.OWN_MODELS.text,
        ),
        ({}, {"private": False}, RuleCode.PRIVATE.text),
        ({"max_epsilon_per_study": 3.0}, {}, RuleCode.EPSILON.text),
        ({"max_epsilon_per_cohort": 3.0}, {}, RuleCode.COHORT_EPSILON.text),
        ({"max_delta": 1e-5}, {}, RuleCode.DELTA.text),
        ({}, {"facts": None}, RuleCode.COHORT.text),
        ({"minimum_patients": 101}, {}, RuleCode.PATIENTS.text),
        ({"minimum_per_class": 41}, {}, RuleCode.PER_CLASS.text),
        ({"minimum_sites": 3}, {"sites": 2}, RuleCode.SITES.text),
        ({"minimum_sites": 2}, {"sites": 0}, RuleCode.SITES.text),
        ({"studies": [{**RULE, "minimum_sites": 3}]}, {"sites": 2}, RuleCode.SITES.text),
        ({}, {"facts": replace(FACTS, per_image=True)}, RuleCode.PATIENT_KEY.text),
    ],
)
def test_each_limit_refuses_with_its_own_rule(
    request_of: Callable[..., StudyRequest],
    changes: dict[str, Any],
    request_changes: dict[str, Any],
    rule: str,
) -> None:
    assert decide(policy_of(), request_of()).allowed
    decision = decide(policy_of(**changes), request_of(**request_changes))
    assert [one.rule for one in decision.violations] == [rule]
    with pytest.raises(PolicyError) as refused:
        decision.enforce()
    assert refused.value.rule == rule


@pytest.mark.parametrize(("least", "sites"), [(1, 0), (1, 1), (2, 2), (2, 3), (3, None)])
def test_as_many_sites_as_the_policy_asks_for_are_enough(
    request_of: Callable[..., StudyRequest], least: int, sites: int | None
) -> None:
    assert decide(policy_of(minimum_sites=least), request_of(sites=sites)).allowed


def test_a_site_may_take_images_for_patients(request_of: Callable[..., StudyRequest]) -> None:
    facts = replace(FACTS, per_image=True)
    allowed = replace(facts, images_are_patients=True)
    assert decide(policy_of(), request_of(facts=allowed)).allowed
    plain = decide(policy_of(require_privacy=False), request_of(private=False, facts=facts))
    assert plain.allowed  # nothing is promised


@pytest.mark.parametrize(("patients", "limit"), [(20, 1e-3), (1000, 1e-4), (1001, 1e-5)])
def test_without_a_word_the_largest_delta_follows_the_cohort(
    request_of: Callable[..., StudyRequest], patients: int, limit: float
) -> None:
    request = request_of(facts=DatasetFacts(patients, patients, {}))
    found = decide(policy_of(), request).violations
    assert [one.rule for one in found] == ([RuleCode.DELTA.text] if limit < 1e-4 else [])
    assert [one.words() for one in found] == ["privacy.delta 0.0001 (limit 1e-05)"] * len(found)
    assert decide(policy_of(max_delta=1e-4), request).allowed
    assert decide(policy_of(studies=[{**RULE, "max_delta": 1e-4}]), request).allowed
    assert limit <= 1 / (10 * patients)


def test_a_rule_overrides_the_policy_for_its_studies(
    request_of: Callable[..., StudyRequest],
) -> None:
    own = [{**RULE, "max_epsilon_per_study": 2.0, "approval": "within-policy"}]
    decision = decide(policy_of(studies=own), request_of())
    assert [one.rule for one in decision.violations] == [RuleCode.EPSILON.text]
    assert decision.approval == "within-policy"
    assert decision.dataset == "chest"


@pytest.mark.parametrize(
    "more",
    [
        {"images": {"series_description": ["lung*"]}},
        {"table": {"column": [{"name": "age", "kind": "number", "range": [0, 64]}]}},
    ],
)
def test_a_plan_that_selects_images_needs_a_person(
    make_plan: Callable[..., Plan], request_of: Callable[..., StudyRequest], more: dict[str, Any]
) -> None:
    """Sizes under two plans that differ a little tell how many patients lie between them."""
    policy = policy_of(approval="within-policy")
    request = request_of()
    assert decide(policy, request).approval == "within-policy"
    selecting = replace(request, plan=make_plan(privacy=request.plan.privacy.model_dump(), **more))
    assert decide(policy, selecting).allowed
    assert decide(policy, selecting).approval == "manual"


@given(
    epsilon=st.floats(0.5, 20),
    delta=st.floats(1e-6, 0.01),
    patients=st.integers(2, 300),
    parameters=st.integers(1, 5000),
    tighter=st.floats(0.05, 1.0),
)
def test_tightening_never_allows_more(
    epsilon: float, delta: float, patients: int, parameters: int, tighter: float
) -> None:
    plan = plan_from(_plan())
    request = StudyRequest("tiny-1", plan, "f" * 64, COORDINATOR, 1000, FACTS)
    loose = {
        "max_epsilon_per_study": epsilon,
        "max_delta": delta,
        "minimum_patients": patients,
        "max_parameters": parameters,
    }
    tight = {
        "max_epsilon_per_study": epsilon * tighter,
        "max_delta": delta * tighter,
        "minimum_patients": int(patients / tighter),
        "require_privacy": True,
        "max_parameters": max(1, int(parameters * tighter)),
    }
    broken = {v.rule for v in decide(policy_of(**loose), request).violations}
    assert broken <= {v.rule for v in decide(policy_of(**tight), request).violations}


def _plan() -> dict[str, Any]:
    return {
        "version": 1,
        "study": {"name": "tiny"},
        "task": {"kind": "classification", "classes": ["no", "yes"]},
        "preprocessing": {"size": [16, 16], "intensity": "unit"},
        "split": {"given": True},
        "model": {"name": "cnn", "channels": [4, 8]},
        "training": {
            "rounds": 2,
            "learning_rate": 0.01,
            "local_epochs": 1,
            "batch_size": 8,
            "loss": "cross_entropy",
        },
        "privacy": {"mechanism": "dp-sgd", "epsilon": 4.0, "delta": 1e-4, "clipping_norm": 1.0},
        "participation": {"sites": 2},
        "metrics": {"report": ["auc"], "primary": "auc"},
    }


def test_an_approval_is_bound_to_plan_and_coordinator_and_survives(
    request_of: Callable[..., StudyRequest], tmp_path: Path
) -> None:
    assert Approvals(tmp_path).see(request_of()).state == "pending"
    Approvals(tmp_path).settle("tiny-1", "approved", "officer")
    assert Approvals(tmp_path).see(request_of()).state == "approved"
    assert Approvals(tmp_path).see(request_of(plan_hash="0" * 64)).state == "pending"
    assert Approvals(tmp_path).see(request_of(coordinator="b" * 64)).state == "pending"
    with pytest.raises(ConfigError, match="several plans"):
        Approvals(tmp_path).settle("tiny-1", "denied", "officer")
    with pytest.raises(ConfigError, match="asked"):
        Approvals(tmp_path).settle("other", "denied", "officer")
    for number in range(MOST_PENDING):
        try:
            Approvals(tmp_path).see(request_of(study=f"flood-{number}"))
        except PolicyError:
            break
    else:
        raise AssertionError("a flood of plans must end")


@pytest.mark.parametrize(
    ("entries", "now", "until"),
    [
        (["Mon-Fri 07:00-18:00"], "2026-11-24 12:00", "2026-11-24 18:00"),
        (["Mon-Fri 07:00-18:00"], "2026-11-24 19:00", None),
        (["Mon-Fri 07:00-18:00"], "2026-11-22 12:00", None),
        (["22:00-06:00"], "2026-11-24 23:30", "2026-11-25 06:00"),
        (["22:00-06:00"], "2026-11-25 05:00", "2026-11-25 06:00"),
        ([], "2026-11-24 12:00", None),
    ],
)
def test_quiet_hours(entries: list[str], now: str, until: str | None) -> None:
    found = quiet_until(entries, datetime.fromisoformat(now))
    assert found == (datetime.fromisoformat(until) if until else None)


TIGHTER: dict[str, tuple[Any, ...]] = {
    # from the loosest to the tightest
    "coordinators": (["b" * 64, COORDINATOR], [COORDINATOR], ["b" * 64], []),
    "any_coordinator": (True, False),
    "models": (["cnn", "unet"], ["cnn"], []),
    "max_parameters": (5000, 1000, 999),
    "minimum_patients": (2, 100, 101),
    "minimum_per_class": (0, 40, 41, 61),
    "minimum_sites": (1, 2, 3),
    "own_models": (True, False),
    "require_privacy": (False, True),
    "max_epsilon_per_study": (8.0, 4.0, 3.9),
    "max_epsilon_per_cohort": (8.0, 4.0, 3.9),
    "max_delta": (0.01, 1e-4, 1e-5),
    "max_upload_mib": (1.0, 0.01, 0.001),
    "studies": ([RULE], [{**RULE, "match": "tiny-1"}], [{**RULE, "match": "tiny-2"}], []),
}


@given(data=st.data(), private=st.booleans(), own=st.booleans())
def test_tightening_any_key_refuses_whatever_was_refused(
    data: st.DataObject, private: bool, own: bool
) -> None:
    places = {key: data.draw(st.integers(0, len(v) - 1), key) for key, v in TIGHTER.items()}
    if places["any_coordinator"] == 0:
        places["coordinators"] = len(TIGHTER["coordinators"]) - 1
    content = _plan() | ({} if private else {"privacy": {"mechanism": "none"}})
    content |= {"personal": {"method": "fedper"}} if own else {}
    request = StudyRequest("tiny-1", plan_from(content), "f" * 64, COORDINATOR, 1000, FACTS, 2)

    def broken(at: dict[str, int]) -> set[str]:
        values = {key: TIGHTER[key][place] for key, place in at.items()}
        return {v.rule for v in decide(PolicySection.model_validate(values), request).violations}

    before = broken(places)
    for key, place in places.items():
        if place + 1 < len(TIGHTER[key]):
            assert before <= broken({**places, key: place + 1})


def test_who_only_evaluates_trains_no_model_of_its_own(
    request_of: Callable[..., StudyRequest],
) -> None:
    request = request_of(personal={"method": "fedper"}, evaluate_only=True)
    assert decide(policy_of(own_models=False), request).allowed
    assert decide(policy_of(), request_of(personal={"method": "fedper"})).allowed  # by default


def test_a_policy_allows_nothing_until_it_says_so(
    request_of: Callable[..., StudyRequest],
) -> None:
    found = {one.rule for one in decide(PolicySection(), request_of()).violations}
    assert found == {RuleCode.COORDINATOR.text, RuleCode.STUDY.text}
    assert PolicySection().approval == "manual" and PolicySection().require_privacy


def test_the_first_rule_that_matches_decides(request_of: Callable[..., StudyRequest]) -> None:
    rules = [{**RULE, "match": "tiny-1", "dataset": "a"}, {**RULE, "dataset": "b"}]
    assert decide(policy_of(studies=rules), request_of()).dataset == "a"
    assert decide(policy_of(studies=rules), request_of(study="other")).dataset == "b"  # its name
    assert decide(policy_of(studies=rules[:1]), request_of(study="other")).dataset == ""


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"any_coordinator": True}, "exclude each other"),
        ({"coordinators": ["A" * 64]}, "pattern"),
        ({"quiet_hours": ["Mon 7-18"]}, "look like"),
        ({"quiet_hours": ["25:00-26:00"]}, "look like"),
        ({"models": ["resnet-9000"]}, "Input should be"),
        ({"minimum_patients": 2.0}, "integer"),
        ({"max_delta": 1.0}, "less than 1"),
        ({"studies": [{"match": "a/b", "dataset": "chest"}]}, "pattern"),
        ({"studies": [{"match": "a", "dataset": "chest", "quiet_hours": []}]}, "not permitted"),
    ],
)
def test_a_policy_that_is_not_clear_is_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        policy_of(**changes)


def test_quiet_hours_that_follow_each_other_are_one() -> None:
    now = datetime(2026, 11, 24, 23, 0)
    hours = ["Tue 22:00-02:00", "Wed 02:00-06:00", "Wed 06:00-06:30"]
    assert quiet_until(hours, now) == datetime(2026, 11, 25, 6, 30)
    assert quiet_until(["00:00-24:00"], now) is not None
    assert quiet_until(["Sun-Mon 10:00-11:00"], datetime(2026, 11, 22, 10, 30)) is not None
    assert quiet_until(["Sun-Mon 10:00-11:00"], datetime(2026, 11, 24, 10, 30)) is None


def test_approvals_are_private_and_a_broken_file_is_not_forgotten(
    request_of: Callable[..., StudyRequest], tmp_path: Path
) -> None:
    Approvals(tmp_path).see(request_of())
    Approvals(tmp_path).settle("tiny-1", "denied", "officer")
    with pytest.raises(PolicyError, match="denied"):
        Approvals(tmp_path).see(request_of()).enforce()
    asked = request_of()
    key = (asked.study, asked.plan_hash)
    assert Approvals(tmp_path).denied(*key, asked.coordinator)
    assert not Approvals(tmp_path).denied(*key, "b" * 64)
    path = tmp_path / "approvals.json"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("{")
    with pytest.raises(ConfigError, match="readable"):
        Approvals(tmp_path).see(request_of())


def _see(folder: Path, number: int) -> None:
    plan = plan_from(_plan())
    for place in range(10):
        Approvals(folder).see(
            StudyRequest(f"s-{number}-{place}", plan, "f" * 64, COORDINATOR, 1, None)
        )


def test_processes_that_see_plans_at_once_lose_none(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    all_ = [context.Process(target=_see, args=(tmp_path, number)) for number in range(3)]
    for one in all_:
        one.start()
    for one in all_:
        one.join(60)
        assert one.exitcode == 0
    assert len(Approvals(tmp_path).pending()) == 30


def test_a_cohorts_record_tells_patients_of_each_class(tmp_path: Path) -> None:
    def item(patient: str, label: tuple[int, ...] | None) -> Item:
        source = SimpleNamespace()
        return Item.model_construct(patient=patient, label=label, image=source)

    def cohort(labels: list[tuple[str, tuple[int, ...] | None]], multi: bool = False) -> CohortFile:
        task = SimpleNamespace(classes=("no", "yes"), multi_label=multi)
        return CohortFile.model_construct(
            task=task,
            items=tuple(item(patient, label) for patient, label in labels),
            format="dicom",
            images_are_patients=False,
        )

    single = cohort([("a", (0,)), ("a", (0,)), ("a", (1,)), ("b", (1,))])
    assert facts_of(single) == DatasetFacts(2, 4, {"no": 1, "yes": 2})
    several = cohort([("a", (1, 1)), ("b", (0, 1)), ("c", (0, 0))], multi=True)
    assert facts_of(several) == DatasetFacts(3, 3, {"no": 1, "yes": 2})
    assert facts_of(cohort([("a", None), ("b", None)])) == DatasetFacts(2, 2, {})
