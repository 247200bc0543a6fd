from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from fedward.errors import OutputError
from fedward_server.report import write_report
from fedward_server.report.formatting import NOTHING
from fedward_server.report.page import render
from fedward_server.results import Arm, StudyResults, TestFigures

Read = Callable[[str], Any]


def _test(arm: Arm) -> TestFigures:
    assert arm.test is not None
    return arm.test


def test_the_first_table_holds_each_arm_on_each_test_set(
    classification: StudyResults, page: Any
) -> None:
    rows = page.rows("AUC by test set")
    sites = [facts.site for facts in classification.sites]
    assert page.tables["AUC by test set"][0][1:] == [*sites, "mean of own tests", "all together"]
    for arm in classification.arms:
        test = _test(arm)
        each = [test.per_site[site]["auc"] or 0 for site in sites]
        home = NOTHING if arm.site else f"{fmean(each):.3f}"
        shown = [f"{value:.3f}" for value in each]
        assert rows[arm.name] == [*shown, home, f"{test.pooled['auc'] or 0:.3f}"]
    alone = [arm for arm in classification.arms if arm.kind == "alone"]
    homes = [_test(arm).per_site[str(arm.site)]["auc"] or 0 for arm in alone]
    pooled = fmean(_test(arm).pooled["auc"] or 0 for arm in alone)
    expected = [f"{value:.3f}" for value in (*homes, fmean(homes), pooled)]
    assert rows["hospitals alone, each at home"] == expected
    assert len(rows) == len(classification.arms) + 1


def test_one_hospitals_own_figure_is_no_rival_of_a_mean_over_all(
    classification: StudyResults, read_page: Read
) -> None:
    alone = next(arm for arm in classification.arms if arm.kind == "alone")
    _test(alone).per_site[str(alone.site)]["auc"] = 1.0
    pooled = next(arm for arm in classification.arms if arm.kind == "pooled")
    for site, figures in _test(pooled).per_site.items():  # apart from the federated arm
        figures["auc"] = 0.999
        _test(pooled).site_intervals[site]["auc"] = (0.99, 1.0)
    marks = read_page(render([classification])).marks["AUC by test set"]
    means = [arm for arm, column in marks if column == len(classification.sites) + 1]
    assert means and alone.name not in means


def test_what_is_better_than_all_others_is_marked(
    segmentation: StudyResults, read_page: Read
) -> None:
    federated = next(arm for arm in segmentation.arms if arm.kind == "federated")
    pooled = next(arm for arm in segmentation.arms if arm.kind == "pooled")
    _test(federated).pooled["hd95"] = 0.5  # less is better
    _test(federated).intervals["hd95"] = (0.4, 0.6)
    _test(pooled).pooled["dice"] = 0.99
    _test(pooled).intervals["dice"] = (0.98, 1.0)
    _test(pooled).per_class["hd95"] = {"lung": 0.1, "heart": 1.9}
    _test(pooled).class_intervals["hd95"] = {"lung": (0.05, 0.2), "heart": (0.0, 9.0)}
    html = render([segmentation])
    page = read_page(html)
    marks = page.marks["Every metric on all test patients together"]
    assert marks == [("federated", 3), ("pooled", 1)]  # by IoU none is
    assert page.marks["HD95 in mm by class, all test patients together"] == [("pooled", 1)]
    assert html.count("(best)") == sum(len(marks) for marks in page.marks.values())


def test_the_second_table_holds_every_metric(classification: StudyResults, page: Any) -> None:
    caption = "Every metric on all test patients together"
    names = ["auc", "accuracy", "sensitivity", "specificity", "ece"]
    assert len(page.tables[caption][0]) == 1 + len(names)
    for arm in classification.arms:
        expected = [f"{_test(arm).pooled[name]:.3f}" for name in names]
        assert page.rows(caption)[arm.name] == expected


def test_figures_per_class(segmentation: StudyResults, read_page: Read) -> None:
    page = read_page(render([segmentation]))
    for metric, name, digits in (("dice", "Dice", 3), ("hd95", "HD95 in mm", 2)):
        rows = page.rows(f"{name} by class, all test patients together")
        for arm in segmentation.arms:
            values = [_test(arm).per_class[metric][key] or 0 for key in ("lung", "heart")]
            expected = [f"{value:.{digits}f}" for value in (*values, fmean(values))]
            assert rows[arm.name] == expected


