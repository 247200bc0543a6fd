"""A private simulation on data that name no patients is refused, or is told as one per image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from typer.testing import CliRunner

from fedward.errors import DataError
from fedward.plan import load_plan
from fedward.rule_codes import RuleCode
from fedward_server.report import read_metrics
from fedward_simulation.cli import app
from fedward_simulation.options import Options
from fedward_simulation.study import Study

DP_SGD = 'mechanism = "dp-sgd"\nepsilon = 8\ndelta = 1e-3\nclipping_norm = 1.0'


@pytest.fixture
def words(plan_file: Path, tmp_path: Path) -> list[str]:
    """A private run of one round over pictures, whose table calls the patient `lesion`."""
    text = plan_file.read_text("utf-8").replace('mechanism = "none"', DP_SGD)
    plan_file.write_text(text.replace("rounds = 2", "rounds = 1"), "utf-8")
    data, rng, rows = tmp_path / "data", np.random.default_rng(2), ["image,label,lesion"]
    data.mkdir()
    for k in range(48):
        values = rng.integers(0, 255, (16, 16)).astype(np.uint8)
        Pillow.fromarray(values).save(data / f"{k}.png")
        rows.append(f"{k}.png,{k // 2 % 2},l{k // 2}")
    (data / "labels.csv").write_text("\n".join(rows) + "\n")
    return [
        "run",
        str(plan_file),
        "--data",
        str(data),
        "--partition",
        "iid",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]


def test_it_is_refused_with_the_options_that_help(words):
    failed = CliRunner().invoke(app, words)
    assert isinstance(failed.exception, DataError)
    assert failed.exception.code is RuleCode.PATIENT_KEY and "48 of 48" in str(failed.exception)
    assert "--patient-column" in failed.exception.fix
    assert "--images-are-patients" in failed.exception.fix
    failed = CliRunner().invoke(app, [*words, "--patient-column", "lession"])
    assert isinstance(failed.exception, DataError)
    assert failed.exception.where == "--patient-column" and "lession" in str(failed.exception)
    assert "site.toml" not in str(failed.exception)
    assert CliRunner().invoke(app, ["audit", *words[1:]]).exception.code is RuleCode.PATIENT_KEY


def test_it_runs_per_image_where_that_is_allowed(words, tmp_path):
    done = CliRunner().invoke(app, [*words, "--images-are-patients"])
    assert done.exit_code == 0, done.output
    (results,) = read_metrics(tmp_path / "out" / "metrics.json")
    assert sum(site.patients for site in results.sites) == 48
    assert {site.images_are_patients for site in results.sites} == {True}
    report = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "HIGH RISK" in report and "each single patient" not in report


def test_the_column_that_is_named_makes_it_one_per_patient(words, tmp_path):
    options = Options(
        data=tmp_path / "data", out=tmp_path / "out", partition="iid", patient_column="Lesion"
    )
    sites = Study(load_plan(tmp_path / "plan.toml"), options, note=lambda text: None).prepare()
    assert sum(len(np.unique(site.patients)) for site in sites) == 24
    assert not any(site.images_are_patients for site in sites)
