"""The plans under ``studies/``: each can start, and the start that one brings is worth having."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedward.console import Console
from fedward.errors import PlanError
from fedward.models import shared_names, to_arrays
from fedward.plan import load_plan
from fedward.plan.load import parse_plan, plan_from
from fedward.tasks.registry import DRAFTED
from fedward_simulation.audit.progress import AuditProgress
from fedward_simulation.audit.study import GATE, audit_study
from fedward_simulation.cohort import write_cohort
from fedward_simulation.demo import KINDS, plan_text
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


def test_the_demonstration_has_a_plan_for_each_kind_of_its_patients() -> None:
    assert KINDS == DRAFTED == ("classification", "segmentation")
    assert all(parse_plan(plan_text(kind)).task.kind == kind for kind in KINDS)


def test_an_audit_of_patches_is_refused(tmp_path: Path) -> None:
    content = load_plan(STUDIES / "lungs.toml").model_dump(mode="python")
    content["preprocessing"]["patch"] = {}
    options = Options(data=tmp_path, out=tmp_path)
    study = Study(plan_from(content), options, note=lambda text: None)
    with pytest.raises(PlanError, match="not patches"), AuditProgress(Console()) as progress:
        audit_study(study, GATE, progress, fresh=False)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*-wan.toml")), ids=lambda path: path.stem)
def test_a_plan_for_a_wan_takes_few_exchanges_and_bytes(path: Path) -> None:
    """At most 60 orders to each hospital, and 200 MB both ways; frozen arrays go once."""
    plan = load_plan(path)
    model, _ = start_model(plan, 0, STUDIES)
    sizes = {name: value.nbytes for name, value in to_arrays(model).items()}
    evaluations = plan.rounds // plan.metrics.evaluate_every + len(plan.tests)
    trainings = plan.rounds + (plan.own_round is not None)
    assert 1 + trainings + evaluations <= 60
    each = sum(sizes[name] for name in shared_names(model, plan, plan.rounds))
    assert sum(sizes.values()) + (2 * trainings + evaluations) * each <= 200e6


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
