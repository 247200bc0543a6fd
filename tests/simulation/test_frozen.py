"""``fedward-simulate run --site``: frozen cohorts of several hospitals on one machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedward.errors import ConfigError, DataError, FedwardError, PlanError
from fedward.plan import load_plan
from fedward_client.cohort.training import preparers
from fedward_server.results import StudyResults
from fedward_simulation.cli import app
from fedward_simulation.cohort import write_cohort
from fedward_simulation.options import Hospital, Options
from fedward_simulation.prepare import frozen_sites

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0"}
SITE = """
version = 1
[site]
name = "{name}"
state = "state"
[datasets.chest]
root = "../data/{root}"
format = "dicom"
task = "classification"
classes = ["clear", "opacity"]
"""
OTHER = """
[datasets.other]
root = "../data/{root}"
format = "dicom"
task = "classification"
classes = ["opacity", "clear"]
"""
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, commands: Any) -> Path:
    """Two hospitals with frozen cohorts."""
    tmp_path = tmp_path_factory.mktemp("hospitals")
    write_cohort(tmp_path / "data", 0, "classification", 20, 2)
    for k in (1, 2):
        folder = tmp_path / f"h{k}"
        folder.mkdir()
        text = SITE.format(name=f"north {k}", root=f"hospital-{k}")
        (folder / "site.toml").write_text(text, "utf-8")
        words = ("data", "freeze", "chest", "--config", folder / "site.toml")
        frozen = commands("fedward_client.cli", *words, cwd=tmp_path)
        assert frozen.returncode == 0, frozen.stderr
    return tmp_path


@pytest.fixture
def hospitals(once: Path, tmp_path: Path, plan_file: Path) -> Path:
    """A copy of them, and a plan for both."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    text = plan_file.read_text("utf-8").replace('["no", "yes"]', '["clear", "opacity"]')
    plan_file.write_text(text, "utf-8")
    return tmp_path


def both(*more: object) -> tuple[object, ...]:
    return ("run", "plan.toml", "--site", "h1/site.toml", "--site", "h2/site.toml:chest", *more)


def test_a_study_trains_on_frozen_cohorts_and_finds_a_changed_byte(
    hospitals: Path, commands: Any
) -> None:
    done = commands("fedward_simulation.cli", *both("--json", "--baselines"), cwd=hospitals)
    assert done.returncode == 0, done.stderr
    results = StudyResults.model_validate_json(json.dumps(json.loads(done.stdout)["studies"][0]))
    assert results.complete and results.synthetic and results.partition == "frozen cohorts"
    assert [site.site for site in results.sites] == ["north 1", "north 2"]
    assert all(site.images >= 20 for site in results.sites)
    assert {arm.kind for arm in results.arms} >= {"federated"}
    for k in (1, 2):
        assert len(list((hospitals / f"h{k}" / "state" / "cache").iterdir())) == 1
    victim = sorted((hospitals / "data" / "hospital-2").rglob("*.dcm"))[3]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))
    refused = commands("fedward_simulation.cli", *both("--out", "again"), cwd=hospitals)
    assert refused.returncode == 11
    assert "north 2" in refused.stderr and "1 changed, 0 gone" in refused.stderr
    assert victim.name not in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("sites", "kind", "words"),
    [
        (["h1/site.toml"], PlanError, "1 of 2"),
        (["h1/site.toml", "h1/site.toml"], ConfigError, "different names"),
        (["h1/site.toml", "h2/site.toml"], ConfigError, "chest, other"),
        (["h1/site.toml", "h2/site.toml:none"], ConfigError, "chest, other"),
        (["h1/site.toml", "h2/site.toml:other"], DataError, "north 2, other.*must be frozen"),
        (["h1/site.toml", "missing.toml"], ConfigError, "readable"),
    ],
)
def test_what_cannot_be_is_said(
    hospitals: Path, sites: list[str], kind: type[FedwardError], words: str
) -> None:
    site = hospitals / "h2" / "site.toml"
    site.write_text(site.read_text("utf-8") + OTHER.format(root="hospital-2"), "utf-8")
    found = tuple(Hospital.parse(str(hospitals / text)) for text in sites)
    options = Options(data=None, out=hospitals / "out", hospitals=found)
    plan = load_plan(hospitals / "plan.toml")
    with preparers() as crew, pytest.raises(kind, match=words):
        frozen_sites(plan, options, crew, lambda text: None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give either --data"),
        (["--data", "x", "--site", "y"], "give either --data"),
        (["--site", "x", "--partition", "iid"], "--partition is about --data"),
        (["--site", "x", "--cache-gib", "3"], "--cache-gib is about --data"),
        (["--site", "x", "--sites", "2"], "--sites is about --data"),
    ],
)
def test_data_and_sites_exclude_each_other(plan_file: Path, words: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["run", str(plan_file), *words], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and told in done.output


def test_a_path_may_hold_a_colon(tmp_path: Path) -> None:
    odd = tmp_path / "a:b.toml"
    odd.touch()
    assert Hospital.parse(str(odd)) == Hospital(odd)
    assert Hospital.parse(f"{odd}:chest") == Hospital(odd, "chest")
