"""The site's policy: what it refuses, in which words, and that tightening never allows more."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.policy import words
from client.policy.approvals import MOST_PENDING, Approvals
from client.policy.decide import DatasetFacts, StudyRequest, decide
from client.policy.hours import quiet_until
from client.policy.settings import PolicySection
from fedward.errors import ConfigError, PolicyError
from fedward.plan import Plan, plan_from

COORDINATOR = "a" * 64
RULE = {"match": "tiny*", "dataset": "chest"}
BASE: dict[str, Any] = {"studies": [RULE], "coordinators": [COORDINATOR]}
FACTS = DatasetFacts(100, 200, {"no": 60, "yes": 40})


def policy_of(**changes: Any) -> PolicySection:
    return PolicySection.model_validate({**BASE, **changes})


@pytest.fixture
def request_of(make_plan: Callable[..., Plan]) -> Callable[..., StudyRequest]:
    def build(
        private: bool = True, facts: DatasetFacts | None = FACTS, **more: Any
    ) -> StudyRequest:
        privacy = {"mechanism": "dp-sgd", "epsilon": 4.0, "delta": 1e-4, "clipping_norm": 1.0}
        plan = make_plan(privacy=privacy if private else {"mechanism": "none"})
        values = {"study": "tiny-1", "plan_hash": "f" * 64, "coordinator": COORDINATOR,
                  "parameters": 1000, **more}  # fmt: skip
        return StudyRequest(plan=plan, facts=facts, **values)

    return build


@pytest.mark.parametrize(
    ("changes", "request_changes", "rule"),
    [
        ({"coordinators": ["b" * 64]}, {}, words.COORDINATOR),
        ({"studies": []}, {}, words.STUDY),
        ({"models": ["unet"]}, {}, words.MODEL),
        ({"max_parameters": 999}, {}, words.PARAMETERS),
        ({"max_upload_mib": 0.001}, {}, words.UPLOAD),
        ({}, {"private": False}, words.PRIVATE),
        ({"max_epsilon_per_study": 3.0}, {}, words.EPSILON),
        ({"max_epsilon_per_cohort": 3.0}, {}, words.COHORT_EPSILON),
        ({"max_delta": 1e-5}, {}, words.DELTA),
        ({}, {"facts": None}, words.COHORT),
        ({"minimum_patients": 101}, {}, words.PATIENTS),
        ({"minimum_per_class": 41}, {}, words.PER_CLASS),
    ],
)
def test_each_limit_refuses_with_its_own_rule(
    request_of: Callable[..., StudyRequest], changes: dict[str, Any],
    request_changes: dict[str, Any], rule: str,
) -> None:  # fmt: skip
    assert decide(policy_of(), request_of()).allowed
    decision = decide(policy_of(**changes), request_of(**request_changes))
    assert [one.rule for one in decision.violations] == [rule]
    with pytest.raises(PolicyError) as refused:
        decision.enforce()
    assert refused.value.rule == rule


def test_a_rule_overrides_the_policy_for_its_studies(
    request_of: Callable[..., StudyRequest],
) -> None:
    own = [{**RULE, "max_epsilon_per_study": 2.0, "approval": "within-policy"}]
    decision = decide(policy_of(studies=own), request_of())
    assert [one.rule for one in decision.violations] == [words.EPSILON]
    assert decision.approval == "within-policy"
    assert decision.dataset == "chest"


@given(
    epsilon=st.floats(0.5, 20), delta=st.floats(1e-6, 0.01), patients=st.integers(2, 300),
    parameters=st.integers(1, 5000), tighter=st.floats(0.05, 1.0),
)  # fmt: skip
def test_tightening_never_allows_more(
    epsilon: float, delta: float, patients: int, parameters: int, tighter: float
) -> None:
    plan = plan_from(_plan())
    request = StudyRequest("tiny-1", plan, "f" * 64, COORDINATOR, 1000, FACTS)
    loose = {
        "max_epsilon_per_study": epsilon, "max_delta": delta, "minimum_patients": patients,
        "max_parameters": parameters,
    }  # fmt: skip
    tight = {
        "max_epsilon_per_study": epsilon * tighter, "max_delta": delta * tighter,
        "minimum_patients": int(patients / tighter), "require_privacy": True,
        "max_parameters": max(1, int(parameters * tighter)),
    }  # fmt: skip
    broken = {v.rule for v in decide(policy_of(**loose), request).violations}
    assert broken <= {v.rule for v in decide(policy_of(**tight), request).violations}


def _plan() -> dict[str, Any]:
    return {
        "version": 1, "study": {"name": "tiny"},
        "task": {"kind": "classification", "classes": ["no", "yes"]},
        "preprocessing": {"size": [16, 16], "intensity": "unit"}, "split": {"given": True},
        "model": {"name": "cnn", "channels": [4, 8]},
        "training": {"rounds": 2, "learning_rate": 0.01, "local_epochs": 1, "batch_size": 8,
                     "loss": "cross_entropy"},
        "privacy": {"mechanism": "dp-sgd", "epsilon": 4.0, "delta": 1e-4, "clipping_norm": 1.0},
        "participation": {"sites": 2}, "metrics": {"report": ["auc"], "primary": "auc"},
    }  # fmt: skip


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
