"""A study without each of its hospitals in turn, tested at the one that took no part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedward.errors import DataError, PlanError
from fedward.plan import load_plan
from fedward_server.report.page import render
from fedward_server.report.summary import headline
from fedward_server.results import StudyResults
from fedward_simulation.options import Options
from fedward_simulation.study import Study

Make = Callable[..., Any]


@pytest.fixture
def three(folder_data: Path) -> Path:
    """Three hospitals of pictures; the third one's are brighter."""
    rng = np.random.default_rng(8)
    for label, name in enumerate(("no", "yes")):
        folder = folder_data / "west" / name
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(60, 160, (16, 16)) + 80 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.png")
    return folder_data


def run(plan_file: Path, data: Path, out: Path, **more: Any) -> StudyResults:
    options = Options(
        data=data, out=out, device="cpu", images_are_patients=True, exact=True, **more
    )
    study = Study(load_plan(plan_file), options, note=lambda text: None)
    results = study.run()
    study.checkpoints.clear()
    return results


def test_the_others_model_is_tested_where_nobody_took_part(
    plan_file: Path, three: Path, tmp_path: Path
) -> None:
    whole = run(plan_file, three, tmp_path / "whole", leave_one_out=True, baselines=True)
    arms = {arm.name: arm for arm in whole.arms}
    assert {"without north", "without south", "without west"} <= set(arms)
    arm = arms["without west"]
    assert (arm.kind, arm.site) == ("left-out", "west") and arm.test is not None
    assert {site for round_ in arm.rounds for site in round_.sites} == {"north", "south"}
    assert set(arm.test.per_site) == {"north", "south", "west"}
    # The same as a study of the two others, whose model then meets the third one's patients.
    shutil.rmtree(three / "west")
    other = run(plan_file, three, tmp_path / "two")
    assert other.arms[0].test is not None
    for site in ("north", "south"):
        assert other.arms[0].test.per_site[site] == arm.test.per_site[site]
    text = headline(whole)
    assert "At a hospital that takes no part" in text and "west" in text
    assert "without west" in render([whole])


def test_a_hospital_that_only_evaluates_is_told_as_one_that_took_no_part(
    plan_file: Path, three: Path, tmp_path: Path
) -> None:
    told = run(plan_file, three, tmp_path / "three", evaluate_only=("west",), baselines=True)
    shutil.rmtree(three / "west")
    other = run(plan_file, three, tmp_path / "two", baselines=True)
    # Of the two others everything is as if there were no third, pooled data included.
    assert [arm.name for arm in told.arms] == [arm.name for arm in other.arms]
    assert [arm.test for arm in told.arms] == [arm.test for arm in other.arms]
    unseen = told.arms[0].unseen
    assert unseen is not None and set(unseen.per_site) == {"west"}
    low, high = unseen.site_intervals["west"]["auc"]
    value = unseen.per_site["west"]["auc"]
    assert value is not None and low < value <= high
    text = headline(told)
    assert f"{value:.3f} (95 % interval {low:.3f}–{high:.3f}) at west." in text
    assert "west (evaluates only)" in render([told])
    assert text.replace(text[text.index(" Where no hospital") :], "") == headline(other)


def test_a_hospital_that_only_evaluates_must_be_there(
    plan_file: Path, three: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"east.*Name one of north, south, west"):
        run(plan_file, three, tmp_path / "out", evaluate_only=("east",))


def test_a_study_of_one_hospital_has_none_to_leave_out(
    plan_file: Path, three: Path, tmp_path: Path
) -> None:
    plan_file.write_text(plan_file.read_text("utf-8").replace("sites = 2", "sites = 1"), "utf-8")
    for name in ("south", "west"):
        shutil.rmtree(three / name)
    with pytest.raises(PlanError, match="needs two"):
        run(plan_file, three, tmp_path / "out", leave_one_out=True)