def test_privacy_is_told_by_site(classification: StudyResults, page: Any) -> None:
    rows = page.tables["Privacy spent, by site"][1:]
    expected = [
        [
            arm.name,
            site,
            f"{arm.epsilon:g}",
            f"{spent.epsilon:.3f}",
            f"{spent.delta:g}",
            f"{spent.noise_multiplier:.3f}",
            f"{spent.sampling_rate:.4g}",
            f"{spent.steps:,}",
        ]
        for arm in classification.arms
        for site, spent in arm.privacy.items()
    ]
    assert rows == expected and len(rows) == 12
    assert "ε and δ cover the released updates:" in page.text
    assert "They do not cover evaluations" in page.text
    assert "This is a simulation:" in page.text


def test_without_privacy_the_page_says_so(segmentation: StudyResults, read_page: Read) -> None:
    page = read_page(render([segmentation]))
    assert "trained without differential privacy" in page.text
    assert "Privacy spent, by site" not in page.tables
    assert "epsilon" not in {str(values.get("id")) for _, values in page.tags}


def test_sites_and_what_they_left_out(classification: StudyResults, page: Any) -> None:
    rows = page.rows("Patients, images and classes")
    for facts in classification.sites:
        shown = rows[facts.site]
        numbers = [
            facts.patients,
            facts.train_patients,
            facts.validation_patients,
            facts.test_patients,
            facts.images,
            *facts.class_counts,
        ]
        assert shown[:-1] == [f"{number:,}" for number in numbers]
    assert rows["Harbour"][-1] == "wrong modality: 7; no label: 3"
    assert rows["North"][-1] == "none"
    total = sum(facts.patients for facts in classification.sites)
    assert rows["all sites"][0] == f"{total:,}" and rows["all sites"][-1] == "10"


def test_failures_are_named_by_site_and_round(classification: StudyResults, page: Any) -> None:
    rows = {row[1]: row[2:] for row in page.tables["Updates that counted, by site"][1:]}
    assert rows["Hill"] == [
        "10 of 12",
        "2",
        "the site did not answer before the deadline (rounds 4–5)",
    ]
    assert rows["Harbour"] == ["11 of 12", "1", "an update must be finite (round 9)"]
    assert rows["North"] == ["12 of 12", "0", "–"]
    assert "3 updates did not count" in page.text
    labels = [values["aria-label"] or "" for tag, values in page.tags if tag == "svg"]
    assert any("Hill missed rounds 4–5" in label for label in labels)


def test_a_failure_made_good_by_a_retry_counts(
    classification: StudyResults, read_page: Read
) -> None:
    arm = next(arm for arm in classification.arms if arm.epsilon == 8)
    for round_ in arm.rounds:
        for failure in round_.failures:
            round_.sites[failure.site] = next(iter(round_.sites.values()))
    page = read_page(render([classification]))
    assert "Every site's update counted in every round." in page.text
    assert "Updates that counted, by site" not in page.tables


def test_time_and_traffic(classification: StudyResults, page: Any) -> None:
    rows = page.rows("Time and traffic")
    arm = next(arm for arm in classification.arms if arm.name == "federated")
    seconds = [round_.seconds for round_ in arm.rounds]
    assert rows["federated"] == [
        "12",
        f"{fmean(seconds):.1f} s",
        f"{max(seconds):.1f} s",
        "386.1 kB",
        "386.1 kB",
        f"{2 * 12 * 4 * 96_520 / 1e6:.2f} MB",
        "52.4 s",
    ]
    assert rows["pooled"][3:6] == ["–"] * 3
    rounds = page.rows("federated")
    for round_ in arm.rounds:
        shown = rounds[str(round_.round)]
        assert shown[3:6] == [
            f"{round_.train_loss:.3f}",
            f"{round_.validation['auc']:.3f}",
            "4",
        ]


