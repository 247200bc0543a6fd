"""Trainer and connector started apart, by two users, as systemd and containers do it."""

from __future__ import annotations

import grp
import json
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedward.flower.control_client import ControlClient

pytestmark = pytest.mark.integration
Make = Callable[..., Any]
TRAINER, CONNECTOR, STRANGER = 61001, 61002, 61003
SITE = """
version = 1
[site]
name = "apart"
state = "trainer"
[server]
address = "{address}"
ca = "ca.pem"
state = "connector"
retry_seconds = 1.0
idle_seconds = 0.1
[trainer]
socket = "run/t.sock"
group = "{group}"
device = "cpu"
threads = 1
[datasets.chest]
root = "images"
format = "dicom"
task = "classification"
classes = ["clear", "opacity"]
"""


@dataclass
class Apart:
    """A hospital's folders, each of its own user, and its two processes."""

    folder: Path
    group: grp.struct_group
    environment: dict[str, str]
    view: list[str]
    as_user: Callable[[int, int], list[str]]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def words(self, user: int, *words: str) -> list[str]:
        """A command line as a user who may do nothing more."""
        config = str(self.folder / "site.toml")
        command = [sys.executable, "-m", "fedward_client.cli", *words, "--config", config]
        return [*self.view, *self.as_user(user, self.group.gr_gid), *command]

    def call(self, user: int, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(user, *words, "--json"),
            env=self.environment,
            text=True,
            capture_output=True,
            timeout=120,
            check=False,
        )

    def start(self, which: str) -> None:
        user = TRAINER if which == "trainer" else CONNECTOR
        if which == "connector":  # what an earlier one said of its link is not this one's
            (self.folder / "connector" / "link.json").unlink(missing_ok=True)
        alone = ["unshare", "--net"] if which == "trainer" else []
        with (self.folder / f"{which}.log").open("ab") as log:
            self.running[which] = subprocess.Popen(
                [*alone, *self.words(user, which)], env=self.environment, stdout=log, stderr=log
            )

    def health(self, which: str) -> tuple[bool, str]:
        user = TRAINER if which == "trainer" else CONNECTOR
        done = self.call(user, "health", which)
        told = json.loads(done.stdout)
        assert done.returncode == (0 if told["healthy"] else 1)
        return bool(told["healthy"]), str(told["found"])

    def well(self) -> bool:
        """Whether both are healthy; asked now and then, since each question is a process."""
        time.sleep(0.5)
        return self.health("trainer")[0] and self.health("connector")[0]


@pytest.fixture(scope="module")
def apart(
    make_superlink: Make,
    hospital_data: dict[str, Path],
    environment: dict[str, str],
    open_view: list[str],
    as_user: Callable[[int, int], list[str]],
) -> Iterator[Apart]:
    superlink = make_superlink()
    group = next(one for one in grp.getgrall() if one.gr_gid)
    folder = Path(tempfile.mkdtemp(prefix="fedward-apart-", dir="/tmp"))
    folder.chmod(0o755)
    made = Apart(folder, group, {**environment, "HOME": str(folder)}, open_view, as_user)
    shutil.copytree(hospital_data["classification"] / "hospital-1", folder / "images")
    owners = (("images", TRAINER), ("trainer", TRAINER), ("run", TRAINER), ("connector", CONNECTOR))
    for name, user in owners:
        (folder / name).mkdir(exist_ok=True)
        (folder / name).chmod(0o700)
        shutil.chown(folder / name, user, 0)
    for path in (folder / "images").rglob("*"):
        shutil.chown(path, TRAINER, 0)
    (folder / "ca.pem").write_bytes(superlink.ca)
    (folder / "site.toml").write_text(
        SITE.format(address=superlink.address, group=group.gr_name), "utf-8"
    )
    enrolled = made.call(CONNECTOR, "enrol")
    assert enrolled.returncode == 0, enrolled.stderr
    public = json.loads(enrolled.stdout)["public_key"]
    ControlClient(superlink.address, superlink.ca, superlink.control_secret).register(
        public.encode(), "apart"
    )
    frozen = made.call(TRAINER, "data", "freeze", "chest")
    assert frozen.returncode == 0, frozen.stderr
    yield made
    for one in made.running.values():
        if one.poll() is None:
            one.kill()
            one.wait()
    shutil.rmtree(folder)


def test_an_enrolled_site_is_not_enrolled_again(apart: Apart) -> None:
    again = apart.call(CONNECTOR, "enrol")
    assert again.returncode == 19 and "one key" in again.stderr
    assert (apart.folder / "connector" / "site.key").stat().st_mode & 0o777 == 0o600


def test_what_does_not_run_is_not_healthy(apart: Apart) -> None:
    assert apart.health("trainer") == (False, "the daemon must run")
    assert apart.health("connector")[0] is False


def test_two_users_work_together_and_neither_has_what_is_the_others(
    apart: Apart, until: Make
) -> None:
    apart.start("connector")
    apart.start("trainer")
    until(apart.well, 90)
    assert apart.health("connector")[1] == "link online; trainer attached"
    status = json.loads(apart.call(TRAINER, "status").stdout)
    assert status["trainer"]["walls"] is True
    assert status["trainer"]["connector"] == "hidden"
    assert (status["link"]["state"], status["link"]["isolation"]) == ("online", "hidden")
    assert apart.call(CONNECTOR, "status").returncode == 19, "the officer's socket is the trainer's"

    folder, path = apart.folder / "run", apart.folder / "run" / "t.sock"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert folder.stat().st_gid == path.stat().st_gid == apart.group.gr_gid
    # What was there before the socket is the trainer's: nobody else wrote into its folder.
    assert [one.name for one in folder.iterdir()] == ["t.sock"]


def test_the_doctor_looks_from_within_each_process(apart: Apart, until: Make) -> None:
    lines = {}
    for user, which in ((TRAINER, "trainer"), (CONNECTOR, "connector")):
        told = json.loads(apart.call(user, "doctor", "--process", which).stdout)
        lines[which] = {line["name"]: line["status"] for line in told["lines"]}
    # This process is outside the trainer's network namespace, and says so.
    assert lines["trainer"]["trainer's network"] == "fail"
    assert lines["trainer"]["dataset chest"] == "pass"
    assert lines["connector"]["connector and images"] == "pass"
    assert lines["connector"]["enrolment"] == "pass"
    assert not {"certificate", "enrolment"} & set(lines["trainer"])
    assert not {"device", "dataset chest"} & set(lines["connector"])


def test_a_stranger_does_not_reach_the_socket(apart: Apart) -> None:
    path = str(apart.folder / "run" / "t.sock")
    code = f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})"
    as_stranger = [*apart.view, *apart.as_user(STRANGER, STRANGER)]
    done = subprocess.run(
        [*as_stranger, sys.executable, "-c", code], text=True, capture_output=True, check=False
    )
    assert "PermissionError" in done.stderr
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(path)


def test_each_may_be_killed_and_comes_back_to_the_other(apart: Apart, until: Make) -> None:
    for which in ("trainer", "connector"):
        apart.running[which].send_signal(signal.SIGKILL)
        apart.running[which].wait()
        if which == "trainer":
            until(lambda: apart.health("connector")[1].endswith("trainer gone"))
        apart.start(which)
        until(apart.well, 90)
    for which, process in apart.running.items():
        process.terminate()
        assert process.wait(30) == 0, which
        assert "Traceback" not in (apart.folder / f"{which}.log").read_text()
    assert apart.health("connector") == (False, "link stopped; trainer attached")
