"""Of whom a figure is: headlines and pages of studies in which hospitals withheld counts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from fedward.rule_codes import RuleCode
from fedward_client.policy.settings import PolicySection
from fedward_server.artifacts.card import model_card
from fedward_server.report import headline
from fedward_server.report.page import render
from fedward_server.report.tables import KEYS
from fedward_server.results import Arm, Failure, StudyResults, TestFigures

Read = Callable[[str], Any]
POLICY = "what the site counts must be enough, and allowed, to leave it."


@pytest.fixture
def real(classification: StudyResults) -> StudyResults:
    """A study between hospitals: one arm, without privacy, every figure given."""
    classification.arms = [arm for arm in classification.arms if arm.name == "federated"]
    classification.engine, classification.synthetic = "between hospitals", False
    return classification


def _test(results: StudyResults) -> TestFigures:
    test = results.arms[0].test
    assert test is not None
    return test


def withhold(results: StudyResults, metric: str, *sites: str) -> None:
    """The sites' counts for a metric stay where they are."""
    test = _test(results)
    test.contributors[metric] = [s for s in test.contributors[metric] if s not in sites]
    for site in sites:
        test.per_site[site][metric] = None
        test.site_intervals[site].pop(metric, None)
    if not test.contributors[metric]:
        test.pooled[metric] = None
        test.intervals.pop(metric, None)


def test_one_hospitals_patients_are_not_all_together(real: StudyResults, read_page: Read) -> None:
    """0.618 AUC of one hospital's 16 patients; the others withheld their scores."""
    withhold(real, "auc", "North", "Harbour", "St. Anne")
    test = _test(real)
    test.pooled["auc"], test.intervals["auc"] = 0.618, (0.35, 0.83)
    test.patients["Hill"] = 16
    text = headline(real)
    assert text.startswith(
        "The federated model reached 0.618 AUC (95 % interval 0.350–0.830) on the 16 test "
        "patients of 1 of 4 hospitals (Hill)."
    )
    assert "Not in it: North (its policy withholds AUC); Harbour (" in text
    html = render([real])
    page = read_page(html)
    assert "all test patients together" not in text + html
    assert page.tables["AUC by test set"][0][-1] == "together, 1 of 4 hospitals"
    heads = page.tables["Every metric on the test patients of the hospitals that gave it"][0]
    assert heads[1:3] == ["AUC (1 of 4 hospitals)", "accuracy"]
    row = page.rows("Of whom the figures are (federated)")["North"]
    assert row[0] == "240" and row[3] == "AUC"
    assert "`metrics`" in row[4] and "`minimum_count`" in row[4]
    assert page.rows("Of whom the figures are (federated)")["Hill"][3:] == ["none", "–"]


def test_a_metric_that_nobody_gave_is_no_dash_and_no_empty_chart(
    real: StudyResults, read_page: Read
) -> None:
    withhold(real, "auc", "North", "Harbour", "St. Anne", "Hill")
    for round_ in real.arms[0].rounds:
        round_.validation["auc"] = None
    text = headline(real)
    assert text.startswith("AUC is known of no hospital's test patients. Why: North (its policy")
    assert "reached 0.891 accuracy (95 % interval 0.881–0.901) on all test patients" in text
    first, last = (real.arms[0].rounds[at].train_loss for at in (0, -1))
    assert f"The training loss went from {first:.3f} to {last:.3f} in 12 rounds." in text
    assert "– " not in text and "  " not in text
    page = read_page(render([real]))
    labels = [values["aria-label"] or "" for tag, values in page.tags if tag == "svg"]
    assert len(labels) == 2  # learning, by a metric that there is, and loss
    assert labels[0].startswith("accuracy, validation patients, by round")
    assert labels[1].startswith("training loss, by round")
    assert "AUC by test set" not in page.tables and "tiles" not in {
        values.get("class") for _, values in page.tags
    }
    assert page.tables["Every metric on all test patients together"][0][1] == "accuracy"


