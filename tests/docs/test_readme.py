"""The commands of the README, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import warm_start
from live_federation import ENVIRONMENT, free_port, wait_until

from fedward_server.results import StudyResults
from fedward_simulation.cohort import write_cohort
from fedward_simulation.demo import KINDS

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {
    ".venv/bin/fedward-simulate": "fedward_simulation.cli",
    ".venv/bin/fedward-client": "fedward_client.cli",
    ".venv/bin/fedward-server": "fedward_server.cli",
}
BLOCKS = re.findall(r"```(sh|)\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind for line in block.splitlines() if line.strip()]
# What needs an aggregator that runs. The daemon needs a policy too: docs/joining.md, in journeys.
LIVE = [
    line
    for kind, block in BLOCKS
    if not kind
    for line in block.splitlines()
    if line.startswith(".venv/") and not re.search(r"fedward-client (run|status) ", line)
]
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
        elif " predict " in line:
            told = json.loads((checkout / "runs" / "predictions" / "predictions.json").read_text())
            answers = [one["images"][0] for one in told["inputs"] if one["images"]]
            assert len(answers) >= 20
            assert all(sum(one["probabilities"].values()) > 0.999 for one in answers)
        elif " data report " in line:
            assert "20" in printed and "opacity" in printed and "left out" in printed
        elif " data freeze " in line:
            assert "chest-" in printed and "frozen" in printed and "opacity" in printed
        else:
            assert "SHA-256" in printed


def test_the_commands_of_a_federation_work(tmp_path: Path, commands: Any) -> None:
    """As they stand there, but for the ports, which another test may have."""
    shutil.copytree(ROOT / "studies" / "demo", tmp_path / "studies" / "demo")
    words = {str(port): str(free_port()) for port in (9443, 9444, 9445)}

    def here(text: str) -> str:
        for word, value in words.items():
            text = text.replace(word, value)
        return text

    for line in LINES:
        if " init " in line or " enrol " in line:
            run(commands, here(line), tmp_path)
        if " init " in line:
            config = tmp_path / "runs" / "aggregator" / "server.toml"
            config.write_text(here(config.read_text("utf-8")), "utf-8")
    assert sum(" site add " in line for line in LIVE) == 2
    running = []
    try:
        # The hospital's part is told first, and needs the aggregator, and its enrolment.
        for line in sorted(LIVE, key=lambda line: (not line.endswith("&"), " add " not in line)):
            if line.endswith("&"):
                running.append(Started(line.rstrip(" &"), tmp_path))
                running[-1].wait_for("ready: hospitals connect to port")
            elif " watch " in line:
                running.append(Started(here(line), tmp_path))
                running[-1].wait_for("north (silent): not connected; south (silent)")
            else:
                printed = run(commands, line, tmp_path)
                if " doctor " in line:
                    assert "the aggregator knows this site's key" in printed
                elif " submit " in line:
                    words["STUDY"] = printed.split()[0]
    finally:
        for one in reversed(running):
            one.process.send_signal(signal.SIGINT)
        for one in running:
            assert one.process.wait(60) in (0, 130)


class Started:
    """A command of the README that goes on."""

    def __init__(self, line: str, folder: Path) -> None:
        program, *arguments = shlex.split(line)
        command = [sys.executable, "-m", PROGRAMS[program], *arguments]
        self.log = folder / f"{len(list(folder.glob('*.log')))}.log"
        with self.log.open("wb") as log:
            self.process = warm_start.popen(
                command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log
            )

    def wait_for(self, text: str) -> None:
        """Until it has said something; lines are wrapped."""

        def told() -> bool:
            assert self.process.poll() is None, self.log.read_text("utf-8")
            return text in " ".join(self.log.read_text("utf-8").split())

        wait_until(told)


def test_the_make_targets_of_the_readme_exist() -> None:
    readme, makefile = (
        (ROOT / "README.md").read_text("utf-8"),
        (ROOT / "Makefile").read_text("utf-8"),
    )
    named = set(re.findall(r"`?make ([a-z]+)`?$|`make ([a-z]+)", readme, re.MULTILINE))
    for target in {first or second for first, second in named}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