def test_of_very_many_rounds_the_measured_ones_and_some_between_are_shown(
    classification: StudyResults, read_page: Read
) -> None:
    arm = classification.arms[0]
    first = arm.rounds[0]
    every = [first.model_copy(update={"round": n, "validation": {}}) for n in range(1, 1001)]
    every[498].validation = {"auc": 0.5}
    arm.rounds = every
    rows = read_page(render([classification])).rows(
        f"{arm.name}, 202 of 1,000 rounds; metrics.json has all"
    )
    assert [int(number) for number in rows] == [1, *sorted([499, *range(5, 1001, 5)])]
    arm.rounds = every[:200]
    assert len(read_page(render([classification])).rows(arm.name)) == 200


def test_charts_say_their_numbers_in_words(classification: StudyResults, page: Any) -> None:
    labels = [values["aria-label"] or "" for tag, values in page.tags if tag == "svg"]
    assert len(labels) == 5
    comparison, privacy, learning, losses, _ = labels
    for arm in classification.arms:
        if arm.kind != "alone":
            assert f"{arm.name} {_test(arm).pooled['auc']:.3f}" in comparison
        assert f"{arm.name} ends at {arm.rounds[-1].validation['auc']:.3f}" in learning
        assert f"{arm.name} ends at {arm.rounds[-1].train_loss:.3f}" in losses
    for told in ("ε = 1 0.884 (0.874–0.894)", "ε = 3 0.921", "ε = 8 0.937"):
        assert told in privacy
    assert "federated, no privacy 0.951" in privacy and "pooled 0.955" in privacy


@pytest.mark.parametrize("dropped", [8, 3])
def test_the_privacy_curve_needs_two_points(
    dropped: int, classification: StudyResults, read_page: Read
) -> None:
    classification.arms = [
        arm for arm in classification.arms if arm.epsilon is None or arm.epsilon == dropped
    ]
    page = read_page(render([classification]))
    assert not any("over ε" in str(values.get("aria-label")) for _, values in page.tags)


