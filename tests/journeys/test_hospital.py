"""A hospital's first day and its coordinator's: the pages that they follow, command by command.

Two hospitals and an aggregator, as processes. `make test` takes fewer rounds; `make journeys` takes
the studies whole, starts all programs anew, and exports the model as well.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import warm_start
from journey import PROGRAMS, ROOT, WHOLE, Step, hasten, steps
from live_federation import ENVIRONMENT, free_port, wait_until

pytestmark = pytest.mark.integration


@dataclass
class Day:
    """The folder of the pages, with what runs in it."""

    folder: Path
    commands: Any
    words: dict[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, line: str) -> None:
        """A command that the page ends with ``&``."""
        program, *arguments = shlex.split(line)
        popen: Any = subprocess.Popen if WHOLE else warm_start.popen
        with (self.folder / f"{program}-{len(self.running)}.log").open("wb") as log:
            self.running.append(
                popen(
                    [sys.executable, "-m", PROGRAMS[program], *arguments],
                    cwd=self.folder,
                    env=ENVIRONMENT,
                    stdout=log,
                    stderr=log,
                )
            )

    def run(self, line: str, *, waiting: bool = False) -> str:
        """A command; what it printed. `doctor` may warn and fail on a laptop."""
        program, *arguments = shlex.split(line)
        environment = os.environ | self.environment
        done = self.commands(PROGRAMS[program], *arguments, cwd=self.folder, env=environment)
        allowed = (0, 1) if arguments[0] == "doctor" else (0,)
        assert waiting or done.returncode in allowed, f"{line}\n{done.stdout}\n{done.stderr}"
        return str(done.stdout)

    def until(self, line: str, word: str) -> str:
        """The same, again and again, until it tells a word."""
        told = ""

        def heard() -> bool:
            nonlocal told
            assert all(one.poll() is None for one in self.running), self.logs()
            told = self.run(line, waiting=True)
            return word in told

        wait_until(heard)
        return told

    def known(self, text: str) -> str:
        """The page's text with what is another thing each time."""
        for word, value in self.words.items():
            text = text.replace(word, value)
        return text

    def logs(self) -> str:
        """What the programs that run have said."""
        return "\n".join(path.read_text("utf-8") for path in sorted(self.folder.glob("*.log")))

    def follow(self, step: Step) -> None:
        """Run the commands of a step, and hold what they print against what it says."""
        printed = ""
        for line in map(self.known, step.commands):
            if line.endswith("&"):
                self.start(line.removesuffix("&"))
                if "fedward-server" in line:
                    config = line.removesuffix("&").split("--config")[1].strip()
                    self.until(f"fedward-server health --config {config}", "superlink: ok")
            elif " pending " in line:
                printed += self.until(line, "purpose")
            else:
                printed += self.run(line)
                self._note(line, printed)
        plain = " ".join(printed.split())
        for text in map(self.known, step.seen):
            assert text in plain, f"{text}\n{printed}"

    def _note(self, line: str, printed: str) -> None:
        """Keep what pages tell to write down: other ports than everybody's, fingerprint, study."""
        if "fedward-server init aggregator" in line:
            file = self.folder / "aggregator" / "server.toml"
            text = self.known(file.read_text("utf-8"))
            for port in ("9444", "9445"):
                text = text.replace(f"= {port}", f"= {free_port()}")
            file.write_text(text, "utf-8")
        elif "fedward-server fingerprint" in line:
            self.words["FINGERPRINT"] = printed.split()[-1]
        elif "study submit" in line:
            study = printed.split()[0]
            self.words["STUDY" if "rehearsal" in study else "demo-private-1a2b3c4d"] = study


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory, commands: Any) -> Iterator[Day]:
    folder = tmp_path_factory.mktemp("day")
    found = Day(folder, commands, {"9443": str(free_port())})
    yield found
    for process in reversed(found.running):
        process.terminate()
    for process in reversed(found.running):
        process.wait(60)


@pytest.fixture(scope="module")
def hospital(day: Day) -> Day:
    """After the page of joining, to its end."""
    for step in (told := list(steps("joining.md"))):
        if step.file:
            # Idle threads would wait for each other, where other tests run as well.
            quick = step.content.replace("[trainer]", "[trainer]\nthreads = 1")
            content = day.known(step.content if WHOLE else quick)
            (day.folder / step.file).write_text(content, "utf-8")
        else:
            day.follow(step)
    assert len(told) > 10
    return day


