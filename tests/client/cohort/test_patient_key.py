"""Data that name no patients: told everywhere, and no private study without the site's word."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from rich.console import Console as Rich

from fedward.errors import ConfigError, DataError
from fedward.rule_codes import RuleCode
from fedward_client.cohort.check import Room, check_plan
from fedward_client.cohort.freeze import (
    CohortFile,
    content_hash,
    counts,
    load,
    make_cohort,
    save,
    usable,
)
from fedward_client.cohort.patient_key import FIX, PER_IMAGE
from fedward_client.cohort.preview import whose
from fedward_client.cohort.report import make_report
from fedward_client.cohort.training import cache_folder, prepare_cohort
from fedward_client.commands.tables import cohort_table, report_tables
from fedward_client.config import load_config
from fedward_client.policy.decide import facts_of
from fedward_client.secret import site_secret
from fedward_client.trainer.admin import _per_image
from fedward_client.training.trainer import site_facts

RULE = "the data say whose each image is"
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
SITE = """
version = 1
[site]
name = "st-mary"
[datasets.chest]
root = "pictures"
task = "classification"
classes = ["no", "yes"]
minimum_patients = 2
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Pictures of 20 people in folders of classes: their names tell nobody."""
    rng = np.random.default_rng(1)
    for k in range(40):
        folder = tmp_path / "pictures" / ("no", "yes")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 255, (16, 16)).astype(np.uint8)
        Pillow.fromarray(values).save(folder / f"{k}.png")
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    return path


def name_patients(site: Path) -> None:
    rows = [f"{k},p{k // 4 * 2 + k % 2}" for k in range(40)]
    text = "\n".join(["image,Subject ID", *rows])
    (site.parent / "pictures" / "patients.csv").write_text(text + "\n")


def allow(site: Path) -> None:
    site.write_text(SITE + "images_are_patients = true\n")


def shown(*tables) -> str:
    out = io.StringIO()
    for table in tables:
        Rich(file=out, width=300).print(table)
    return out.getvalue()


def freeze(reading, site: Path) -> CohortFile:
    with reading(site) as work:
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort("chest", work.dataset, found, work.index, work.extract)
        save(cohort, work.site.site.state)
    return cohort


def prepared(site: Path, plan):
    config = load_config(site)
    return prepare_cohort(
        config,
        "chest",
        "latest",
        plan,
        secret=site_secret(config.site.state),
        cache=cache_folder(config),
    )


def checked(reading, site: Path, plan):
    with reading(site) as work:
        samples = usable(work.dataset, work.index, work.extract).samples
        made = check_plan(
            "chest",
            "",
            work.dataset,
            samples,
            [""] * len(samples),
            plan,
            Room(site.parent, "cpu"),
            measure=False,
        )
    return made, {one.name: one for one in made.findings}


def test_the_report_tells_it_as_a_high_risk(site, reading):
    with reading(site) as work:
        made = make_report("chest", work.dataset, work.index, work.extract)
    (risk,) = [one for one in made.risks if one.rule == RULE]
    assert (risk.count, risk.severity, risk.fix) == (40, "high", FIX)
    assert made.images_are_patients and made.sample_patients == 40
    assert "40 (each image counts as one)" in shown(*report_tables(made))
    allow(site)
    with reading(site) as work:
        made = make_report("chest", work.dataset, work.index, work.extract)
    assert [one.fix for one in made.risks if one.rule == RULE] == [PER_IMAGE]
    name_patients(site)
    with reading(site) as work:
        made = make_report("chest", work.dataset, work.index, work.extract)
    assert not made.images_are_patients and made.sample_patients == 20
    assert RULE not in [one.rule for one in made.risks]
    assert "counts as one" not in shown(*report_tables(made))


def test_a_check_fails_for_a_private_plan_until_the_site_allows_it(site, reading, make_plan):
    private = make_plan(privacy=PRIVATE)
    made, found = checked(reading, site, private)
    assert not made.can_serve and found["patient key"].status == "fail"
    assert "40 of 40" in found["patient key"].found and "each image" in found["patients"].found
    made, found = checked(reading, site, make_plan())
    assert made.can_serve and found["patient key"].status == "warn"
    allow(site)
    made, found = checked(reading, site, private)
    assert made.can_serve and found["patient key"].status == "warn"
    assert "high risk" in found["patient key"].found
    assert found["privacy"].found.endswith("per image") and made.privacy.per_image
    name_patients(site)
    made, found = checked(reading, site, private)
    assert made.can_serve and found["patient key"].status == "pass"
    assert "per image" not in found["privacy"].found and not made.privacy.per_image


def test_folders_name_the_patients_and_every_command_says_so(site, reading, make_plan):
    for k in range(40):
        path = site.parent / "pictures" / ("no", "yes")[k % 2] / f"{k}.png"
        target = path.parent / f"p{k // 4}" / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    site.write_text(SITE + "[datasets.chest.patients]\nfolder = 2\n")
    with reading(site) as work:
        found = usable(work.dataset, work.index, work.extract)
        made = make_report("chest", work.dataset, work.index, work.extract)
    assert {one.patient for one in found.samples} == {f"p{k}" for k in range(10)}
    assert not made.images_are_patients and made.sample_patients == 10
    assert "the patient of an image is folder 2 of its path" in made.hints
    assert whose(found.samples) == "40 samples of 10 patients"
    checks, told = checked(reading, site, make_plan(privacy=PRIVATE))
    assert checks.can_serve and told["patient key"].found.endswith(
        "(folder 2 of its path): 10 patients"
    )
    assert not facts_of(freeze(reading, site)).per_image
    site.write_text(site.read_text() + '[datasets.chest.labels]\npatient_column = "x"\n')
    with pytest.raises(ConfigError, match="one thing must name the patients"):
        load_config(site)


def test_a_frozen_cohort_is_held_to_it(site, reading, make_plan):
    private = make_plan(privacy=PRIVATE)
    cohort = freeze(reading, site)
    config = load_config(site)
    told = counts(cohort, config.dataset("chest"))
    assert told["images_are_patients"] and "high risk" in shown(cohort_table(told))
    assert facts_of(cohort).per_image
    with pytest.raises(DataError) as refused:
        prepared(site, private)
    assert refused.value.rule == RuleCode.PATIENT_KEY.text and "40 of 40" in str(refused.value)
    assert site_facts(make_plan(), prepared(site, make_plan())).images_are_patients
    allow(site)
    assert site_facts(private, prepared(site, private)).images_are_patients
    name_patients(site)
    site.write_text(SITE)
    named = freeze(reading, site)
    assert not counts(named, config.dataset("chest"))["images_are_patients"]
    facts = site_facts(private, prepared(site, private))
    assert not facts.images_are_patients and facts.patients == 20


def test_the_budget_of_such_a_cohort_is_one_of_images(site, reading):
    cohort = freeze(reading, site)
    state = load_config(site).site.state
    assert _per_image(state, "chest", cohort.sha256)
    assert not _per_image(state, "chest", "f" * 64)  # its record is gone
    name_patients(site)
    assert not _per_image(state, "chest", freeze(reading, site).sha256)


def test_a_cohort_of_an_older_release_is_taken_for_one_where_it_may_be(site, reading, tmp_path):
    cohort = freeze(reading, site)
    content = json.loads(cohort.model_dump_json(exclude={"images_are_patients"}))
    older = CohortFile.model_validate_json(json.dumps(content))
    older = older.model_copy(update={"sha256": content_hash(older)})
    path = tmp_path / "older.json"
    path.write_text(older.model_dump_json(exclude={"images_are_patients"}))
    assert load(path).images_are_patients is None and load(path).per_image
    name_patients(site)
    named = freeze(reading, site)
    before = named.model_copy(update={"images_are_patients": None})
    assert content_hash(before) == named.sha256 and not before.per_image
