"""Volumes of DICOM series: what cannot be made, or a plan refuses, is told before the study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward_client.cohort.check import Room, check_plan
from fedward_client.cohort.freeze import counts, load, make_cohort, save, usable
from fedward_client.cohort.open import open_cohort
from fedward_client.cohort.report import make_report
from fedward_client.secret import site_secret

SITE = """
version = 1
[site]
name = "st-mary"
[datasets.chest]
root = "export"
format = "dicom"
task = "classification"
dimensions = 3
classes = ["well", "sick"]
minimum_patients = 1
"""
AXIAL = [1, 0, 0, 0, 1, 0]


@pytest.fixture
def series(tmp_path: Path, dx: Any) -> Any:
    """Writes slices of a patient at their heights."""
    (tmp_path / "site.toml").write_text(SITE)

    def write(patient: str, heights: list[float], lean: float = 0.0, **tags: Any) -> None:
        for k, height in enumerate(heights):
            values = np.random.default_rng(int(100 * height)).integers(0, 4000, (9, 8))
            dx(
                tmp_path / "export" / patient / f"{k:02d}.dcm",
                tags.get("pixels", {}).get(k, values),
                PatientID=patient,
                PatientName=patient,
                StudyInstanceUID=f"1.2.{patient[1:]}",
                SeriesInstanceUID=f"1.2.{patient[1:]}.1",
                FrameOfReferenceUID=f"1.2.{patient[1:]}.2",
                ImageOrientationPatient=AXIAL,
                ImagePositionPatient=[0, lean * height, height],
            )

    return write


def label(tmp_path: Path, *patients: str) -> None:
    rows = "".join(f"{patient},{'ws'[k % 2]}\n" for k, patient in enumerate(patients))
    rows = rows.replace(",w", ",well").replace(",s", ",sick")
    (tmp_path / "export" / "labels.csv").write_text("PatientID,label\n" + rows)


def test_slices_in_one_place_are_left_out_by_the_index_unless_they_are_the_same(
    tmp_path, series, reading
):
    other = {4: np.full((9, 8), 77)}
    series("P1", [0, 2, 4, 6, 4], pixels=other)
    series("P2", [0, 2, 4, 6, 4])
    series("P3", [5, 5, 5], pixels={0: other[4]})
    label(tmp_path, "P1", "P2", "P3")
    with reading(tmp_path / "site.toml") as work:
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort("chest", work.dataset, found, work.index, work.extract)
    assert [sample.patient for sample in found.samples] == ["\\P2"]
    assert [item.reason for item in found.left_out] == ["duplicate slices"] * 2
    assert found.samples[0].load().pixels.shape == (1, 8, 9, 4)
    assert len(cohort.items) == 1


def test_volumes_of_a_leaning_gantry_are_told_before_the_study(
    tmp_path, series, reading, make_plan
):
    for k in range(1, 5):
        series(f"P{k}", [0, 2, 4, 6], lean=0.5 * (k == 1))
    label(tmp_path, "P1", "P2", "P3", "P4")
    with reading(tmp_path / "site.toml") as work:
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort("chest", work.dataset, found, work.index, work.extract)
        state = work.site.site.state
        told = counts(cohort, work.dataset)
        assert load(save(cohort, state)).sha256 == cohort.sha256
        secret = site_secret(state)
        frozen = open_cohort(work.site, "chest", secret=secret).dataset.samples
    assert (told["images"], told["tilted"]) == (4, 1)

    def check(**preprocessing: Any) -> Any:
        one = make_plan(
            task={"dimensions": 3, "classes": ["well", "sick"]},
            preprocessing={"size": [8, 8, 8], **preprocessing},
            split={"given": False},
        )
        made = check_plan(
            "chest", "", work.dataset, frozen, [""] * 4, one, Room(tmp_path, "cpu"), measure=False
        )
        return made, {f.name: f for f in made.findings}

    made, by_name = check()
    assert by_name["gantry tilt"].found.startswith("1 of 4 volumes")
    assert sum(made.patients.values()) == 3
    made, by_name = check(gantry_tilt="correct")
    assert "gantry tilt" not in by_name and sum(made.patients.values()) == 4


def test_volumes_of_uneven_slices_are_counted_and_kept(tmp_path, series, reading, make_plan):
    series("P1", [0, 2, 4, 6])
    series("P2", [0, 2, 4, 8])
    series("P3", [0, 2, 4, 9.5])
    label(tmp_path, "P1", "P2", "P3")
    with reading(tmp_path / "site.toml") as work:
        found = usable(work.dataset, work.index, work.extract)
        report = make_report("chest", work.dataset, work.index, work.extract)
        cohort = make_cohort("chest", work.dataset, found, work.index, work.extract)
        told = counts(cohort, work.dataset)
        state = work.site.site.state
        assert load(save(cohort, state)).sha256 == cohort.sha256
        frozen = open_cohort(work.site, "chest", secret=site_secret(state)).dataset.samples
    assert report.left_out == {"slices uneven": 1}
    (risk,) = [risk for risk in report.risks if "evenly" in risk.rule]
    assert (risk.count, risk.severity) == (1, "low")
    assert (told["images"], told["uneven"]) == (2, 1)
    assert sorted(one.load().pixels.shape[-1] for one in frozen) == [4, 5]
    one = make_plan(
        task={"dimensions": 3, "classes": ["well", "sick"]},
        preprocessing={"size": [8, 8, 8]},
        split={"given": False},
    )
    made = check_plan(
        "chest", "", work.dataset, frozen, [""] * 2, one, Room(tmp_path, "cpu"), measure=False
    )
    (slices,) = [f for f in made.findings if f.name == "slices"]
    assert slices.found.startswith("1 of 2 volumes") and slices.status == "warn"


@pytest.mark.parametrize("value", [0, 812])
def test_empty_slices_are_no_pixels_that_patients_share(tmp_path, series, reading, value):
    empty = np.full((9, 8), value)
    for k, patient in enumerate(("P1", "P2", "P3")):
        heights = [2.0 * place + k / 50 for place in range(6)]
        series(patient, heights, pixels={0: empty, 5: empty})
    label(tmp_path, "P1", "P2", "P3")

    def shared() -> dict[str, int]:
        with reading(tmp_path / "site.toml") as work:
            report = make_report("chest", work.dataset, work.index, work.extract)
        return {
            risk.rule: risk.count
            for risk in report.risks
            if "share" in risk.rule or "same pixels" in risk.rule
        }

    assert not shared()
    series("P4", [0, 2, 4], pixels={1: empty})  # its other slices are those of P1
    label(tmp_path, "P1", "P2", "P3", "P4")
    assert set(shared().values()) == {1}