@pytest.fixture(scope="module")
def coordinator(hospital: Day) -> Day:
    """After the page of the aggregator: a private study of two hospitals, and its model."""
    day, told = hospital, list(steps("aggregator.md"))
    folder = day.folder
    shutil.copytree(ROOT / "studies" / "demo", folder / "studies" / "demo")
    hasten(folder, "studies/demo/private.toml")
    site = (folder / "north" / "site.toml").read_text("utf-8")
    for name in ("south", "east", "east-new"):
        day.run(
            f"fedward-client enrol --name {name} --server 127.0.0.1:{day.words['9443']} "
            f"--ca aggregator/tls/ca.crt --out {name}"
        )
        shutil.copy(folder / name / "connector" / "site.pub", folder / f"{name}.pub")
    # A second hospital, of the same synthetic patients; the officers allow a second study.
    more = site.replace('approval = "manual"', 'approval = "manual"\nmax_epsilon_per_cohort = 20')
    (folder / "north" / "site.toml").write_text(more, "utf-8")
    (folder / "south" / "site.toml").write_text(more.replace('"north"', '"south"'), "utf-8")
    day.run("fedward-client data freeze chest --config south/site.toml")
    day.start("fedward-client run --config south/site.toml")
    for step in told:
        if " init " in step.commands[0]:
            # It has the aggregator that runs already for its own.
            day.run(step.commands[0])
            shutil.rmtree(folder / "agg")
            (folder / "agg").symlink_to("aggregator")
            day.environment["FEDWARD_SERVER"] = "agg/server.toml"
        elif WHOLE or " export " not in step.commands[0]:
            day.follow(step)
        if " submit " in step.commands[0]:
            for name in ("north", "south"):
                config = f"--config {name}/site.toml"
                day.until(f"fedward-client pending {config}", day.words["demo-private-1a2b3c4d"])
                day.run(f"fedward-client approve {day.words['demo-private-1a2b3c4d']} {config}")
    return day


def test_from_a_pacs_export_to_a_study(hospital: Day) -> None:
    assert "ready: hospitals connect to port" in hospital.logs()


def test_from_two_hospitals_to_a_model(coordinator: Day) -> None:
    """Report and card tell both hospitals; nobody's budget is exceeded."""
    assert "south" in (coordinator.folder / "report.html").read_text("utf-8")
    card = (coordinator.folder / "model.md").read_text("utf-8")
    assert "north" in card and "south" in card and "synthetic" in card
    for name in ("north", "south"):
        asked = f"fedward-client budget --config {name}/site.toml --json"
        (row,) = json.loads(coordinator.run(asked))["budget"]
        assert 0 < row["spent"] <= row["cap"] == 20


def test_from_a_model_to_answers_for_new_images(coordinator: Day) -> None:
    """The page of predictions, at the hospital, with the model that the coordinator sends."""
    north = Day(coordinator.folder / "north", coordinator.commands, coordinator.words)
    scans = north.folder / "scans" / "today"
    scans.mkdir(parents=True)
    images = sorted((coordinator.folder / "export").rglob("*.dcm"))
    for image, name in zip(images, ("a.dcm", "b.dcm", "ct.dcm"), strict=False):
        shutil.copy(image, scans / name)
    shutil.copy(coordinator.folder / "model.safetensors", north.folder)
    config = north.folder / "site.toml"  # three images will do
    config.write_text(config.read_text("utf-8").replace("../export/hospital-1", "scans"), "utf-8")
    for step in steps("predict.md"):
        if not any(
            " --store" in line for line in step.commands
        ):  # tests/client/importer has a PACS
            north.follow(step)
    for name, count in (("", 3), ("-ct", 1), ("-chest", 3)):
        out = north.folder / f"predictions{name}" / "predictions.json"
        assert len(json.loads(out.read_text("utf-8"))["inputs"]) == count
    for step in steps("explain.md"):
        north.follow(step)
    for name in ("", "-today", "-opacity"):
        told = json.loads((north.folder / f"reasons{name}" / "explain.json").read_text("utf-8"))
        assert len(told["inputs"]) == 3 and all(
            "explained" in one["images"][0] for one in told["inputs"]
        )
