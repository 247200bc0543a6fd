"""The page about ``fedward-client data``: its commands run, and each option is on it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from click import Group, Option

from fedward_client.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "hospital-data.md").read_text("utf-8")
GROUP = typer.main.get_command(app)
CLASSES = 'classes = ["no", "yes"]'


def data_commands():
    assert isinstance(GROUP, Group)
    data = GROUP.commands["data"]
    assert isinstance(data, Group)
    return data.commands


def section(name):
    return PAGE.split(f"## data {name}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize("name", sorted(data_commands()))
def test_each_command_and_option_has_its_place(name):
    for parameter in data_commands()[name].params:
        words = [str(parameter.name).upper()]
        if isinstance(parameter, Option):
            words = [*parameter.opts, *parameter.secondary_opts]
        for word in words:
            assert re.search(rf"^\|.*`{word}`.*\|", section(name), re.MULTILINE), word
    known = {
        word
        for parameter in data_commands()[name].params
        for word in (*parameter.opts, *parameter.secondary_opts)
    }
    assert set(re.findall(r"`(--[a-z-]+)`", section(name))) <= known


@pytest.mark.integration
def test_the_commands_of_the_page_work(tmp_path, dx, plan_file, commands):
    (site,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (typed,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "site.toml").write_text(site)
    rows, rng = ["PatientID,label"], np.random.default_rng(0)
    for k in range(24):
        dx(
            tmp_path / "export" / f"{k}.dcm",
            rng.integers(0, 4096, (20, 20)),
            PatientID=f"P{k}",
            SeriesInstanceUID=f"1.2.{k}",
            StudyInstanceUID=f"1.3.{k}",
        )
        rows.append(f"P{k},{'pneumonia' if k % 2 else 'normal'}")
    (tmp_path / "export" / "labels.csv").write_text("\n".join(rows))
    plan = plan_file.read_text("utf-8")
    assert CLASSES in plan
    (tmp_path / "study.toml").write_text(plan.replace(CLASSES, 'classes = ["normal", "pneumonia"]'))
    lines = [line for line in typed.splitlines() if line.strip()]
    # What fetches needs a PACS: tests/client/importer runs it.
    assert {shlex.split(line)[2] for line in lines} == set(data_commands()) - {"fetch"}
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "fedward-client"
        done = commands("fedward_client.cli", *words, "--json", cwd=tmp_path, env={})
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert isinstance(json.loads(done.stdout), dict)
    assert (tmp_path / "chest.html").is_file()
    assert len(list((tmp_path / "state" / "cohorts").iterdir())) == 1
