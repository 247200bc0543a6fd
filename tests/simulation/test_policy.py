"""A simulation under a hospital's policy: refused, withheld, coarse or exact, as hospitals do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedward.errors import FedwardError
from fedward_client.policy.settings import Limits
from fedward_simulation.cli import app
from fedward_simulation.site_service import exact, limits_of, open_policy

pytestmark = pytest.mark.integration
Run = Callable[..., Any]
SITE = """
version = 1
[site]
name = "north"
state = "state"
[policy]
coordinators = ["{key}"]
minimum_patients = 2
require_privacy = false
quiet_hours = ["Mon-Sun 00:00-23:59"]
{limits}
[[policy.studies]]
match = "tiny*"
dataset = "chest"
[datasets.chest]
root = "data"
format = "dicom"
task = "classification"
classes = ["no", "yes"]
"""


@pytest.fixture
def site(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a hospital's configuration with lines of its policy."""

    def write(limits: str) -> Path:
        path = tmp_path / "site.toml"
        path.write_text(SITE.format(key="a" * 64, limits=limits))
        return path

    return write


@pytest.fixture
def run(tmp_path: Path, plan_file: Path, npz_data: Path) -> Run:
    """Runs the small study at two hospitals; gives output and ``metrics.json``."""

    def start(*more: object, code: int = 0) -> tuple[str, dict[str, Any], str]:
        out = tmp_path / "out"
        words = ["run", plan_file, "--data", npz_data, "--partition", "iid", "--sites", 2]
        done = CliRunner().invoke(app, [*map(str, (*words, "--out", out, *more))])
        if code:
            assert isinstance(done.exception, FedwardError), done.output
            assert done.exception.exit_code == code
            return str(done.exception), {}, ""
        assert done.exit_code == 0, done.output
        page = (out / "report.html").read_text()
        return done.output, json.loads((out / "metrics.json").read_text()), page

    return start


def test_a_policy_that_refuses_ends_the_run_and_names_its_rule(
    run: Run, site: Callable[[str], Path]
) -> None:
    for limits, rule in (
        ("require_privacy = true", "private"),
        ("minimum_patients = 5000", "patients"),
        ("minimum_sites = 3", "sites"),
        ('models = ["unet"]', "cnn"),
    ):
        # A later line of TOML must not repeat a key of the form.
        path = site(limits)
        key = limits.split(" ")[0]
        lines = path.read_text().splitlines()
        path.write_text("\n".join(x for x in lines if x == limits or not x.startswith(key)))
        output, *_ = run("--policy", path, code=17)
        assert "refused" in output and rule in output, output


def test_what_a_policy_withholds_is_missing_and_said_to_be(
    run: Run, site: Callable[[str], Path]
) -> None:
    path = site('counts = "minimum-cells"\ncount_noise = 0.0\nmetrics = ["auc"]')
    output, metrics, page = run("--policy", path)
    assert "no hospital with this policy sends are missing (accuracy)" in output
    test = metrics["arms"][0]["test"]
    assert test["pooled"]["auc"] is not None
    assert test["pooled"]["accuracy"] is None
    assert test["contributors"] == {"auc": ["site-1", "site-2"], "accuracy": []}
    assert "Withheld by its policy" in page
    assert all(one["loss"] is None for one in metrics["arms"][0]["rounds"][0]["sites"].values())


def test_the_default_policy_counts_with_noise(run: Run, site: Callable[[str], Path]) -> None:
    _, metrics, page = run("--policy", site(""))
    assert metrics["arms"][0]["test"]["standard_errors"]["accuracy"] > 0
    assert "standard error of the noise" in page


def test_figures_are_coarse_unless_they_are_asked_for_exactly(run: Run, tmp_path: Path) -> None:
    _, coarse, page = run("--baselines")
    _, known, exact_page = run("--exact")
    one, other = coarse["arms"][0]["test"], known["arms"][0]["test"]
    # Accuracy comes from whole numbers of 20 images, which are let go as they are.
    assert one["pooled"]["accuracy"] == other["pooled"]["accuracy"]
    steps = [len(each["answers"]["curves"]["yes"]) for each in (one, other)]
    assert steps[0] < steps[1]
    for bin_ in one["answers"]["calibration"]:
        assert bin_[2] >= 5
    # What a hospital's own model is measured by goes through the same hands.
    alone = next(arm for arm in coarse["arms"] if arm["kind"] == "alone")
    assert all(bin_[2] >= 5 for bin_ in alone["test"]["answers"]["calibration"])
    assert coarse["figures"] == "minimum-cells" and known["figures"] == "exact"
    assert "as they were counted" in exact_page and "as they were counted" not in page
    # The model is the same: a policy changes what is told of it.
    assert coarse["model_sha256"] == known["model_sha256"]


def test_options_that_contradict_each_other_are_refused(
    run: Run, site: Callable[[str], Path]
) -> None:
    for other in (("--exact",), ("--policy", site(""))):
        output, *_ = run("--private-counts", *other, code=19)
        assert "one option says how counts leave" in output
    path = site("")
    rule = '[[policy.studies]]\nmatch = "tiny*"\ndataset = "chest"\n'
    path.write_text(path.read_text().replace(rule, ""))
    output, *_ = run("--policy", path, code=19)
    assert "which studies it serves" in output


def test_an_exact_policy_changes_no_count(make_plan: Callable[..., Any]) -> None:
    plan = make_plan()
    limits = limits_of(exact(open_policy()), plan)
    strict = exact(open_policy().model_copy(update={"minimum_count": 50, "metrics": ()}))
    assert limits_of(strict, plan) == limits
    rng = np.random.default_rng(0)
    values = rng.dirichlet((1.0, 1.0), 9)
    counts = plan.task.spec.count(values, rng.integers(0, 2, 9))
    made, withheld = counts.release(limits.metrics, limits.minimum_count, limits.rounding)
    assert withheld == ()
    for name, array in counts.to_arrays().items():
        np.testing.assert_allclose(made[name], array, rtol=0, atol=1e-9)
    assert Limits().minimum_count == open_policy().minimum_count
