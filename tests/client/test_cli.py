"""``fedward-client data`` as a hospital's engineer types it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image as Pillow

from fedward_client.cohort.report import safe_word

PLANTED = ("DOE^JANE", "MRN4711", "1.2.826.0.99.4711", "19550712", "ward-7-doe", "ACC99123")


@pytest.fixture
def run(commands, tmp_path):
    """Runs ``fedward-client data`` for a hospital."""

    def call(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return commands("fedward_client.cli", "data", *words, "--config", site, cwd=tmp_path)

    return call


def quiet_about_people(done: subprocess.CompletedProcess[str]) -> None:
    for planted in PLANTED:
        assert planted not in done.stdout + done.stderr


@pytest.mark.integration
def test_index_then_report(run, site, export):
    first = run(site, "index", "--json")
    assert first.returncode == 0
    found = json.loads(first.stdout)["datasets"]["chest"]
    assert (found["new"], found["reasons"]["not DICOM"]) == (21, 2)
    second = run(site, "report", "chest", "--json")
    assert second.returncode == 0, second.stderr
    made = json.loads(second.stdout)
    assert {key: made[key] for key in ("files", "instances", "patients", "studies", "series")} == {
        "files": 21,
        "instances": 12,
        "patients": 6,
        "studies": 6,
        "series": 6,
    }
    assert made["images_by_class"] == {"well": 6, "sick": 6}
    assert made["patients_by_class"] == {"well": 3, "sick": 3}
    assert sum(made["split"].values()) == 6
    assert made["size"] == {"12 x 10": 12}
    assert made["left_out"] == {
        "no pixel data": 1,
        "not DICOM": 2,
        "not a file": 2,
        "linked folder": 1,
        "not readable": 1,
        "too large": 1,
    }
    assert [(risk["rule"], risk["count"]) for risk in made["risks"]] == [
        ("every class has at least 4 patients", 2)
    ]
    images = [pydicom.dcmread(path).pixel_array for path in export.glob("MRN*/*.dcm")]
    assert made["intensity"]["DX"] == {
        "lowest": min(int(i.min()) for i in images),
        "highest": max(int(i.max()) for i in images),
        "typical_lowest": statistics.median_low([int(i.min()) for i in images]),
        "typical_highest": statistics.median_low([int(i.max()) for i in images]),
    }
    shown = run(site, "report", "chest")
    assert "12 x 10" in shown.stdout
    for done in (first, second, shown):
        quiet_about_people(done)


@pytest.mark.integration
def test_a_dataset_that_is_not_mounted_stops_only_its_own_commands(run, site, tmp_path):
    more = """
