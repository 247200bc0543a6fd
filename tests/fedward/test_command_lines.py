"""What all three command lines have in common: short help, examples, whole ids, other systems."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedward.console import Console, Table, moment

PROGRAMS = ["fedward_simulation.cli", "fedward_client.cli", "fedward_server.cli"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_short_help_with_examples_and_completion(
    program: str, tmp_path: Path, commands: Any
) -> None:
    done = commands(program, "-h", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "First steps" in done.stdout and "--install-completion" in done.stdout
    command = {"simulation": "run", "client": "data", "server": "study"}[
        program.split("_")[1].split(".")[0]
    ]
    assert commands(program, command, "-h", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_another_system_is_told_what_to_do_in_one_line(program: str, system: str) -> None:
    code = f"import sys\nimport {program} as cli\nsys.platform = '{system}'\ncli.main()\n"
    done = subprocess.run(
        [sys.executable, "-c", code, "-h"], text=True, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1 and "WSL 2" in done.stderr and "macOS" in done.stderr


@pytest.mark.parametrize("width", [40, None])
def test_no_hash_is_cut_short(width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a narrow window nor in a pipe, where it stays on one line."""
    monkeypatch.delenv("COLUMNS", raising=False)
    table, out = Table("sha256", "what"), io.StringIO()
    table.add_row("0123456789abcdef" * 4, "a cohort of sixty patients")
    Console(file=out, **({"width": width} if width else {})).print(table)
    text = out.getvalue()
    assert "…" not in text
    assert width or "0123456789abcdef" * 4 in text


def test_a_time_has_its_offset() -> None:
    assert moment("2026-01-02T03:04:05.678901+00:00") == "2026-01-02 03:04:05+00:00"
    assert moment("never") == "never"
