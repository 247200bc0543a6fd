"""A promise about images is never told as one about patients."""

from __future__ import annotations

import pytest

from fedward_server.artifacts.card import model_card
from fedward_server.report import summary_table
from fedward_server.report.page import render
from fedward_server.report.summary import headline, patient_risk, privacy_words
from fedward_server.results import StudyResults


def per_image(results: StudyResults, *places: int) -> list[str]:
    """Say that the images of some sites name no patients; the sites' names."""
    for place in places:
        site = results.sites[place]
        results.sites[place] = site.model_copy(update={"images_are_patients": True})
    return [results.sites[place].site for place in places]


def covered(results: StudyResults) -> str:
    return dict(privacy_words(results))["ε and δ cover the released updates:"]


def test_where_patients_are_named_nothing_is_said_of_images(classification: StudyResults) -> None:
    assert patient_risk(classification) == ""
    assert "each single patient" in covered(classification)
    assert "single image" not in covered(classification)
    assert "HIGH RISK" not in render([classification])


def test_one_site_whose_images_name_nobody(classification: StudyResults) -> None:
    (name,) = per_image(classification, 1)
    said = covered(classification)
    assert "for each single patient of the site" in said
    assert f"at {name} for each single image" in said
    page = render([classification])
    assert "HIGH RISK" in page and patient_risk(classification) in page
    assert name in patient_risk(classification)


@pytest.mark.parametrize("private", [True, False])
def test_a_study_of_such_sites_alone(
    classification: StudyResults, make_plan, private: bool
) -> None:
    per_image(classification, *range(len(classification.sites)))
    assert "each single patient" not in covered(classification)
    assert "Image-level differential privacy costs" in headline(classification)
    privacy = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
    plan = make_plan(privacy=privacy if private else {"mechanism": "none"})
    card = model_card("s-1", plan, classification)
    assert "**High risk.**" in card and "each of its patients" not in card
    assert ("for each of its images" in card) is private


def test_the_terminal_says_so_too(classification: StudyResults) -> None:
    assert "high risk" not in str(summary_table(classification).title)
    per_image(classification, 0)
    assert "high risk: images count as patients" in str(summary_table(classification).title)
