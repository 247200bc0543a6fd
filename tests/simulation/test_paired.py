"""Differences between arms, patient by patient, against resampled patients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from fedward.plan import Plan
from fedward_client.training.evaluate import Answers
from fedward_server.results import Arm, TestFigures
from fedward_simulation.paired import difference, difference_at_home, jackknife, paired


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(metrics={"report": ["auc", "accuracy"], "primary": "auc"})


def truth_and_case(n: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Labels, and how hard each patient is for any model."""
    random = np.random.default_rng(seed)
    truth = np.arange(n) % 2
    return truth, random.normal(1.5 * truth, 1.0)


def model(plan: Plan, n: int, seed: int, noise: float, of: int = 0) -> Answers:
    """Answers of one of several models that err on the same patients."""
    truth, case = truth_and_case(n, seed)
    logit = case - 0.75 + np.random.default_rng(1000 + of).normal(0, noise, n)
    p = 1 / (1 + np.exp(-logit))
    return Answers(plan, np.stack([1 - p, p], axis=1), truth, np.arange(n))


def test_it_is_a_paired_bootstraps_and_narrower_than_an_unpaired_one(plan: Plan) -> None:
    one, other = model(plan, 160, 0, 0.1, 1), model(plan, 160, 0, 0.6, 2)
    found = difference("auc", {"a": one}, [{"a": other}])
    assert found is not None
    value, (low, high) = found
    p, q, truth = one.values[:, 1], other.values[:, 1], one.targets
    assert value == pytest.approx(roc_auc_score(truth, p) - roc_auc_score(truth, q), abs=3e-3)
    random, again, apart = np.random.default_rng(3), [], []
    for _ in range(150):
        drawn, others = random.integers(0, 160, 160), random.integers(0, 160, 160)
        mine = roc_auc_score(truth[drawn], p[drawn])
        again.append(mine - roc_auc_score(truth[drawn], q[drawn]))
        apart.append(mine - roc_auc_score(truth[others], q[others]))
    half = (high - low) / 2
    assert half == pytest.approx(1.98 * np.std(again), rel=0.25)
    assert half < 0.75 * 1.98 * np.std(apart)


def test_of_dice_it_is_the_paired_t_interval(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(
        task={"kind": "segmentation", "classes": ["lung"]},
        model={"name": "unet"},
        training={"loss": "dice_ce"},
        metrics={"report": ["dice"], "primary": "dice"},
    )
    random = np.random.default_rng(0)
    first = random.uniform(0.7, 0.9, 12)
    second = first - random.uniform(-0.01, 0.05, 12)
    one, other = (
        Answers(plan, np.stack([dice] * 3)[:, :, None], np.zeros(0, np.uint8), np.arange(12))
        for dice in (first, second)
    )
    found = difference("dice", {"a": one}, [{"a": other}])
    expected = stats.t.interval(0.95, 11, (first - second).mean(), stats.sem(first - second))
    assert found is not None and found[1] == pytest.approx(expected)


def test_images_of_one_patient_are_left_out_together(plan: Plan) -> None:
    one, other = model(plan, 60, 0, 0.1, 1), model(plan, 60, 0, 0.9, 2)
    once = difference("accuracy", {"a": one}, [{"a": other}])

    def often(answers: Answers) -> Answers:
        return Answers(
            plan,
            *(v.repeat(4, axis=0) for v in (answers.values, answers.targets, answers.patients)),
        )

    assert once is not None
    assert difference("accuracy", {"a": often(one)}, [{"a": often(other)}]) == (
        pytest.approx(once[0]),
        pytest.approx(once[1]),
    )


def test_at_home_sites_are_compared_one_by_one(plan: Plan) -> None:
    shared = {s: model(plan, 40, k, 0.1, k) for k, s in enumerate(("a", "b", "c"))}
    homes = {s: {s: model(plan, 40, k, 0.8, 9 + k)} for k, s in enumerate(("a", "b"))}
    parts = [difference("auc", {s: shared[s]}, [homes[s]]) for s in homes]
    found = difference_at_home("auc", shared, homes)
    assert found is not None
    assert found[0] == pytest.approx(np.mean([one[0] for one in parts if one]))
    halves = [one[1][1] - one[0] for one in parts if one]
    assert found[1][1] - found[0] == pytest.approx(np.hypot(*halves) / 2, rel=0.05)


def test_too_few_patients_give_no_interval(plan: Plan) -> None:
    def answers(right: bool) -> Answers:
        truth = np.array([0, 0, 0, 1, 1])
        p = np.where((truth == 1) == right, 0.9, 0.1)
        return Answers(plan, np.stack([1 - p, p], axis=1), truth, np.arange(5))

    # All five right against all five wrong: no patient moves it, which is no certainty.
    assert difference("accuracy", {"a": answers(True)}, [{"a": answers(False)}]) is None
    assert difference("accuracy", {"a": answers(True)}, [{"a": answers(True)}]) == (0, (0, 0))
    assert jackknife([]) is None
    assert jackknife([(lambda keep: None, np.arange(3))]) is None


def test_the_lead_is_compared_with_each_other_arm(plan: Plan) -> None:
    arms = [
        Arm(name="private", kind="federated", epsilon=8),
        Arm(name="federated", kind="federated"),
        Arm(name="alone: a", kind="alone", site="a"),
        Arm(name="alone: b", kind="alone", site="b"),
        Arm(name="pooled", kind="pooled"),
        Arm(name="unfinished", kind="pooled"),
    ]
    answers = {
        arm.name: {s: model(plan, 40, k, 0.3, 7 * k + j) for k, s in enumerate("ab")}
        for j, arm in enumerate(arms[:5])
    }
    made = paired("auc", arms, answers)
    found = [(one.one, one.others, one.own) for one in made if not one.site]
    assert found == [
        ("federated", ["alone: a", "alone: b"], False),
        ("federated", ["alone: a", "alone: b"], True),
        ("federated", ["private"], False),
        ("federated", ["pooled"], False),
    ]
    by_site = [(one.one, one.others, one.site) for one in made if one.site]
    shared = [("federated", ["alone: a"], "a"), ("federated", ["alone: b"], "b")]
    assert by_site == shared and all(one.own for one in made if one.site)
    # With models of their own, the hospitals are compared by those as well.
    figures = TestFigures(per_site={}, pooled={})
    arms[1].own = figures
    own = {"federated, own models": answers["pooled"]}
    at_home = [one for one in paired("auc", arms, answers | own) if one.site == "a"]
    assert [one.one for one in at_home] == ["federated", "federated, own models"]
    expected = difference_at_home("auc", answers["pooled"], {"a": answers["alone: a"]})
    assert expected is not None
    assert (at_home[1].difference, at_home[1].interval) == expected
    assert paired("auc", arms, {}) == []
