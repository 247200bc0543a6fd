"""An aggregator and five hospitals; each in a network of its own where that can be made."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedward.flower.control_client import ControlClient
from fedward.flower.server_session import RunSession
from fedward.models import build_model, to_arrays
from fedward.plan.schema import Plan, TaskKind
from fedward.plan.text import toml_text
from fedward_client.enrol import enrol
from fedward_server.config import load_config
from fedward_server.job import Job
from fedward_server.registry import open_registry
from fedward_server.results import Arm
from fedward_server.round_loop import StudyRun
from fedward_simulation.cohort import write_cohort
from fedward_simulation.options import Hospital, Options
from fedward_simulation.study import Study

HOSPITALS = 5
HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Five hospitals need more than the two cores that the other tests make do with."""
    if os.environ.get("FEDWARD_FAULTS") != "1":
        skip = pytest.mark.skip(reason="set FEDWARD_FAULTS=1 for the faults of five hospitals")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)


DATASETS: dict[str, TaskKind] = {"chest": "classification", "lungs": "segmentation"}
PATIENTS = 20


class Network:
    """A bridge on which each hospital hangs by a cable of its own (network namespaces, veth)."""

    def __init__(self) -> None:
        self._tag = f"fw{os.getpid()}"
        self._net = f"198.18.{os.getpid() % 250}"
        self.address = "127.0.0.1"
        self.why_not = self._make()

    def _make(self) -> str:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            return "network namespaces need root and iproute2"
        try:
            self._clear_up()
            self._ip("link", "add", self._tag, "type", "bridge")
            self._ip("addr", "add", f"{self._net}.1/24", "dev", self._tag)
            self._ip("link", "set", self._tag, "up")
            for number in range(1, HOSPITALS + 1):
                self._plug(number)
        except subprocess.CalledProcessError as error:
            self.close()
            return f"this kernel makes no such network: {error.stderr.strip()}"
        self.address = f"{self._net}.1"
        return ""

    def _clear_up(self) -> None:
        """Take away what test runs left that were killed."""
        for name in re.findall(r"^(fw(\d+)-\d)\b", self._ip("netns", "list"), re.MULTILINE):
            if not Path(f"/proc/{name[1]}").exists():
                self._ip("netns", "del", name[0])
        for name in re.findall(r"^(fw(\d+))\b(?!-)", self._ip("-br", "link"), re.MULTILINE):
            if not Path(f"/proc/{name[1]}").exists():
                self._ip("link", "del", name[0])

    def _plug(self, number: int) -> None:
        name = f"{self._tag}-{number}"
        self._ip("netns", "add", name)
        self._ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._ip("link", "set", name, "master", self._tag, "up")
        self._ip("-n", name, "addr", "add", f"{self._net}.{10 + number}/24", "dev", "eth0")
        self._ip("-n", name, "link", "set", "eth0", "up")

    def within(self, number: int) -> list[str]:
        """What a hospital's command begins with."""
        return [] if self.why_not else ["ip", "netns", "exec", f"{self._tag}-{number}"]

    def interfaces(self, number: int) -> list[str]:
        """What a hospital's connector sees."""
        told = self._ip("-n", f"{self._tag}-{number}", "-br", "link", "show", "up")
        return [line.split("@")[0].split()[0] for line in told.splitlines()]

    def cut(self, number: int) -> None:
        """Pull a hospital's cable."""
        if self.why_not:
            pytest.skip(self.why_not)
        self._ip("link", "set", f"{self._tag}-{number}", "down")

    def mend(self, number: int) -> None:
        """Put it back."""
        self._ip("link", "set", f"{self._tag}-{number}", "up")

    def close(self) -> None:
        """Take everything away."""
        for number in range(1, HOSPITALS + 1):
            with suppress(subprocess.CalledProcessError):
                self._ip("netns", "del", f"{self._tag}-{number}")
        with suppress(subprocess.CalledProcessError):
            self._ip("link", "del", self._tag)

    @staticmethod
    def _ip(*words: str) -> str:
        command = ["ip", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class SmallDisk:
    """The aggregator's state on a file system of its own (tmpfs), so that it can be full."""

    def __init__(self) -> None:
        self._place: Path | None = None
        self.why_not = "a file system of its own needs root"

    def put_under(self, folder: Path) -> None:
        """Move an aggregator's state there."""
        config, state = folder / "server.toml", folder / "state"
        config.write_text(config.read_text().replace("free_bytes = 1000000000", "free_bytes = 1"))
        if os.geteuid() != 0:
            return
        state.rename(folder / "before")
        state.mkdir(mode=0o700)
        command = ["mount", "-t", "tmpfs", "-o", "size=192m,mode=700", "fedward-test", str(state)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            self._place, self.why_not = state, ""
        else:
            self.why_not = done.stderr.strip()
        shutil.copytree(folder / "before", state, dirs_exist_ok=True)

    def fill(self) -> Path:
        """Leave no byte free; gives the file that does it."""
        if self._place is None:
            pytest.skip(self.why_not)
        filler = self._place / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        return filler

    def close(self) -> None:
        """Take it away."""
        if self._place is not None:
            subprocess.run(["umount", "-l", str(self._place)], check=False)


SITE = """
version = 1
[site]
name = "{name}"
state = "state"
[server]
address = "{address}"
ca = "aggregator-ca.pem"
state = "connector"
retry_seconds = 1.0
idle_seconds = 0.2
[trainer]
socket = "run/t.sock"
device = "cpu"
threads = 1
[datasets.chest]
root = "{data}/classification/hospital-{number}"
format = "dicom"
task = "classification"
classes = ["clear", "opacity"]
[datasets.lungs]
root = "{data}/segmentation/hospital-{number}"
format = "dicom"
task = "segmentation"
classes = ["lung"]
{real}
[policy]
coordinators = ["{coordinator}"]
approval = "within-policy"
require_privacy = false
minimum_patients = 5
minimum_per_class = 0
minimum_count = 1
rounding = 9
counts = "minimum-cells"
count_noise = 0.0
{real_study}
[[policy.studies]]
match = "lungs*"
dataset = "lungs"
[[policy.studies]]
match = "*"
dataset = "chest"
"""
REAL = """[datasets.real]
root = "{root}"
task = "segmentation"
classes = ["lung"]
"""
REAL_STUDY = """[[policy.studies]]
match = "real"
dataset = "real"
"""
REAL_SITES = ("italy", "germany", "china", "uk", "spain")


def real_images(number: int) -> dict[str, str]:
    """A hospital's real chest images and lungs, where the development images are here."""
    found = Path(os.environ.get("FEDWARD_DATA", HERE.parents[3] / "shared" / "data"))
    root = found / "lungs" / REAL_SITES[number - 1]
    if not root.is_dir():
        return {"real": "", "real_study": ""}
    return {"real": REAL.format(root=root), "real_study": REAL_STUDY}


@dataclass
class Federation:
    """The aggregator, the hospitals, the network between them."""

    service: Any
    network: Network
    disk: SmallDisk
    folder: Path
    new_daemon: Any
    daemons: dict[int, Any] = field(default_factory=dict)
    frozen: set[tuple[int, str]] = field(default_factory=set)

    def ready(self, *numbers: int, dataset: str = "chest") -> list[str]:
        """Have these hospitals run and online, with a frozen cohort; gives their names."""
        for kind in DATASETS.values():
            if not (self.folder / kind).exists():
                write_cohort(self.folder / kind, 0, kind, PATIENTS, HOSPITALS)
        new = [number for number in numbers if number not in self.daemons]
        for number in new:
            self.daemons[number] = self._enrolled(number)
        for number in numbers:
            if (number, dataset) not in self.frozen:
                self._freeze(number, dataset)
            if number in new:
                self.daemons[number].start()
        self.recovered()
        return [f"hospital {number}" for number in numbers]

    def _enrolled(self, number: int) -> Any:
        address = f"{self.network.address}:{self.service.sites_port}"
        daemon = self.new_daemon(f"hospital {number}", self.folder / f"h{number}")
        daemon.within = self.network.within(number)
        ca = (self.service.folder / "tls" / "ca.crt").read_bytes()
        enrol(daemon.folder, daemon.name, address, ca)
        daemon.config.write_text(
            SITE.format(
                name=daemon.name,
                address=address,
                data=self.folder,
                number=number,
                coordinator=self.service.coordinator,
                **real_images(number),
            )
        )
        self.service.ask("site", "add", daemon.name, daemon.folder / "connector" / "site.pub")
        return daemon

    def _freeze(self, number: int, dataset: str) -> None:
        self.daemons[number].freeze(dataset)
        self.frozen.add((number, dataset))

    def submit(self, plan: Plan, sites: str, folder: Path, *more: object) -> str:
        """Submit as a coordinator does; gives the study's id."""
        path = folder / "plan.toml"
        path.write_text(toml_text(plan.model_dump(mode="json", exclude_none=True)))
        return str(self.service.ask("study", "submit", path, "--sites", sites, *more)["id"])

    def show(self, study: str) -> dict[str, Any]:
        """The study and its rounds."""
        found = self.service.get(f"/v1/studies/{study}", self.service.token).json()
        return dict(found)

    def events(self, study: str, *kinds: str) -> list[dict[str, Any]]:
        """What happened so far, read from the registry itself: whoever serves it may be dead."""
        path = self.service.folder / "state" / "registry.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as database:
            rows = database.execute(
                "SELECT kind, payload FROM events WHERE study = ? ORDER BY seq", (study,)
            ).fetchall()
        return [
            {"kind": kind, **json.loads(text)} for kind, text in rows if not kinds or kind in kinds
        ]

    def superlink(self, query: str, *values: object) -> list[Any]:
        """What stands in the SuperLink's database."""
        path = self.service.folder / "state" / "superlink.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as database:
            return database.execute(query, values).fetchall()

    def node(self, number: int) -> int:
        """A hospital's number at the SuperLink, as its database has it (signed)."""
        path = self.service.folder / "state" / "registry.db"
        query = "SELECT node_id FROM sites WHERE name = ? AND state = 'active'"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as database:
            ((text,),) = database.execute(query, (f"hospital {number}",)).fetchall()
        value = int(text)
        return value - 2**64 if value >= 2**63 else value

    def recovered(self) -> None:
        """Wait until everything runs again that an earlier test may have killed."""
        end = time.monotonic() + 300
        while not (self.service.ready() and all(map(self._online, self.daemons))):
            assert time.monotonic() < end, "not everything runs again"
            time.sleep(0.1)

    def _online(self, number: int) -> bool:
        with suppress(OSError, ValueError):
            link = json.loads((self.daemons[number].folder / "connector" / "link.json").read_text())
            return link["state"] == "online" and set(self.daemons[number].children()) == {
                "trainer",
                "connector",
            }
        return False

    def finish(self, study: str, seconds: float = 400.0) -> dict[str, Any]:
        """Wait for its end."""
        end = time.monotonic() + seconds
        while True:
            with suppress(Exception):
                found = self.show(study)
                if found["study"]["state"] in ("finished", "failed", "stopped"):
                    return found
            assert time.monotonic() < end, self.events(study)[-5:]
            time.sleep(0.1)

    def model(self, study: str, folder: Path) -> dict[str, Any]:
        """The delivered model's arrays."""
        from safetensors.numpy import load_file

        path = folder / "model.safetensors"
        path.unlink(missing_ok=True)
        self.service.ask("study", "model", study, "--out", path)
        return dict(load_file(path))

    def replay(self, study: str, plan: Plan, seed: int, folder: Path) -> Job:
        """Send a study's signed orders once more, as whoever kept them could."""
        config = load_config(self.service.folder / "server.toml")
        registry = open_registry(config)
        try:
            kept = registry.studies.get(study)
            members = {site.node_id or 0: site.name for site in registry.sites.list()}
        finally:
            registry.close()
        link = ControlClient(
            config.superlink_address, config.tls.ca.read_bytes(), config.control_secret.read_bytes()
        )
        session = RunSession(link, config.runtime_secret.read_bytes(), folder / "lock")
        job = Job(
            plan,
            to_arrays(build_model(plan, seed)),
            Arm(name="replayed", kind="federated"),
            seed,
            members={node: name for node, name in members.items() if name in kept.sites},
            study=study,
            sign=registry.sign,
        )
        try:
            StudyRun(job, session.grid).run()
        finally:
            session.close(complete=job.complete)
            link.close()
        return job

    def simulate(self, plan: Plan, folder: Path, seed: int, *numbers: int) -> Study:
        """The same plan, seed and cohorts on this machine."""
        name = plan.study.name
        known = "lungs" if plan.task.kind == "segmentation" else "chest"
        dataset = name if name == "real" else known
        hospitals = tuple(Hospital(self.daemons[number].config, dataset) for number in numbers)
        policy = hospitals[0].config  # the others have the same
        options = Options(data=None, out=folder, seed=seed, hospitals=hospitals, policy=policy)
        alone = Study(plan, options)
        alone.run()
        return alone

    def orders(self, number: int) -> int:
        """How many messages a hospital ever took."""
        link = json.loads((self.daemons[number].folder / "connector" / "link.json").read_text())
        return int(link["messages"])


@pytest.fixture(scope="session")
def federation(
    make_service: Callable[..., Any], new_daemon: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    """An aggregator that runs; hospitals come as tests need them."""
    network, disk = Network(), SmallDisk()
    service = make_service(network.address, prepare=disk.put_under)
    folder = tmp_path_factory.mktemp("federation")
    made = Federation(service, network, disk, folder, new_daemon)
    yield made
    for daemon in made.daemons.values():
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.stop()
    if service.process.poll() is None:
        service.stop()
    network.close()
    disk.close()
