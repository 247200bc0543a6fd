"""The commands of the README, as they stand there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedward_server.results import StudyResults
from fedward_simulation.cohort import write_cohort
from fedward_simulation.demo import KINDS

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {
    ".venv/bin/fedward-simulate": "fedward_simulation.cli",
    ".venv/bin/fedward-client": "fedward_client.cli",
    ".venv/bin/fedward-server": "fedward_server.cli",
}
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
# The hospital's part is told first, and needs what the aggregator made.
LINES.sort(key=lambda line: " init " not in line)
pytestmark = pytest.mark.integration


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the shipped plans, and with a small copy of what ``make demo`` writes."""
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    for kind in KINDS:
        write_cohort(tmp_path / "demo" / f"cohort-{kind}", 0, kind, 20, 4)
    return tmp_path


def hasten(checkout: Path) -> None:
    """Two rounds instead of many; everything else of the plans stays."""
    for plan in (checkout / "studies" / "demo").glob("*.toml"):
        text = re.sub(r"^rounds = \d+$", "rounds = 2", plan.read_text("utf-8"), flags=re.MULTILINE)
        plan.write_text(text, "utf-8")


def run(commands: Any, line: str, folder: Path) -> str:
    """Run one line of the README from a folder; what it printed."""
    program, *arguments = shlex.split(line)
    assert program in PROGRAMS, "a README line that this test cannot run"
    done = commands(PROGRAMS[program], *arguments, cwd=folder)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_commands_of_the_readme_work(checkout: Path, commands: Any) -> None:
    assert len(LINES) >= 3
    hasten(checkout)
    for line in LINES:
        printed = run(commands, line, checkout)
        if " run " in line:
            out = checkout / line.split("--out ")[1].split()[0]
            results = StudyResults.model_validate_json((out / "metrics.json").read_text("utf-8"))
            assert results.complete and results.synthetic
            # The table's title may be wrapped.
            assert "synthetic data" in " ".join(printed.split()) and "report.html" in printed
            assert (out / "model.safetensors").is_file()
            assert (out / "cache").is_dir() or "--site" in line
        elif " init " in line:
            assert "fingerprint" in printed and "token" in printed
            assert (checkout / "runs" / "aggregator" / "server.toml").is_file()
        elif " enrol " in line:
            assert "BEGIN PUBLIC KEY" in printed and "PRIVATE" not in printed
            assert (checkout / "runs" / "north" / "site.toml").is_file()
        elif " data report " in line:
            assert "20" in printed and "opacity" in printed and "left out" in printed
        elif " data freeze " in line:
            assert "chest-" in printed and "frozen" in printed and "opacity" in printed
        else:
            assert "SHA-256" in printed


def test_the_make_targets_of_the_readme_exist() -> None:
    readme, makefile = (
        (ROOT / "README.md").read_text("utf-8"),
        (ROOT / "Makefile").read_text("utf-8"),
    )
    named = set(re.findall(r"`?make ([a-z]+)`?$|`make ([a-z]+)", readme, re.MULTILINE))
    for target in {first or second for first, second in named}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
