"""The figures of an arm where hospitals let go of different parts of their counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from fedward.plan import Plan
from fedward.tasks.classification import ClassificationCounts
from fedward.tasks.private_counts import AnyCounts, PrivateCounts
from fedward.tasks.registry import counts_from_arrays
from fedward_client.egress.disclosure import release
from fedward_client.policy.settings import Limits
from fedward_server import metrics_summary

METRICS = {"report": ["auc", "accuracy", "sensitivity"], "primary": "auc"}
Scored = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def scored(n: int, seed: int) -> Scored:
    random = np.random.default_rng(seed)
    truth = np.arange(n) % 2
    p = 1 / (1 + np.exp(-random.normal(2.0 * truth - 1, 1.0)))
    return np.stack([1 - p, p], axis=1), truth


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(metrics=METRICS)


def released(plan: Plan, n: int, seed: int, **limits: Any) -> AnyCounts:
    """What leaves a hospital that counts exactly under a policy."""
    counts = ClassificationCounts.from_scores(*scored(n, seed))
    policy = Limits(counts="minimum-cells", count_noise=0.0, rounding=9, **limits)
    return counts_from_arrays(plan.task, release(counts, policy)[0])


def noisy(plan: Plan, n: int, seed: int, allowed: Any) -> PrivateCounts:
    """What leaves a hospital that counts with noise (here: none), of the tables it allows."""
    p, truth = scored(n, seed)
    parts = plan.task.spec.parts_for(plan.task, plan.metrics.report, allowed, surface=False)
    flags = truth[:, None] == np.arange(2)
    return PrivateCounts(
        plan.task,
        plan.task.spec.tables(plan.task, p, flags, np.ones(n, np.int64), parts),
        1,
        0.0,
        1.0,
    )


def test_a_figure_is_of_those_who_gave_it_and_says_of_whom(plan: Plan) -> None:
    shy = ("accuracy", "ece")  # scores and confusion stay
    counts = {
        "north": released(plan, 40, 1, minimum_count=1),
        "south": released(plan, 60, 2, minimum_count=1, metrics=shy),
    }
    test = metrics_summary.test_figures(plan, counts, {"north": (40, 40), "south": (60, 60)})
    p, truth = scored(40, 1)
    assert test.pooled["auc"] == pytest.approx(roc_auc_score(truth, p[:, 1]), abs=2e-3)
    both = [np.concatenate(parts) for parts in zip(scored(40, 1), scored(60, 2), strict=True)]
    assert test.pooled["accuracy"] == accuracy_score(both[1], both[0].argmax(axis=1))
    assert test.contributors == {
        "auc": ["north"],
        "accuracy": ["north", "south"],
        "sensitivity": ["north"],
    }
    assert test.per_site["south"]["auc"] is None
    assert set(test.site_intervals["south"]) == {"accuracy"}
    assert test.patients == {"north": 40, "south": 60}


def test_what_one_hospital_withholds_takes_no_figure_from_the_others(plan: Plan) -> None:
    """Noisy tables: the sum had kept only what all hospitals let go, here nothing."""
    everything = noisy(
        plan,
        40,
        1,
        ("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1", "ece", "loss"),
    )
    decided = noisy(
        plan, 60, 2, ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1", "ece")
    )
    assert set(everything.tables) == {"scores"} and set(decided.tables) == {"decisions"}
    test = metrics_summary.test_figures(
        plan, {"a": everything, "b": decided}, {"a": (40, 40), "b": (60, 60)}
    )
    p, truth = scored(40, 1)
    assert test.pooled["auc"] == pytest.approx(roc_auc_score(truth, p[:, 1]), abs=0.03)
    assert test.contributors["auc"] == ["a"]
    assert test.answers is not None and list(test.answers.curves) == ["yes"]


def test_a_policy_that_lets_nothing_out_leaves_no_figure(plan: Plan) -> None:
    shy = {"south": released(plan, 60, 2, minimum_count=1, metrics=("ece", "accuracy"))}
    per_site, pooled = metrics_summary.figures(plan, shy)
    assert pooled["auc"] is None and per_site["south"]["sensitivity"] is None
    test = metrics_summary.test_figures(plan, {}, {})
    assert (test.per_site, test.pooled, test.answers) == ({}, {}, None)


def test_noisy_boxes_of_hospitals_add_up_to_their_figure(make_plan: Callable[..., Plan]) -> None:
    names = ["map50", "box_f1"]
    plan = make_plan(
        task={"kind": "detection", "classes": ["dot"]},
        model={"name": "retinanet", "channels": None},
        training={"loss": "focal_giou"},
        metrics={"report": names, "primary": "map50"},
    )
    counts: dict[str, AnyCounts] = {
        site: PrivateCounts(plan.task, {"box_f1": np.array([cells])}, 10, 1.0, 1.0)
        for site, cells in (("north", (100, 300)), ("south", (100, 500)))
    }
    found = metrics_summary.test_figures(plan, counts, dict.fromkeys(counts, (40, 40)))
    assert found.answers is None
    assert found.pooled["box_f1"] == pytest.approx(0.8) and found.pooled["map50"] is None


def test_images_of_patients_with_many_weigh_as_patients() -> None:
    assert metrics_summary.patients_per_image([(40, 40)]) == 1.0
    assert metrics_summary.patients_per_image([(40, 10)]) == 0.25
    # By hand, Kish: 110 patients with n_eff = (sum m)^2 / sum m^2 over 1,100 images.
    sizes = np.repeat([1, 100], [100, 10])
    kish = sizes.sum() ** 2 / (sizes**2).sum()
    assert metrics_summary.patients_per_image([(100, 100), (1000, 10)]) == pytest.approx(
        kish / 1100
    )
