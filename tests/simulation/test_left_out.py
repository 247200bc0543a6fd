"""What cannot be taken is counted at its hospital, named on this machine, and never fatal."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward_server.results import StudyResults

PROGRAM = "fedward_simulation.cli"
pytestmark = pytest.mark.integration


def rows(path: Path) -> list[tuple[str, str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["site"], row["reason"], row["name"]) for row in csv.DictReader(file)]


def results_of(out: Path) -> StudyResults:
    return StudyResults.model_validate_json((out / "metrics.json").read_text("utf-8"))


def test_a_file_that_cannot_be_read_is_counted_at_its_hospital_and_named(
    folder_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    (folder_data / "north" / "no" / "broken.png").write_bytes(b"junk")
    (folder_data / "south" / "maybe").mkdir()
    shutil.copy(folder_data / "south" / "no" / "00.png", folder_data / "south" / "maybe" / "x.png")
    # The second time the images come from the cache, which has no names.
    for _ in range(2):
        done = commands(PROGRAM, "run", plan_file, "--data", folder_data, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        told = "left out: 2 (not readable: 1, unknown class: 1); left-out.csv names them"
        assert told in done.stdout
        out = tmp_path / "runs" / "latest"
        assert sorted(rows(out / "left-out.csv")) == [
            ("north", "not readable", "north/no/broken.png"),
            ("south", "unknown class", "south/maybe/x.png"),
        ]
        facts = {site.site: site for site in results_of(out).sites}
        assert facts["north"].left_out_reasons == ("not readable",)
        assert facts["south"].left_out_reasons == ("unknown class",)
        report = (out / "report.html").read_text("utf-8")
        assert "unknown class: 1" in report and "not given to any site" not in report
        assert "broken.png" not in report


def test_what_no_site_got_has_a_row_of_its_own(
    folder_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    pooled = folder_data / "north"
    (pooled / "maybe").mkdir()
    shutil.copy(pooled / "no" / "00.png", pooled / "maybe" / "x.png")
    words = ("--data", pooled, "--partition", "iid", "--out", "out")
    done = commands(PROGRAM, "run", plan_file, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "out").left_out == {"unknown class": 1}
    assert rows(tmp_path / "out" / "left-out.csv") == [("", "unknown class", "maybe/x.png")]
    assert "not given to any site" in (tmp_path / "out" / "report.html").read_text("utf-8")
    shutil.rmtree(pooled / "maybe")
    done = commands(PROGRAM, "run", plan_file, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "left-out.csv").exists()


def test_an_array_that_cannot_be_prepared_is_named_by_its_place(
    plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    images = rng.random((80, 16, 16)).astype(np.float32) + labels[:, None, None]
    images[17] = np.nan
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    words = ("--data", "data.npz", "--partition", "iid", "--out", "out")
    done = commands(PROGRAM, "run", plan_file, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ((site, _, name),) = rows(tmp_path / "out" / "left-out.csv")
    assert site in ("site-1", "site-2") and name == "data.npz: 17"
