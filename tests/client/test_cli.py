"""``fedward-client data`` as a hospital's engineer types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from client.cohort.report import safe_word

PLANTED = ("DOE^JANE", "MRN4711", "1.2.826.0.99.4711", "19550712", "ward-7-doe", "ACC99123")


def run(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "client.cli", "data", *words, "--config", str(site)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def quiet_about_people(done: subprocess.CompletedProcess[str]) -> None:
    for planted in PLANTED:
        assert planted not in done.stdout + done.stderr


@pytest.mark.integration
def test_index_then_report(site, export):
    first = run(site, "index", "--json")
    assert first.returncode == 0
    found = json.loads(first.stdout)["datasets"]["chest"]
    assert (found["new"], found["reasons"]["not DICOM"]) == (20, 2)
    second = run(site, "report", "chest", "--json")
    assert second.returncode == 0, second.stderr
    made = json.loads(second.stdout)
    assert {key: made[key] for key in ("files", "instances", "patients", "studies", "series")} == {
        "files": 20, "instances": 12, "patients": 6, "studies": 6, "series": 6,
    }  # fmt: skip
    assert made["images_by_class"] == {"well": 6, "sick": 6}
    assert made["patients_by_class"] == {"well": 3, "sick": 3}
    assert sum(made["split"].values()) == 6
    assert made["size"] == {"12 x 10": 12}
    assert made["left_out"] == {
        "no pixel data": 1, "not DICOM": 2, "not a file": 2, "not readable": 1, "too large": 1,
    }  # fmt: skip
    assert made["risks"] == []
    shown = run(site, "report", "chest")
    assert "12 x 10" in shown.stdout
    for done in (first, second, shown):
        quiet_about_people(done)


@pytest.mark.integration
def test_risks_are_counted(site, export, dx):
    import numpy as np
    import pydicom

    same = pydicom.dcmread(export / "MRN47110" / "DOE^JANE-0.dcm").pixel_array
    dx(export / "r1.dcm", same, PatientID="MRN47113", BurnedInAnnotation="YES")
    dx(export / "r2.dcm", np.ones((9, 9)), PatientID="ANON")
    dx(export / "r3.dcm", np.ones((8, 9)), PatientID="")
    with (export / "labels.csv").open("a") as table:
        table.write("MRN47111,well\n")
    made = json.loads(run(site, "report", "chest", "--json").stdout)
    risks = {risk["rule"]: risk["count"] for risk in made["risks"]}
    assert risks == {
        "no two files show the same pixels": 1,
        "no two patients share an image, or a test would leak": 1,
        "a patient id stands for one patient": 1,
        "every image names its patient": 1,
        "no text is burnt into the pixels": 1,
        "every image has a label": 1,
        "the rows of one image agree": 2,
    }
    assert made["left_out"]["conflicting labels"] == 2


@pytest.mark.parametrize(("words", "code"), [(("report", "none"), 19), (("report",), 2)])
def test_failures_have_their_code_and_no_traceback(site, words, code):
    done = run(site, *words)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    quiet_about_people(done)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("ACME Medical", "ACME Medical"), ("", "not stated"), ("19550712", "other"),
     ("DOE^JANE", "other"), ("unit 2021-03", "other"), ("x" * 65, "other")],
)  # fmt: skip
def test_free_text_is_shown_only_when_it_looks_harmless(text, shown):
    assert safe_word(text) == shown