[datasets.{name}]
root = "MRN4711-{name}"
task = "classification"
classes = ["well", "sick"]
"""
    site.write_text(site.read_text() + more.format(name="away") + more.format(name="pelvis"))
    (tmp_path / "MRN4711-pelvis").mkdir()
    (tmp_path / "MRN4711-pelvis" / "notes.txt").write_text("no image")
    whole = run(site, "index", "--json")
    answer = json.loads(whole.stdout)
    assert list(answer["datasets"]) == ["chest"] and answer["datasets"]["chest"]["new"] == 21
    assert set(answer["failed"]) == {"away", "pelvis"}
    assert whole.returncode == 19
    assert "datasets.away.root" in whole.stderr and "mount" in whole.stderr
    one, other = run(site, "report", "chest", "--json"), run(site, "index", "away", "--json")
    assert one.returncode == 0 and json.loads(one.stdout)["samples"] == 12
    assert other.returncode == 19 and "must exist" in json.loads(other.stdout)["message"]
    for done in (whole, one, other):
        quiet_about_people(done)


@pytest.mark.integration
def test_risks_are_counted(run, site, export, dx):
    same = pydicom.dcmread(export / "MRN47110" / "DOE^JANE-0.dcm").pixel_array
    dx(export / "r1.dcm", same, PatientID="MRN47113", BurnedInAnnotation="YES")
    dx(export / "r2.dcm", np.ones((9, 9)), PatientID="ANON")
    dx(export / "r3.dcm", np.ones((8, 9)), PatientID="")
    dx(
        export / "r4.dcm",
        np.ones((7, 9)),
        PatientID="MRN47112",
        PixelSpacing=[0.7, 0.7],
        SeriesInstanceUID="1.2.826.0.99.4711.2",
    )
    dx(
        export / "r5.dcm",
        np.ones((7, 8)),
        PatientID="MRN47112",
        PixelSpacing=[0.8, 0.8],
        SeriesInstanceUID="1.2.826.0.99.4711.2",
    )
    with (export / "labels.csv").open("a") as table:
        table.write("MRN47111,well\nMRN47999,sick\n/MRN47998,sick\n")
    made = json.loads(run(site, "report", "chest", "--json").stdout)
    risks = {risk["rule"]: risk["count"] for risk in made["risks"]}
    assert risks == {
        "no two files show the same pixels": 1,
        "no two patients or parts share an image, or a test would leak": 1,
        "a patient id stands for one patient": 1,
        "every image names its patient": 1,
        "no text is burnt into the pixels": 1,
        "one name and birth date has one patient id": 1,
        "a study is of one patient": 1,
        "the rows of one image agree": 2,
        "every class has at least 4 patients": 2,
        "the images of a series have one spacing": 1,
        "every label and every mask has an image": 2,
    }
    severity = {risk["rule"]: risk["severity"] for risk in made["risks"]}
    assert severity["no two patients or parts share an image, or a test would leak"] == "high"
    assert severity["the rows of one image agree"] == "medium"
    assert made["left_out"]["shared patient id"] == 1
    assert made["left_out"]["no patient id"] == 1
    assert made["left_out"]["conflicting labels"] == 2


PLAN = """
version = 1
[study]
name = "chests"
[task]
kind = "classification"
classes = ["well", "sick"]
modality = ["CR", "DX"]
[preprocessing]
size = [16, 16]
intensity = "unit"
[model]
name = "cnn"
channels = [4, 8]
[training]
rounds = 3
learning_rate = 0.01
local_epochs = 1
batch_size = 2
loss = "cross_entropy"
[privacy]
mechanism = "dp-sgd"
epsilon = 8.0
delta = 1e-3
clipping_norm = 1.0
[metrics]
report = ["auc"]
primary = "auc"
"""


@pytest.mark.integration
def test_freeze_then_preview_then_check(run, site, export, tmp_path):
    frozen = run(site, "freeze", "chest", "--json")
    assert frozen.returncode == 0, frozen.stderr
    made = json.loads(frozen.stdout)
    assert (made["patients"], made["images"], made["files"]) == (6, 12, 12)
    assert made["images_by_class"] == {"well": 6, "sick": 6}
    assert made["bytes"] == sum(path.stat().st_size for path in export.glob("MRN*/*.dcm"))
    assert "indexing for the first time" in frozen.stderr
    shown = run(site, "freeze", "chest")
    assert made["cohort"] in shown.stdout and "looking for changes" in shown.stderr

    page = tmp_path / "page.html"
    drawn = run(site, "preview", "chest", "--out", str(page), "--cohort", "latest", "--json")
    assert json.loads(drawn.stdout) == {"dataset": "chest", "shown": 12, "left_out": {}}
    html = page.read_text("utf-8")
    assert page.stat().st_mode & 0o777 == 0o600
    assert "Do not pass it on" in html and "<script" not in html and "http:" not in html
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == 12
    assert Pillow.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (256, 256)
    assert html.count("<figcaption>sick</figcaption>") == 6

    (tmp_path / "study.toml").write_text(PLAN)
    checked = run(site, "check", "chest", "--plan", str(tmp_path / "study.toml"), "--json")
    assert checked.returncode == 0, checked.stderr
    answer = json.loads(checked.stdout)
    assert answer["can_serve"] and answer["cost"]["seconds"] > 0
    assert answer["privacy"]["epsilon"] <= 8.0
    seen = json.dumps(
        json.loads((tmp_path / "state" / "cohorts" / f"{made['cohort']}.json").read_text())
    )
    for planted in PLANTED:
        assert planted not in seen + html
    for done in (frozen, shown, drawn, checked):
        quiet_about_people(done)


@pytest.mark.integration
def test_a_plan_that_does_not_fit_ends_with_11(run, site, tmp_path):
    (tmp_path / "study.toml").write_text(PLAN.replace('"well", "sick"', '"sick", "well"'))
    done = run(site, "check", "chest", "--plan", str(tmp_path / "study.toml"))
    assert done.returncode == 11
    assert "cannot serve" in done.stdout and "order" in done.stdout
    quiet_about_people(done)


@pytest.mark.integration
def test_a_dataset_whose_classes_are_misspelt_cannot_serve(run, site, export, tmp_path):
    table = export / "labels.csv"
    table.write_text(table.read_text().replace(",sick", ",sik").replace(",well", ",wel"))
    (tmp_path / "study.toml").write_text(PLAN)
    done = run(site, "check", "chest", "--plan", str(tmp_path / "study.toml"), "--json")
    assert done.returncode == 11
    answer = json.loads(done.stdout)
    assert not answer["can_serve"]
    (failed,) = [one for one in answer["findings"] if one["status"] == "fail"]
    assert failed["name"] == "samples" and "report" in failed["fix"]
    quiet_about_people(done)


@pytest.mark.integration
def test_a_page_is_never_written_into_the_dataset(run, site, export):
    before = sorted(export.rglob("*"))
    done = run(site, "preview", "chest", "--out", str(export / "page.html"))
    assert done.returncode == 18
    assert "must not lie inside the dataset" in done.stderr
    assert sorted(export.rglob("*")) == before
    quiet_about_people(done)


def test_the_configuration_may_come_from_the_environment(tmp_path):
    command = [sys.executable, "-m", "fedward_client.cli", "data", "index"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "FEDWARD_SITE": str(tmp_path / "elsewhere.toml")},
    )
    assert done.returncode == 19
    assert "elsewhere.toml" in done.stderr


@pytest.mark.parametrize(("words", "code"), [(("report", "none"), 19), (("report",), 2)])
def test_failures_have_their_code_and_no_traceback(run, site, words, code):
    done = run(site, *words)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    quiet_about_people(done)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ACME Medical", "ACME Medical"),
        ("", "not stated"),
        ("19550712", "other"),
        ("DOE^JANE", "other"),
        ("unit 2021-03", "other"),
        ("x" * 65, "other"),
    ],
)
def test_free_text_is_shown_only_when_it_looks_harmless(text, shown):
    assert safe_word(text) == shown
