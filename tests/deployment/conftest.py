"""A real SuperLink over TLS behind its guard, and real hospitals."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from client.enrol import enrol
from server.cli import app as server_cli
from server.flower.superlink import LinkSettings

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_certificates(folder: Path, days: int = 1) -> None:
    """ca.pem, server.pem, server.key for 127.0.0.1, by hand; they end in so many days."""
    now = dt.datetime.now(dt.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])

    def build(
        subject: x509.Name, public: ec.EllipticCurvePublicKey, days: int = 1
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=3))
            .not_valid_after(now + dt.timedelta(days=days))
        )

    ca = build(issuer, ca_key.public_key()).add_extension(x509.BasicConstraints(True, None), True)
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    leaf = build(name, key.public_key(), days).add_extension(names, False)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "server.pem").write_bytes(leaf.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "server.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


@dataclass
class Superlink:
    """A SuperLink process that a test may kill and start again."""

    settings: LinkSettings
    home: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.settings.port}"

    @property
    def ca(self) -> bytes:
        return self.settings.ca.read_bytes()

    @property
    def control_secret(self) -> bytes:
        return self.settings.control_secret.read_bytes()

    @property
    def runtime_secret(self) -> bytes:
        return self.settings.runtime_secret.read_bytes()

    def start(self) -> None:
        environment = {**os.environ, "FLWR_HOME": str(self.home), "FLWR_TELEMETRY_ENABLED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.flower.superlink", *self.settings.command()],
            env=environment,
        )
        self._wait_until_ready()

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _wait_until_ready(self) -> None:
        for _ in range(4000):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.settings.port)).close()
                return
            assert self.process is not None
            assert self.process.poll() is None, "the SuperLink ended"
            time.sleep(0.05)
        raise AssertionError("the SuperLink does not come up")


def build_superlink(folder: Path, days: int) -> Superlink:
    write_certificates(folder, days)
    for name in ("control.secret", "runtime.secret"):
        (folder / name).write_text(secrets.token_hex(32))
    return Superlink(
        LinkSettings(
            host="127.0.0.1", port=free_port(), certificate=folder / "server.pem",
            key=folder / "server.key", ca=folder / "ca.pem", database=folder / "flower.db",
            control_secret=folder / "control.secret", runtime_secret=folder / "runtime.secret",
        ),
        folder / "flwr",
    )  # fmt: skip


@pytest.fixture(scope="module")
def make_superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Superlink]]:
    """Starts SuperLinks that end with the module."""
    made: list[Superlink] = []

    def build(days: int = 1) -> Superlink:
        made.append(build_superlink(tmp_path_factory.mktemp("superlink"), days))
        made[-1].start()
        return made[-1]

    yield build
    for one in made:
        if one.process and one.process.poll() is None:
            one.process.terminate()
            one.process.wait(20)


@pytest.fixture(scope="module")
def superlink(make_superlink: Callable[[], Superlink]) -> Superlink:
    """One that the tests of a module share."""
    return make_superlink()


@pytest.fixture
def new_key() -> Callable[[], tuple[ec.EllipticCurvePrivateKey, bytes]]:
    """A site's key and its public half as PEM."""

    def make() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return key, public

    return make


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What the processes of the tests start with."""
    return dict(ENVIRONMENT)


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
[trainer]
socket = "run/t.sock"
device = "cpu"
threads = 1
[datasets.chest]
root = "{root}"
format = "dicom"
task = "{task}"
classes = {classes}
[policy]
coordinators = ["{coordinator}"]
approval = "within-policy"
require_privacy = false
minimum_patients = 5
minimum_per_class = 0
minimum_count = 1
rounding = 9
{policy}
{rules}
[[policy.studies]]
match = "*"
dataset = "chest"
"""


@dataclass
class Daemon:
    """A hospital: its folder, and its real processes."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    within: list[str] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "site.toml"

    @property
    def public_key(self) -> bytes:
        return (self.folder / "connector" / "site.pub").read_bytes()

    def start(self) -> None:
        log = (self.folder / "daemon.log").open("ab")
        self.process = subprocess.Popen(
            [*self.within, sys.executable, "-m", "client.cli", "run", "--config", str(self.config)],
            env=ENVIRONMENT, stdout=log, stderr=log,
        )  # fmt: skip
        log.close()

    def call(self, *words: str) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-m", "client.cli", *words, "--config", str(self.config), "--json"],
            env=ENVIRONMENT, text=True, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    def children(self) -> dict[str, int]:
        """Process ids of trainer and connector."""
        assert self.process is not None
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"client.cli" in words:
                    found[words[words.index(b"client.cli") + 1].decode()] = int(path.name)
        return found

    def kill(self, which: str) -> None:
        os.kill(self.children()[which], signal.SIGKILL)

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(90)

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text()


@pytest.fixture(scope="session")
def new_daemon() -> type[Daemon]:
    """A hospital of a name and a folder."""
    return Daemon


@pytest.fixture(scope="session")
def hospital_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three synthetic hospitals as DICOM files, for classification and for segmentation."""
    from simulation.cohort import write_cohort

    found = {}
    for kind in ("classification", "segmentation"):
        folder = tmp_path_factory.mktemp(kind)
        write_cohort(folder, 0, kind, 20, 3)
        found[kind] = folder
    return found


