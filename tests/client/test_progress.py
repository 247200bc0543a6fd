"""Long work tells how far it is, on a terminal or in a log."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from fedward.plan.schema import Task
from fedward_client.commands import work
from fedward_client.data.readers.dicom.headers import read_headers


def test_a_log_gets_a_plain_line_every_few_seconds(capsys, monkeypatch):
    monkeypatch.setattr(work, "_EVERY", 0.05)
    with work.reading("chest") as listen:
        time.sleep(0.13)
        listen(150, 9000)
        time.sleep(0.13)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) >= 2 and "\x1b" not in err
    assert re.fullmatch(r"chest: reading headers and labels \(\d+ s\)", lines[0])
    assert re.fullmatch(r"chest: reading headers and labels, 150 of 9000 files \(0 s\)", lines[-1])
    time.sleep(0.1)
    assert capsys.readouterr().err == ""  # it ends with the work


def test_short_work_says_nothing(capsys):
    with work.busy("chest: checking"):
        pass
    assert capsys.readouterr().err == ""


def test_the_headers_that_are_read_are_counted(tmp_path: Path, dx):
    paths = [dx(tmp_path / f"{k}.dcm", np.ones((4, 4))) for k in range(120)]
    task = Task(kind="classification", classes=("no", "yes"))
    told: list[tuple[int, int]] = []
    read_headers(paths, tmp_path, task, listen=lambda *how: told.append(how))
    assert told == [(0, 120), (50, 120), (100, 120)]


@pytest.mark.integration
def test_commands_in_a_log(commands, site, tmp_path):
    done = commands("fedward_client.cli", "data", "report", "chest", "--config", site, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == "chest: indexing for the first time\n"
