"""A plan's patterns and a site's rules for de-identification, from the index to the study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.errors import DataError, PolicyError
from fedward.plan.explain import explain
from fedward.plan.load import plan_hash
from fedward_client.cohort.check import Room, check_plan
from fedward_client.cohort.freeze import make_cohort, save, stated, usable
from fedward_client.cohort.open import open_cohort
from fedward_client.cohort.report import make_report
from fedward_client.cohort.selection import only_selected
from fedward_client.cohort.training import fitting
from fedward_client.config import load_config
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.secret import site_secret

SITE = """
version = 1
[site]
name = "st-mary"
[datasets.chest]
root = "export"
format = "dicom"
task = "classification"
classes = ["no", "yes"]
minimum_patients = 1
"""
FLAGS: list[dict[str, Any]] = [
    {"BurnedInAnnotation": "YES", "PatientIdentityRemoved": "YES", "DeidentificationMethod": "x"},
    {"RecognizableVisualFeatures": "YES", "PatientIdentityRemoved": "NO"},
    {"PatientIdentityRemoved": "NO", "BurnedInAnnotation": "NO"},
    {"PatientIdentityRemoved": "YES"},
    {},
    {},
]


@pytest.fixture
def site(tmp_path: Path, dx: Any) -> Path:
    """Six radiographs of six patients, every other one of the hand."""
    rng = np.random.default_rng(1)
    for k, flags in enumerate(FLAGS):
        dx(
            tmp_path / "export" / f"{k}.dcm",
            rng.integers(0, 4096, (12, 10)),
            PatientID=f"P{k}",
            PatientName=f"N{k}",
            StudyInstanceUID=f"1.2.{k}",
            SeriesInstanceUID=f"1.2.{k}.1",
            BodyPartExamined=("CHEST", "HAND")[k % 2],
            PresentationIntentType="FOR PRESENTATION",
            **flags,
        )
    rows = "".join(f"P{k},{('no', 'yes')[k // 2 % 2]}\n" for k in range(6))
    (tmp_path / "export" / "labels.csv").write_text("PatientID,label\n" + rows)
    (tmp_path / "site.toml").write_text(SITE)
    return tmp_path / "site.toml"


def ruled(site: Path, **rules: str) -> Path:
    lines = "".join(f'{key} = "{rule}"\n' for key, rule in rules.items())
    site.write_text(f"{SITE}[datasets.chest.deidentification]\n{lines}")
    return site


def freeze(work: Any) -> Any:
    found = usable(work.dataset, work.index, work.extract)
    cohort = make_cohort("chest", work.dataset, found, work.index, work.extract)
    save(cohort, work.site.site.state)
    return open_cohort(work.site, "chest", secret=site_secret(work.site.site.state))


def test_report_and_check_tell_what_is_not_de_identified(tmp_path, site, reading, make_plan):
    with reading(site) as work:
        report = make_report("chest", work.dataset, work.index, work.extract)
        found = usable(work.dataset, work.index, work.extract)
        words = stated(found.samples, work.index, work.extract)
    assert report.identity_removed == {"NO": 2, "YES": 2, "not stated": 2}
    assert report.burned_in == {"not stated": 4, "NO": 1, "YES": 1}
    assert report.visual_features == {"not stated": 5, "YES": 1}
    assert report.deidentification == {"not stated": 5, "stated": 1}
    assert report.intent == {"FOR PRESENTATION": 6}
    risks = {risk.rule.split(" ", 2)[2]: (risk.count, risk.severity) for risk in report.risks}
    assert risks["is burnt into the pixels"] == (1, "high")
    assert risks["says that its patient's identity was not removed"] == (2, "medium")
    assert risks["shows a face or other features that identify"] == (1, "high")
    made = check_plan(
        "chest",
        "",
        work.dataset,
        found.samples,
        ["DX"] * 6,
        make_plan(split={"given": False}),
        Room(tmp_path, "cpu"),
        measure=False,
        stated=words,
    )
    (told,) = [one for one in made.findings if one.name == "de-identification"]
    assert told.status == "warn"
    assert told.found == "identity not removed: 2, recognizable features: 1, text burnt in: 1"


def test_a_site_leaves_out_or_refuses_what_is_not_de_identified(site, reading):
    with reading(ruled(site, burned_in="leave-out", visual_features="leave-out")) as work:
        found = usable(work.dataset, work.index, work.extract)
        assert len(make_cohort("chest", work.dataset, found, work.index, work.extract).items) == 4
        report = make_report("chest", work.dataset, work.index, work.extract)
        assert report.left_out["text burnt in"] == report.left_out["recognizable features"] == 1
    with reading(ruled(site, burned_in="refuse")) as work:
        found = usable(work.dataset, work.index, work.extract)
        with pytest.raises(DataError, match=r"not de-identified \(got text burnt in: 1\)"):
            make_cohort("chest", work.dataset, found, work.index, work.extract)


def test_a_rule_holds_for_cohorts_that_were_frozen_before_it(site, reading, make_plan):
    with reading(site) as work:
        cohort = freeze(work)
    plan = make_plan(split={"given": False}, participation={"minimum_patients": 1})
    assert len(fitting(cohort, plan, work.dataset.image_options())) == 6
    later = load_config(ruled(site, identity="leave-out")).dataset("chest").image_options()
    assert len(fitting(cohort, plan, later)) == 2
    later = load_config(ruled(site, visual_features="refuse")).dataset("chest").image_options()
    with pytest.raises(DataError, match="de-identified as the site asks") as caught:
        fitting(cohort, plan, later)
    assert "P1" not in str(caught.value)


def test_a_plan_selects_by_headers(tmp_path, site, reading, make_plan):
    hands = {"images": {"body_part": ["hand"]}, "participation": {"minimum_patients": 1}}
    plan = make_plan(split={"given": False}, **hands)
    with reading(site) as work:
        cohort = freeze(work)
    assert len(fitting(cohort, plan)) == 3
    made = check_plan(
        "chest",
        cohort.name,
        work.dataset,
        cohort.dataset.samples,
        ["DX"] * 6,
        plan,
        Room(tmp_path, "cpu"),
        measure=False,
    )
    (told,) = [one for one in made.findings if one.name == "images"]
    assert (told.status, told.found) == ("warn", "3 of 6 samples fit what the plan selects")
    assert sum(made.patients.values()) == 3
    # A site's policy is about the patients that a study takes; none and one are refused alike.
    none = make_plan(images={"kernel": ["b*"]}, participation={"minimum_patients": 1})
    assert len(fitting(cohort, plan, None, 3)) == 3
    for few, least in ((plan, 4), (none, 1)):
        with pytest.raises(PolicyError, match="as many patients as its policy") as caught:
            fitting(cohort, few, None, least)
        assert caught.value.values == {"limit": least}
    with pytest.raises(DataError, match="that the plan selects"):
        fitting(cohort, none)
    root = site.parent / "export"
    dataset = only_selected(read_dataset(DatasetSpec(root, "dicom"), plan.task), plan, root)
    assert [item.reason for item in dataset.left_out] == ["not selected"] * 3
    assert "BodyPartExamined fits hand" in " ".join(explain(plan).split())
    assert plan_hash(make_plan(images={})) == plan_hash(make_plan())