@pytest.fixture(scope="module")
def make_daemon(
    tmp_path_factory: pytest.TempPathFactory, hospital_data: dict[str, Path]
) -> Iterator[Callable[..., Daemon]]:
    """Builds a hospital that is enrolled as far as it can do so itself, with a frozen cohort."""
    made: list[Daemon] = []
    tmp_path = tmp_path_factory.mktemp("hospitals")

    def build(
        number: int,
        address: str,
        ca: bytes,
        coordinator: str,
        policy: str = "",
        task: str = "classification",
        rules: str = "",
    ) -> Daemon:
        daemon = Daemon(f"hospital {number}", tmp_path / f"h{number}")
        enrol(daemon.folder, daemon.name, address, ca)
        classes = '["clear", "opacity"]' if task == "classification" else '["lung"]'
        daemon.config.write_text(
            SITE.format(
                name=daemon.name, address=address, coordinator=coordinator, policy=policy,
                task=task, classes=classes, rules=rules,
                root=hospital_data[task] / f"hospital-{number}",
            )
        )  # fmt: skip
        frozen = daemon.call("data", "freeze", "chest")
        assert "error" not in frozen, frozen
        made.append(daemon)
        return daemon

    yield build
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.stop()


def wait_until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.05)


class Service:
    """``fedward-server`` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.token = self.coordinator = ""
        self.api_port = self.sites_port = 0

    @property
    def config(self) -> Path:
        return self.folder / "server.toml"

    def call(self, *words: object, code: int = 0) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "server.cli", *map(str, words), "--json"],
            env=ENVIRONMENT | {"FEDWARD_SERVER": str(self.config)}, text=True,
            capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def ask(self, *words: object) -> dict[str, Any]:
        """The same in this process, where the command line itself is not what is tested."""
        environment = {"FEDWARD_SERVER": str(self.config)}
        done = CliRunner().invoke(server_cli, [*map(str, words), "--json"], env=environment)
        assert done.exit_code == 0, (words, done.output)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def start(self) -> None:
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "run", "--config", str(self.config)],
            env=ENVIRONMENT, stdout=log, stderr=log,
        )  # fmt: skip
        log.close()

    def ready(self) -> bool:
        try:
            return self.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def get(self, path: str, token: str = "") -> httpx.Response:
        context = ssl.create_default_context(cafile=str(self.folder / "tls" / "ca.crt"))
        with httpx.Client(verify=context, timeout=300.0) as client:
            return client.get(
                f"https://127.0.0.1:{self.api_port}{path}",
                headers={"Authorization": f"Bearer {token}"} if token else {},
            )

    def processes(self) -> dict[str, int]:
        """Children and grandchildren by their module."""
        assert self.process is not None
        parents, words = {}, {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                number = int(path.name)
                parents[number] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                words[number] = (path / "cmdline").read_bytes().decode().split("\0")
            except (OSError, ValueError):
                continue
        found = {}
        for number, line in words.items():
            above = {parents[number], parents.get(parents[number], 0)}
            if self.process.pid in above and "-m" in line:
                found[line[line.index("-m") + 1]] = number
        return found

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(120)


@pytest.fixture(scope="session")
def make_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    """Starts aggregators; further hosts are names of their certificates."""
    made: list[Service] = []

    def build(*hosts: str, prepare: Callable[[Path], None] = lambda folder: None) -> Service:
        service = Service(tmp_path_factory.mktemp("aggregator") / "agg")
        named = [part for host in hosts for part in ("--host", host)]
        told = service.call("init", service.folder, *named)
        service.token, service.coordinator = told["token"], told["coordinator"]
        service.sites_port, service.api_port, health = (free_port() for _ in range(3))
        text = service.config.read_text()
        for old, port in ((9443, service.sites_port), (9444, service.api_port), (9445, health)):
            text = text.replace(str(old), str(port))
        service.config.write_text(
            text.replace("requests_per_minute = 600", "requests_per_minute = 100000")
        )
        prepare(service.folder)
        service.start()
        made.append(service)
        wait_until(service.ready)
        return service

    yield build
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.stop()


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    return wait_until
