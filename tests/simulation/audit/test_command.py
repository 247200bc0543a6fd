"""``fedward-simulate audit`` as a shell runs it: as documented, killed, ended and gone on with."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from forked_command import ForkedCommand

from fedward_server.memorisation import Audit
from fedward_server.report import read_metrics

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "fedward_simulation.cli"
WORDS = ("--partition", "iid", "--device", "cpu", "--shadows", "3", "--canaries", "4")
pytestmark = pytest.mark.integration


def documented() -> list[str]:
    """The example on the command's page."""
    text = (ROOT / "docs" / "simulate.md").read_text("utf-8")
    (line,) = re.findall(r"^fedward-simulate (audit plan\.toml .+)$", text, re.MULTILINE)
    return shlex.split(line)


def figures(out: Path) -> Audit:
    """What an audit found; how long it took is another matter each time."""
    found = Audit.model_validate_json((out / "audit.json").read_text("utf-8"))
    return found.model_copy(update={"seconds": 0.0})


def test_the_documented_command_adds_a_section_to_an_earlier_report(
    npz_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    words = documented()
    out = tmp_path / words[words.index("--out") + 1]
    run = ("run", "plan.toml", "--data", "data.npz", "--partition", "iid", "--out", out)
    assert commands(PROGRAM, *run, cwd=tmp_path).returncode == 0
    assert "What the model remembers" not in (out / "report.html").read_text("utf-8")
    done = commands(PROGRAM, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Audit: " in done.stdout and "Lower bounds" in done.stdout
    report = (out / "report.html").read_text("utf-8")
    assert "What the model remembers" in report and "A lower bound is not an upper bound" in report
    assert "<img" not in report and "inversion.png" not in report
    (results,) = read_metrics(out / "metrics.json")
    assert results.audit is not None and results.audit.shadows == 3
    assert {one.attack for one in results.audit.memberships} == {
        "loss, delivered model",
        "LiRA, delivered model",
        "LiRA, random halves",
    }
    assert (out / "inversion.png").stat().st_mode & 0o777 == 0o600
    private = [*(out / "audit").iterdir()]
    assert (out / "audit").stat().st_mode & 0o777 == 0o700
    assert private and all(path.stat().st_mode & 0o777 == 0o600 for path in private)


def stop_after(line: str, how: signal.Signals, folder: Path) -> tuple[int, str]:
    """Start an audit, send it a signal once it printed a line; its exit code and errors."""
    command = ForkedCommand(folder, "audit", "plan.toml", "--data", "data.npz", *WORDS)
    command.wait_for(line)
    code = command.end(how)
    return code, command.err.read_text("utf-8")


def test_an_audit_that_was_ended_and_killed_goes_on_where_it_was(
    npz_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    out = tmp_path / "runs" / "latest"
    code, errors = stop_after("audit: shadow-1", signal.SIGTERM, tmp_path)
    assert code == 130 and "interrupted" in errors and "Traceback" not in errors, errors
    first = {path.name: path.stat().st_mtime_ns for path in (out / "audit").glob("*.npz")}
    assert {"delivered.npz", "shadow-0.npz"} <= set(first)
    code, _ = stop_after("audit: shadow-2", signal.SIGKILL, tmp_path)
    assert code == -signal.SIGKILL and not (out / "audit.json").exists()
    done = commands(PROGRAM, "audit", "plan.toml", "--data", "data.npz", *WORDS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "audit: shadow-0" not in done.stdout and "audit: delivered" not in done.stdout
    after = {path.name: path.stat().st_mtime_ns for path in (out / "audit").glob("*.npz")}
    assert {name: after[name] for name in first} == first
    whole = ("--out", "whole")
    words = ("audit", "plan.toml", "--data", "data.npz", *WORDS, *whole)
    assert commands(PROGRAM, *words, cwd=tmp_path).returncode == 0
    assert figures(out) == figures(tmp_path / "whole")


def test_a_plan_with_the_gate_audits_at_the_end_of_a_run(
    npz_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    text = plan_file.read_text("utf-8")
    private = 'mechanism = "dp-sgd"\nepsilon = 8\ndelta = 1e-3\nclipping_norm = 1.0\naudit = true'
    plan_file.write_text(text.replace('mechanism = "none"', private), "utf-8")
    run = ("run", plan_file, "--data", npz_data, "--partition", "iid", "--out", "out")
    done = commands(PROGRAM, *run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (results,) = read_metrics(tmp_path / "out" / "metrics.json")
    assert results.audit is not None and not results.audit.broken
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "What the model remembers" in (tmp_path / "out" / "report.html").read_text("utf-8")
