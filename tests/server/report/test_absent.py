"""Hospitals that never took part stand in report and card, with the reason where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedward_server.artifacts.card import model_card
from fedward_server.report.page import render
from fedward_server.report.stats import site_names
from fedward_server.results import Failure, StudyResults

Read = Callable[[str], Any]


def with_absent(results: StudyResults) -> StudyResults:
    arm = results.arm("federated")
    assert arm is not None
    results.named = [*(facts.site for facts in results.sites), "refusing", "silent one"]
    for round_ in arm.rounds:
        round_.failures.append(Failure(site="refusing", reason="policy.models", kind="policy"))
    return results


def test_who_never_took_part_is_a_site_of_the_report(segmentation: StudyResults) -> None:
    known = site_names(segmentation)
    assert site_names(with_absent(segmentation)) == [*known, "refusing", "silent one"]
    html = render([segmentation])
    assert "refusing" in html and "policy.models" in html and "silent one" in html


def test_a_failure_alone_makes_a_site_seen(segmentation: StudyResults) -> None:
    with_absent(segmentation).named = []
    assert "refusing" in site_names(segmentation)


def test_the_card_names_them_and_the_release_that_ran_the_study(
    classification: StudyResults, make_plan: Callable[..., Any]
) -> None:
    results = with_absent(classification)
    results.versions = {"fedward": "0.0.7", "torch": "9"}
    rounds = len(results.arms[0].rounds)
    card = model_card("s-1", make_plan(), results)
    assert f"| silent one | – | – | – | – | 0 of {rounds} |" in card
    assert "Made with: Fedward 0.0.7, torch 9" in card
