"""``fedward-simulate init``: from a folder that nobody has seen to a study that runs."""

from __future__ import annotations

import os
import pty
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedward.errors import DataError, OutputError
from fedward.plan import load_plan
from fedward_client.config import load_config
from fedward_client.data.survey import survey
from fedward_simulation.options import Options
from fedward_simulation.study import Study

SIMULATE = "fedward_simulation.cli"
PROGRAMS = {"fedward-simulate": SIMULATE, "fedward-client": "fedward_client.cli"}


def picture(path: Path, bright: bool, seed: int, size: int = 24) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 120, (size, size)) + 100 * bright
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def spreadsheet(tmp_path: Path) -> Path:
    """PNGs in one folder, and a table with its owner's own words."""
    rows = ["Filename;Diagnosis;Age;Subject ID"]
    for place in range(48):
        picture(tmp_path / "export" / "png" / f"scan_{place}.png", place % 2 == 1, place)
        word = "Opacity (any)" if place % 2 else "Normal"
        rows.append(f"scan_{place}.png;{word};{30 + place};S{place // 2 + place % 2 * 100}")
    (tmp_path / "export" / "findings 2024.csv").write_text("\n".join(rows), "utf-8")
    return tmp_path / "export"


@pytest.mark.integration
def test_a_spreadsheet_of_ones_own_becomes_a_study_that_runs(
    spreadsheet: Path, tmp_path: Path, commands: Any
) -> None:
    """Each command that init prints works as printed."""
    done = commands(SIMULATE, "init", "--data", "export", "--out", "first", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "48 images of 48 patients" in done.stdout
    assert "classes Normal, Opacity -any" in done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert len(lines) == 3
    plan = tmp_path / "first" / "plan.toml"
    plan.write_text(plan.read_text("utf-8").replace("rounds = 20", "rounds = 2"), "utf-8")
    for line in lines:
        program, *arguments = shlex.split(line)
        ran = commands(PROGRAMS[program], *arguments, cwd=tmp_path)
        assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"
    assert (tmp_path / "first" / "results" / "report.html").is_file()
    assert "Opacity" in ran.stdout or "AUC" in ran.stdout
    dataset = load_config(tmp_path / "first" / "site.toml").datasets["images"]
    assert dataset.labels.key == "Filename" and dataset.labels.column == "Diagnosis"
    assert dataset.labels.words == {"Opacity (any)": "Opacity -any"}


def test_nothing_is_replaced(spreadsheet: Path, tmp_path: Path, commands: Any) -> None:
    (tmp_path / "plan.toml").write_text("mine", "utf-8")
    done = commands(SIMULATE, "init", "--data", "export", cwd=tmp_path)
    assert done.returncode == OutputError.exit_code and "plan.toml" in done.stderr
    assert (tmp_path / "plan.toml").read_text("utf-8") == "mine"
    assert not (tmp_path / "site.toml").exists()


def test_folders_of_hospitals_with_masks(tmp_path: Path, commands: Any) -> None:
    for site in ("north", "south"):
        for place in range(6):
            picture(tmp_path / "scans" / site / "images" / f"{place}.png", True, place)
            mask = np.zeros((24, 24), np.uint8)
            mask[4:9], mask[12:] = 1, 2
            target = tmp_path / "scans" / site / "masks" / f"{place}.png"
            target.parent.mkdir(exist_ok=True)
            Image.fromarray(mask).save(target)
    words = ("init", "--data", "scans", "--classes", "liver,spleen", "--private", "--out", "s")
    done = commands(SIMULATE, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = load_plan(tmp_path / "s" / "plan.toml")
    assert plan.task.classes == ("liver", "spleen") and plan.privacy.on
    assert plan.participation.sites == 2
    assert "name no patients" in done.stdout and "privacy holds per image" in done.stdout
    assert "--images-are-patients" in done.stdout and "--partition" not in done.stdout
    for site in ("north", "south"):
        config = load_config(tmp_path / "s" / f"site-{site}.toml")
        assert config.site.name == site and config.datasets["images"].root.name == site


def test_a_folder_for_each_patient_is_proposed_and_used(tmp_path: Path, commands: Any) -> None:
    """Below a folder for each class; two hospitals, then one, whose site file says it."""
    for place in range(24):
        part = ("north", "south")[place // 12], ("normal", "tumour")[place % 2]
        for name in ("left", "right"):
            picture(tmp_path.joinpath("all", *part, f"P{place}", f"{name}.png"), True, place)
    found = survey(tmp_path / "all" / "north")
    assert found.classes == ("normal", "tumour") and found.patient_folder == 2
    one = commands(SIMULATE, "init", "--data", "all/north", "--out", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    assert "24 images of 12 patients" in one.stdout and "folder 2 of its path" in one.stdout
    assert load_config(tmp_path / "one" / "site.toml").datasets["images"].patients.folder == 2
    (tmp_path / "all" / "north" / "patients.csv").write_text("image,patient\nx,y", "utf-8")
    assert survey(tmp_path / "all" / "north").patient_folder == 0
    options = Options(
        data=tmp_path / "all", out=tmp_path / "out", partition="folders", patient_folder=2
    )
    plan = load_plan(tmp_path / "one" / "plan.toml")
    small = plan.participation.model_copy(update={"sites": 2, "quorum": 1})
    plan = plan.model_copy(update={"participation": small})
    sites = Study(plan, options, note=lambda text: None).prepare()
    assert [len(np.unique(site.patients)) for site in sites] == [12, 12]
    assert not any(site.images_are_patients for site in sites)


def test_class_folders_with_parts_and_a_negative_class_first(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("Tumour", "normal"):
            picture(tmp_path / part / name / "a.png", True, 1)
    found = survey(tmp_path)
    assert found.classes == ("normal", "Tumour") and not found.hospitals


def test_findings_with_bars_between_are_multi_label(tmp_path: Path) -> None:
    findings = ["No Finding", "Effusion|Mass", "Mass", "Effusion"] * 5
    rows = ["Image Index,Finding Labels,Patient ID"]
    for place, text in enumerate(findings):
        picture(tmp_path / "images" / f"{place}.png", True, place)
        rows.append(f"{place}.png,{text},{place}")
    (tmp_path / "Data_Entry.csv").write_text("\n".join(rows), "utf-8")
    found = survey(tmp_path)
    assert found.multi_label and found.classes == ("Effusion", "Mass")
    assert found.labels.none == ("No Finding",) and found.labels.key == "Image Index"


def test_a_column_of_zeros_and_ones_for_each_class(tmp_path: Path) -> None:
    rows = ["image,Mass,Nodule"] + [f"{k}.png,{k % 2},{k % 3 % 2}" for k in range(8)]
    for place in range(8):
        picture(tmp_path / f"{place}.png", True, place)
    (tmp_path / "labels.csv").write_text("\n".join(rows), "utf-8")
    found = survey(tmp_path)
    assert found.classes == ("Mass", "Nodule") and found.multi_label


def test_what_the_data_do_not_tell_is_asked_for(tmp_path: Path, commands: Any) -> None:
    """Without a terminal a flag is named, and the columns that there are."""
    rows = ["image,alpha,beta"] + [f"{k}.png,word {k % 3},term {k % 4}" for k in range(20)]
    for place in range(20):
        picture(tmp_path / "png" / f"{place}.png", True, place)
    (tmp_path / "png" / "labels.csv").write_text("\n".join(rows), "utf-8")
    done = commands(SIMULATE, "init", "--data", "png", cwd=tmp_path)
    assert done.returncode == DataError.exit_code
    assert "image, alpha, beta" in done.stderr and "--label-column" in done.stderr
    done = commands(SIMULATE, "init", "--data", "png", "--label-column", "beta", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_plan(tmp_path / "plan.toml").task.classes == (
        "term 0",
        "term 1",
        "term 2",
        "term 3",
    )


@pytest.mark.integration
def test_on_a_terminal_it_asks(spreadsheet: Path, tmp_path: Path) -> None:
    """Folder, task and classes; an empty answer takes what was found."""
    outside, inside = pty.openpty()
    command = [sys.executable, "-m", SIMULATE, "init", "--out", "asked"]
    with subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, cwd=tmp_path
    ) as process:
        os.close(inside)
        told = ""
        for question, answer in (
            ("Folder", "export"),
            ("Task", ""),
            ("Classes", "Normal, Opacity -any"),
        ):
            told = _until(outside, told, question)
            os.write(outside, f"{answer}\n".encode())
            told = ""
        assert process.wait(120) == 0
        os.close(outside)
    assert load_plan(tmp_path / "asked" / "plan.toml").task.classes == ("Normal", "Opacity -any")


def _until(terminal: int, told: str, word: str) -> str:
    end = time.monotonic() + 120
    while word not in told:
        assert time.monotonic() < end, told
        if select.select([terminal], [], [], 1.0)[0]:
            told += os.read(terminal, 4096).decode()
    return told


@pytest.mark.integration
def test_data_may_be_a_dataset_of_a_site(spreadsheet: Path, tmp_path: Path, commands: Any) -> None:
    """Its words, columns and format count; a dataset that is not there is named."""
    done = commands(SIMULATE, "init", "--data", "export", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = commands(SIMULATE, "run", "plan.toml", "--data", "site.toml:nothing", cwd=tmp_path)
    assert done.returncode == 19 and "must be one of images" in done.stderr
    done = commands(
        SIMULATE, "run", "plan.toml", "--data", "export", "--partition", "iid", cwd=tmp_path
    )
    assert done.returncode == DataError.exit_code


def test_folders_of_images_and_masks_are_no_classes(tmp_path: Path) -> None:
    for place in range(3):
        for folder in ("images", "1st_manual", "mask"):
            picture(tmp_path / "drive" / folder / f"{place}.png", True, place)
        for ending in ("", "_mask"):
            picture(tmp_path / "one" / f"P{place}" / f"{place}{ending}.png", True, place)
    assert survey(tmp_path / "drive").classes == ()
    assert (survey(tmp_path / "one").kind, survey(tmp_path / "one").classes) == (
        "segmentation",
        ("foreground",),
    )
