"""The commands of the page of the command line, as they stand there, on small data."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journey import PROGRAMS, ROOT, WHOLE, hasten

from fedward_simulation.cohort import write_cohort

PAGE = (ROOT / "docs" / "simulate.md").read_text("utf-8").replace("\\\n", " ")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
# The head of each section is no command, but its form.
FORM = re.compile(r"\[options\]|\[--")
# What takes a quarter of a minute; `make test` runs the like of it from other pages.
LONG = re.compile(r"pneumonia-transfer|--baselines| audit ")
LINES = [
    line
    for kind, block in BLOCKS
    for line in block.splitlines()
    if kind in ("", "sh") and not FORM.search(line)
]
SITE = """
[policy]
coordinators = ["{}"]
require_privacy = false
[[policy.studies]]
match = "*"
dataset = "chest"
"""


@pytest.fixture
def folder(tmp_path: Path, plan_file: Path, npz_data: Path) -> Path:
    """What the page's reader has: `plan.toml` and `data.npz` are there already."""
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    cohort = tmp_path / "demo" / "cohort-classification"
    write_cohort(cohort, 0, "classification", 20, 4)
    (tmp_path / "images").symlink_to(cohort)
    other = shutil.copytree(cohort / "hospital-4", tmp_path / "other-hospital")
    header, *rows = (other / "labels.csv").read_text("utf-8").splitlines()
    scanned = [f"{row},{'AB'[place % 2]}" for place, row in enumerate(rows)]
    (other / "labels.csv").write_text("\n".join([f"{header},scanner", *scanned]), "utf-8")
    shutil.copy(tmp_path / "studies" / "demo" / "frozen.toml", tmp_path / "study.toml")
    shipped = (tmp_path / "studies" / "demo" / "site.toml").read_text("utf-8")
    for number, name in enumerate(("north", "south"), start=1):
        text = shipped.replace("hospital-1", f"hospital-{number}").replace("../../", "../")
        (tmp_path / name).mkdir()
        (tmp_path / name / "site.toml").write_text(text + SITE.format("0" * 64), "utf-8")
    rng, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 150), ("val", 30), ("test", 60)):
        arrays[f"{part}_labels"] = np.arange(count)[:, None] % 2
        arrays[f"{part}_images"] = rng.integers(0, 255, (count, 28, 28)).astype(np.uint8)
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    hasten(tmp_path, "**/*.toml")
    return tmp_path


@pytest.mark.integration
def test_the_commands_of_the_page_work(folder: Path, commands: Any) -> None:
    assert len(LINES) >= 9
    for line in LINES:
        if LONG.search(line) and not WHOLE:
            continue
        program, *words = shlex.split(line)
        done = commands(PROGRAMS[program], *words, cwd=folder, timeout=3600)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        out = re.search(r"--out (\S+)", line)
        if " run " in line:
            place = folder / (out[1] if out else "runs/latest")
            assert (place / "report.html").is_file() and (place / "model.safetensors").is_file()
        elif " evaluate " in line:
            assert "scanner" in done.stdout
