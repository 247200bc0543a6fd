"""Membership inference: separation against scikit-learn, LiRA on made-up confidences."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from fedward_simulation.audit.membership import (
    Shadows,
    by_patient,
    lira_offline,
    lira_online,
    separation,
)


def test_a_patients_score_is_the_mean_over_the_patients_images() -> None:
    found = by_patient(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 2]), 3)
    assert found[0] == 2.0 and np.isnan(found[1]) and found[2] == 5.0


def test_separation_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    members = rng.random(600) < 0.5
    scores = rng.normal(size=600) + members
    found = separation(scores, members)
    assert found.auc == pytest.approx(roc_auc_score(members, scores))
    false, true, _ = roc_curve(members, scores, drop_intermediate=False)
    assert found.true_rates[0.01][0] == pytest.approx(true[false <= 0.01].max())
    low, high = found.true_rates[0.01][1:]
    assert low < found.true_rates[0.01][0] < high
    assert 0.001 not in found.true_rates  # 300 others cannot resolve it


def test_the_error_of_the_auc_is_its_spread() -> None:
    rng, aucs, told = np.random.default_rng(1), [], []
    members = np.arange(200) < 100
    for _ in range(300):
        found = separation(rng.normal(size=200) + 0.5 * members, members)
        aucs.append(found.auc)
        told.append(found.auc_error)
    assert np.mean(told) == pytest.approx(np.std(aucs), rel=0.15)


def test_lira_beats_the_threshold_where_patients_differ() -> None:
    """Easy patients are confident without being members; only shadow models tell them apart."""
    rng, people, shadows = np.random.default_rng(2), 400, 8
    ease = 3 * rng.normal(size=people)
    inside = rng.random((shadows + 1, people)) < 0.5
    confidence = ease + 1.0 * inside + 0.5 * rng.normal(size=inside.shape)
    known = Shadows(confidence[1:], inside[1:])
    plain = separation(confidence[0], inside[0]).auc
    offline = separation(lira_offline(confidence[0], known), inside[0]).auc
    online = separation(lira_online(confidence[0], known), inside[0]).auc
    assert plain < 0.65 < 0.85 < offline
    assert online > 0.85


def test_lira_does_without_a_patient_whom_no_shadow_had() -> None:
    rng = np.random.default_rng(3)
    inside = np.array([[True, True, False], [True, False, False]])
    known = Shadows(rng.normal(size=(2, 3)), inside)
    assert np.isfinite(lira_online(np.zeros(3), known)).all()
    assert np.isfinite(lira_offline(np.zeros(3), known)).all()
