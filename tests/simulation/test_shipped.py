"""The plans under ``studies/``: each can start, and the start that one brings is worth having."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedward.plan import load_plan
from fedward.plan.load import plan_from
from fedward_simulation.cohort import write_cohort
from fedward_simulation.feasible import check_privacy, start_model
from fedward_simulation.study import Options, Study

STUDIES = Path(__file__).resolve().parents[2] / "studies"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_plan_can_start(path: Path) -> None:
    plan = load_plan(path)
    assert plan.study.name == path.stem
    check_privacy(plan)
    _, report = start_model(plan, 0, STUDIES)
    if path.stem == "lungs-private":
        assert report.matched and not (report.missing + report.reshaped_head + report.unused)


def test_the_shipped_start_outlines_lungs_of_patients_it_never_saw(tmp_path: Path) -> None:
    write_cohort(tmp_path / "data", 77, "segmentation", 12, 1)
    raw = tomllib.loads((STUDIES / "lungs-synthetic.toml").read_text("utf-8"))
    start = tomllib.loads((STUDIES / "lungs-private.toml").read_text("utf-8"))["model"]
    found = {}
    for name, model in (("fresh", raw["model"]), ("shipped", start)):
        plan = plan_from(
            {
                **raw,
                "model": model,
                "split": {"validation": 0, "test": 0.8},
                "training": {**raw["training"], "rounds": 1, "learning_rate": 1e-9},
                "participation": {"sites": 1},
            }
        )
        options = Options(data=tmp_path / "data", out=tmp_path / name, plan_folder=STUDIES)
        arm = Study(plan, options, note=lambda text: None).run().arms[0]
        assert arm.test is not None
        found[name] = arm.test.pooled["dice"]
    assert found["shipped"] > 0.9 and found["fresh"] < 0.6
