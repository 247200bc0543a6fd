"""A hospital's first day, with its coordinator: the page of joining, command by command."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from journey import PROGRAMS, WHOLE, Step, steps
from live_federation import ENVIRONMENT, free_port

pytestmark = pytest.mark.integration
# What needs neither a service nor a daemon.
ALONE = ("cohort", "init", "fingerprint", "enrol", "data", "plan check")
PATIENCE = 240


@dataclass
class Day:
    """The folder of the page, with what runs in it."""

    folder: Path
    commands: Any
    words: dict[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, line: str) -> None:
        """A command that the page ends with ``&``."""
        program, *arguments = shlex.split(line)
        with (self.folder / f"{program}.log").open("wb") as log:
            self.running.append(
                subprocess.Popen(
                    [sys.executable, "-m", PROGRAMS[program], *arguments],
                    cwd=self.folder,
                    env=ENVIRONMENT,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def run(self, line: str, *, waiting: bool = False) -> str:
        """A command; what it printed. `doctor` may warn and fail on a laptop."""
        program, *arguments = shlex.split(line)
        done = self.commands(PROGRAMS[program], *arguments, cwd=self.folder, timeout=PATIENCE)
        allowed = (0, 1) if arguments[0] == "doctor" else (0,)
        assert waiting or done.returncode in allowed, f"{line}\n{done.stdout}\n{done.stderr}"
        return str(done.stdout)

    def until(self, line: str, word: str) -> str:
        """The same, again and again, until it tells a word."""
        end = time.monotonic() + PATIENCE
        while word not in (told := self.run(line, waiting=True)):
            logs = "\n".join(path.read_text("utf-8")[-2000:] for path in self.folder.glob("*.log"))
            assert time.monotonic() < end, f"{line}\n{told}\n{logs}"
            time.sleep(0.5)
        return told

    def known(self, text: str) -> str:
        """The page's text with what is another thing each time."""
        for word, value in self.words.items():
            text = text.replace(word, value)
        return text

    def log(self, program: str) -> str:
        """What something that runs has said."""
        return (self.folder / f"{program}.log").read_text("utf-8")


@pytest.fixture
def day(tmp_path: Path, commands: Any) -> Iterator[Day]:
    found = Day(tmp_path, commands, {"9443": str(free_port())})
    yield found
    for process in reversed(found.running):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_from_a_pacs_export_to_a_study(day: Day) -> None:
    """Fast: what the hospital does alone. Whole: a real study, to its end."""
    told = list(steps("joining.md"))
    assert len(told) > 10
    for step in told:
        if step.file:
            (day.folder / step.file).write_text(day.known(step.content), "utf-8")
        else:
            follow(step, day)
    if WHOLE:
        assert "ready: hospitals connect to port" in day.log("fedward-server")


def follow(step: Step, day: Day) -> None:
    printed, skipped = "", False
    for line in map(day.known, step.commands):
        if not WHOLE and (line.endswith("&") or not re.search(f" ({'|'.join(ALONE)}) ?", line)):
            skipped = True
        elif line.endswith("&"):
            day.start(line.removesuffix("&"))
            if "fedward-server" in line:
                config = line.removesuffix("&").split("--config")[1].strip()
                day.until(f"fedward-server health --config {config}", "superlink: ok")
        elif " pending " in line:
            printed += day.until(line, "purpose")
        else:
            printed += day.run(line)
            note(line, printed, day)
    if not skipped:
        plain = " ".join(printed.split())
        for text in map(day.known, step.seen):
            assert text in plain, f"{text}\n{printed}"


def note(line: str, printed: str, day: Day) -> None:
    """Keep what the page tells to write down: other ports than everybody's, fingerprint, study."""
    if "fedward-server init" in line:
        file = day.folder / "aggregator" / "server.toml"
        text = day.known(file.read_text("utf-8"))
        for port in ("9444", "9445"):
            text = text.replace(f"= {port}", f"= {free_port()}")
        file.write_text(text, "utf-8")
    elif "fedward-server fingerprint" in line:
        day.words["FINGERPRINT"] = printed.split()[-1]
    elif "study submit" in line:
        day.words["STUDY"] = printed.split()[0]