def test_hospitals_that_sent_no_counts_are_named_with_their_reason(
    real: StudyResults, read_page: Read, make_plan: Callable[..., Any]
) -> None:
    test = _test(real)
    for name in test.contributors:
        test.contributors[name] = ["Harbour", "North"]
    for site in ("St. Anne", "Hill"):
        del test.per_site[site], test.images[site], test.patients[site]
    test.not_measured = [
        Failure(site="Hill", reason=POLICY, kind="policy"),
        Failure(site="St. Anne", reason="not connected", kind="silent"),
    ]
    text = headline(real)
    assert "on the 402 test patients of 2 of 4 hospitals (Harbour and North)" in text
    assert f"Not in it: St. Anne (not connected); Hill ({POLICY.rstrip('.')})." in text
    rows = read_page(render([real])).rows("Of whom the figures are (federated)")
    assert rows["St. Anne"][-1] == "not connected."
    assert "`metrics` and `minimum_count` in [policy]" in rows["Hill"][-1]
    card = model_card("s-1", make_plan(metrics={"report": ["auc"], "primary": "auc"}), real)
    assert "| together | 0.951 (0.941–0.961) |" in card
    assert (
        "- auc: the 402 test patients of 2 of 4 hospitals (Harbour and North). Not in it: " in card
    )


def test_a_hospital_that_never_took_part_is_missing_with_its_reason(
    real: StudyResults, read_page: Read
) -> None:
    real.named = [*(facts.site for facts in real.sites), "refusing", "silent one"]
    failure = Failure(site="refusing", reason="updates must be private.", kind="policy")
    real.arms[0].rounds[-1].failures.append(failure)
    text = headline(real)
    assert "on the 546 test patients of 4 of 6 hospitals" in text
    assert "Not in it: refusing (updates must be private); silent one (not measured)." in text
    rows = read_page(render([real])).rows("Of whom the figures are (federated)")
    assert rows["refusing"][-1] == "updates must be private."  # not for its counts
    assert rows["silent one"][0] == "–"


def test_the_keys_are_those_of_the_policys_own_sentences() -> None:
    assert list(KEYS) == [RuleCode.WITHHELD, RuleCode.EVALUATION_EPSILON]
    named = {key for told in KEYS.values() for key in re.findall(r"`(\w+)`", told)}
    assert named <= set(PolicySection.model_fields)


def test_a_study_that_nobody_measured_tells_what_there_is(
    real: StudyResults, read_page: Read
) -> None:
    sites = ["North", "Harbour", "St. Anne", "Hill"]
    failures = [Failure(site=site, reason=POLICY, kind="policy") for site in sites]
    real.arms[0].test = TestFigures(per_site={}, pooled={}, not_measured=failures)
    for round_ in real.arms[0].rounds:
        round_.validation = {}
    text = headline(real)
    assert text.startswith("AUC is known of no hospital's test patients. Why: North (what the site")
    assert "The training loss went from" in text
    page = read_page(render([real]))
    assert [tag for tag, _ in page.tags].count("svg") == 1
    assert "accuracy" in page.rows("Of whom the figures are (federated)")["North"][3]


def test_a_hospital_without_test_patients_is_missing_nowhere(real: StudyResults) -> None:
    sites = list(real.sites)
    real.sites = [
        one.model_copy(update={"test_patients": 0, "test_images": 0}) if one.site == "Hill" else one
        for one in sites
    ]
    test = _test(real)
    for name in test.contributors:
        test.contributors[name] = ["Harbour", "North", "St. Anne"]
    del test.per_site["Hill"], test.patients["Hill"], test.images["Hill"]
    assert "on all test patients together (493 patients of 3 hospitals)" in headline(real)


def test_a_comparison_says_of_whom_it_is(classification: StudyResults) -> None:
    for arm in classification.arms:
        assert isinstance(arm, Arm) and arm.test is not None
        arm.test.contributors["auc"] = ["Hill", "North"]
    text = headline(classification)
    assert "on the 293 test patients of 2 of 4 hospitals (Hill and North)" in text
    assert "all test patients" not in text