def test_nothing_is_fetched_and_nothing_runs(
    classification: StudyResults, segmentation: StudyResults, read_page: Read
) -> None:
    html = render([classification, segmentation], extra_notes=["A note."])
    assert not re.findall(r"https?:|src\s*=|@import|javascript:|//[a-z]", html)
    assert not re.findall(r"url\((?!#|data:)", html)
    page = read_page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))
    targets = [str(values["href"]) for _, values in page.tags if "href" in values]
    targets += [f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", html)]
    assert targets and all(target[0] == "#" and target[1:] in ids for target in targets)
    assert not any(key.startswith("on") for _, values in page.tags for key in values)


EVIL = "<img src=x onerror=alert(1)>&\"'"


def test_markup_in_texts_is_shown_not_obeyed(classification: StudyResults, read_page: Read) -> None:
    study = classification
    study.title, study.study, study.partition, study.device = EVIL, EVIL, EVIL, EVIL
    study.versions = {EVIL: EVIL}
    study.plan["study"]["intended_use"] = EVIL
    study.plan["task"]["classes"] = [EVIL, "b"]
    study.complete = False
    for arm in study.arms:
        arm.name = f"{EVIL} $x_1$ {arm.name}"
        arm.site = arm.site and EVIL
        test = _test(arm)
        test.per_site = dict.fromkeys([EVIL], next(iter(test.per_site.values())))
        if arm.privacy:
            arm.privacy = dict.fromkeys([EVIL], next(iter(arm.privacy.values())))
        for round_ in arm.rounds:
            round_.sites = dict.fromkeys([EVIL], next(iter(round_.sites.values())))
            round_.failures = [f.model_copy(update={"reason": EVIL}) for f in round_.failures]
    html = render([study, study], extra_notes=[EVIL])
    assert "<img" not in html
    page = read_page(html)
    assert page.text.count(EVIL) > 20
    assert not any(key.startswith("on") for _, values in page.tags for key in values)
    assert "img" not in {tag for tag, _ in page.tags}


def test_synthetic_data_is_unmissable(
    classification: StudyResults, page: Any, read_page: Read
) -> None:
    assert page.text.count("SYNTHETIC DATA") == 2
    assert "Synthetic data: Pneumonia" in page.text
    classification.synthetic, classification.arms = False, []
    assert not re.search("synthetic data", read_page(render([classification])).text, re.IGNORECASE)


def test_one_synthetic_study_does_not_mark_the_other(
    classification: StudyResults, segmentation: StudyResults, read_page: Read
) -> None:
    classification.arms, segmentation.arms = [], []
    text = read_page(render([classification, segmentation])).text
    assert "in: Pneumonia on chest X-rays, four hospitals" in text
    assert text.count("A program made these images") == 1


def test_an_interrupted_study_says_so_and_names_what_is_missing(
    classification: StudyResults, page: Any, read_page: Read
) -> None:
    assert "INTERRUPTED" not in page.text
    classification.complete = False
    classification.arms[-1].test = None
    cut = read_page(render([classification]))
    assert "INTERRUPTED" in cut.text and "Unfinished: pooled." in cut.text
    assert "pooled" not in cut.rows("AUC by test set")


def test_the_page_can_be_read_without_seeing_it(
    classification: StudyResults, segmentation: StudyResults, read_page: Read
) -> None:
    html = render([classification, segmentation])
    page = read_page(html)
    tags = [tag for tag, _ in page.tags]
    assert html.lstrip().startswith("<!doctype html>")
    assert ("html", {"lang": "en"}) in page.tags
    assert tags.count("h1") == 1 and tags.count("main") == 1
    assert tags.count("caption") == tags.count("table")
    assert all(values.get("scope") in {"col", "row"} for tag, values in page.tags if tag == "th")
    pictures = [values for tag, values in page.tags if tag == "svg"]
    assert pictures and all(p["role"] == "img" and p["aria-label"] for p in pictures)
    widths = {len(row) for rows in page.tables.values() for row in rows[:1]}
    assert all(len(row) == len(rows[0]) for rows in page.tables.values() for row in rows), widths


def test_the_plan_stands_there_with_its_hash_but_no_folder(
    segmentation: StudyResults, read_page: Read
) -> None:
    segmentation.arms = []
    for file in ("/home/jane/w.pth", r"C:\Users\jane\w.pth", "~/jane/w.pth", "../jane/w.pth"):
        segmentation.plan["model"]["initial_weights"] = {"file": file, "sha256": "a" * 64}
        text = read_page(render([segmentation])).text
        assert "jane" not in text and 'file = "…/w.pth"' in text
    assert segmentation.plan_sha256 in text
    assert 'train = ["model.2.*"]' in text and "118 matched" in text
    segmentation.plan["model"]["initial_weights"]["file"] = "package:name/w.pth"
    assert 'file = "package:name/w.pth"' in read_page(render([segmentation])).text


def test_the_same_results_give_the_same_page(classification: StudyResults, html: str) -> None:
    assert render([classification]) == html


def test_notes_versions_and_intended_use_are_shown(
    classification: StudyResults, read_page: Read
) -> None:
    classification.arms = []
    text = read_page(render([classification], extra_notes=["One.", "Two."])).text
    for words in ("One.", "Two.", "flwr 1.41.0", "Not for diagnosis.", "24,130 parameters"):
        assert words in text


def test_a_study_without_anything_still_has_a_page(
    classification: StudyResults, read_page: Read
) -> None:
    bare = classification.model_copy(
        update={"arms": [], "sites": [], "versions": {}, "plan": {}, "complete": False, "title": ""}
    )
    text = read_page(render([bare])).text
    assert "No federated model was finished." in text and "pneumonia-demo" in text


def test_figures_that_do_not_exist_are_dashes(
    classification: StudyResults, read_page: Read
) -> None:
    for arm in classification.arms:
        for figures in (*_test(arm).per_site.values(), _test(arm).pooled):
            if arm.kind != "pooled":
                figures["auc"] = None if arm.kind == "alone" else float("nan")
        for round_ in arm.rounds:
            round_.train_loss = float("nan")
            round_.validation["auc"] = None
    page = read_page(render([classification]))
    assert set(page.rows("AUC by test set")["federated"]) == {"–"}
    assert not page.marks["AUC by test set"]
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", page.text.lower())


def test_the_file_is_written_whole_or_not_at_all(
    classification: StudyResults, html: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report([classification], path)
    assert path.read_text("utf-8") == html
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]
    assert path.stat().st_size < 400_000
    classification.arms = []
    with pytest.raises(OutputError, match=r"must be writable \(got report\.html: "):
        write_report([classification], tmp_path / "none" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        write_report([classification], tmp_path / "folder")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "report.html"]
