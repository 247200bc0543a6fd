"""Data that cannot be divided as it lies: which folder, which option, what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.errors import DataError
from fedward.plan import load_plan
from fedward_simulation.divided import read
from fedward_simulation.options import Options
from fedward_simulation.partition import parse_partition

PROGRAM = "fedward_simulation.cli"
pytestmark = pytest.mark.integration


def last_line(commands: Any, plan: Path, *words: object, code: int = 11) -> str:
    done = commands(PROGRAM, "run", plan, *words, cwd=plan.parent)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and str(plan.parent) not in done.stderr
    return str(done.stderr.splitlines()[-1])


def test_errors_speak_of_options_and_not_of_a_configuration(
    folder_data: Path, npz_data: Path, plan_file: Path, commands: Any
) -> None:
    told = last_line(commands, plan_file, "--data", "nothere")
    assert "--data: " in told and "nothere" in told and "root" not in told
    told = last_line(commands, plan_file, "--data", npz_data)
    assert "--partition iid" in told and "sites =" not in told
    told = last_line(commands, plan_file, "--data", folder_data, "--partition", "iid")
    assert "--partition folders" in told
    (folder_data / "north" / "labels.csv").write_text("PatientID,label\n1,no\n", "utf-8")
    told = last_line(commands, plan_file, "--data", folder_data, "--format", "nifti")
    assert "sub-folder north" in told and "--format" in told and "site.toml" not in told


def test_an_unrelated_sub_folder_is_named_and_a_hidden_one_passed_over(
    folder_data: Path, plan_file: Path, commands: Any
) -> None:
    (folder_data / ".git").mkdir()
    (folder_data / "notes").mkdir()
    (folder_data / "notes" / "todo.txt").write_text("buy milk", "utf-8")
    told = last_line(commands, plan_file, "--data", folder_data)
    assert "sub-folder notes: " in told and "move it out of the data" in told
    shutil.rmtree(folder_data / "notes")
    done = commands(PROGRAM, "run", plan_file, "--data", folder_data, cwd=plan_file.parent)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("partition", ["folders", "column:scanner"])
def test_a_number_of_sites_is_not_ignored(
    partition: str, folder_data: Path, plan_file: Path, commands: Any
) -> None:
    words = ("--data", folder_data, "--partition", partition, "--sites", "2")
    assert "--sites 2" in last_line(commands, plan_file, *words)


def test_a_hospital_with_one_patient_is_named(
    folder_data: Path, plan_file: Path, commands: Any
) -> None:
    for picture in sorted((folder_data / "south").rglob("*.png"))[1:]:
        picture.unlink()
    told = last_line(commands, plan_file, "--data", folder_data)
    assert told.startswith("error: south: ")


def test_results_do_not_go_among_the_data(
    folder_data: Path, plan_file: Path, commands: Any
) -> None:
    before = sorted(folder_data.rglob("*"))
    (plan_file.parent / "link").symlink_to(folder_data)
    for out in (folder_data, folder_data / "north" / "out", "link/out"):
        told = last_line(commands, plan_file, "--data", folder_data, "--out", out, code=18)
        assert told.startswith("error: --out: ")
    assert sorted(folder_data.rglob("*")) == before


def test_a_class_without_an_image_is_an_error(
    folder_data: Path, plan_file: Path, commands: Any
) -> None:
    text = plan_file.read_text("utf-8").replace('"yes"]', '"yes", "never"]')
    plan_file.write_text(text, "utf-8")
    told = last_line(commands, plan_file, "--data", folder_data)
    assert "task.classes" in told and "none of never" in told


def test_a_site_that_lacks_a_class_is_told_of(
    folder_data: Path, plan_file: Path, commands: Any
) -> None:
    shutil.rmtree(folder_data / "south" / "yes")
    done = commands(PROGRAM, "run", plan_file, "--data", folder_data, cwd=plan_file.parent)
    assert done.returncode == 0, done.stderr
    assert "south has no image of: yes" in done.stdout
    report = plan_file.parent / "runs" / "latest" / "report.html"
    assert "south has no image of yes." in report.read_text("utf-8")


def test_the_internal_column_is_not_offered(npz_data: Path, plan_file: Path, commands: Any) -> None:
    with np.load(npz_data) as arrays:
        np.savez(npz_data, **dict(arrays), synthetic=np.array(True))
    words = ("--data", npz_data, "--partition", "column:nope")
    assert "synthetic" not in last_line(commands, plan_file, *words)


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 2**64])
def test_a_seed_has_a_bound(seed: int, npz_data: Path, plan_file: Path, commands: Any) -> None:
    words = ("--data", npz_data, "--partition", "iid", "--seed", seed, "--device", "cpu")
    done = commands(PROGRAM, "run", plan_file, *words, cwd=plan_file.parent)
    assert done.returncode == (0 if seed < 2**63 else 2), done.stderr
    assert "Traceback" not in done.stderr


def test_a_table_above_the_sub_folders_and_a_folder_of_images_are_no_hospitals(
    folder_data: Path, plan_file: Path, tmp_path: Path
) -> None:
    """What the command says: `folders` is what it takes by default."""
    task, how = load_plan(plan_file).task, parse_partition("folders")
    (folder_data / "findings.csv").write_text("image,finding\n", "utf-8")
    for found in [*folder_data.glob("*/*")]:
        found.rename(found.with_name(f"of {found.name}"))
    with pytest.raises(DataError, match=r"findings.csv is for all sub-folders, choose --part"):
        read(Options(folder_data, tmp_path), how, task)
    (folder_data / "images").mkdir()
    with pytest.raises(DataError, match="parts of one dataset"):
        read(Options(folder_data, tmp_path), how, task)
