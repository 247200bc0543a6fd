"""The doctor: every line that may fail is made to fail, and none tells a secret."""

from __future__ import annotations

import datetime as dt
import http.server
import ipaddress
import os
import pwd
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedward.errors import ConfigError, ProtocolError
from fedward_client.config import SiteConfig, load_config
from fedward_client.doctor import examine, link, machine, worst
from fedward_client.doctor.line import Line
from fedward_client.enrol import enrol
from fedward_client.policy.settings import PolicySection

Changes = dict[str, Any]
SITE = """
version = 1
[site]
name = "north"
[server]
address = "{address}"
ca = "aggregator-ca.pem"
{server}
[trainer]
{trainer}
[datasets.chest]
root = "images"
task = "classification"
classes = ["no", "yes"]
"""


def certificates(folder: Path, days: int = 90, name: str = "127.0.0.1") -> bytes:
    """A chain for a name; gives the authority's PEM."""
    now = dt.datetime.now(dt.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in "as"]

    def sign(which: int, end: dt.datetime, extension: x509.ExtensionType) -> x509.Certificate:
        made = x509.CertificateBuilder(
            names[0],
            names[which],
            keys[which].public_key(),
            which + 1,
            now - dt.timedelta(days=400),
            end,
        )
        return made.add_extension(extension, which == 0).sign(keys[0], hashes.SHA256())

    address = x509.IPAddress(ipaddress.ip_address(name))
    ca = sign(0, now + dt.timedelta(days=900), x509.BasicConstraints(True, None))
    leaf = sign(1, now + dt.timedelta(days=days, hours=1), x509.SubjectAlternativeName([address]))
    pem = serialization.Encoding.PEM
    (folder / "leaf.pem").write_bytes(leaf.public_bytes(pem))
    (folder / "leaf.key").write_bytes(
        keys[1].private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return ca.public_bytes(pem)


@contextmanager
def aggregator(folder: Path, hours: float = 0.0, newest: str = "TLSv1_3") -> Iterator[str]:
    """Something that speaks TLS and tells a time; gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            moment = dt.datetime.now(dt.UTC) + dt.timedelta(hours=hours)
            return moment.strftime("%a, %d %b %Y %H:%M:%S GMT")

        def log_message(self, *args: Any) -> None: ...

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *args: Any) -> None: ...

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "leaf.pem", folder / "leaf.key")
    if newest != "TLSv1_3":
        with pytest.warns(DeprecationWarning):
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion[newest]
        context.set_ciphers("ALL:@SECLEVEL=0")
    with Quiet(("127.0.0.1", 0), Handler) as made:
        made.socket = context.wrap_socket(made.socket, server_side=True)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{made.server_port}"
        made.shutdown()


@contextmanager
def proxy(answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that lets everybody through, or nobody; gives its address and what it was asked."""
    asked: list[bytes] = []

    def pump(a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while part := a.recv(1 << 16):
                b.sendall(part)
        for one in (a, b):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                end, _ = listener.accept()
                head = b""
                while b"\r\n\r\n" not in head:
                    head += end.recv(1)
                asked.append(head)
                end.sendall(answer)
                if b" 200 " not in answer:
                    end.close()
                    continue
                host, _, port = head.split()[1].decode().rpartition(":")
                other = socket.create_connection((host, int(port)))
                for pair in ((end, other), (other, end)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", asked


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SiteConfig]:
    """Builds an enrolled site's configuration."""

    def build(
        address: str = "127.0.0.1:9",
        ca: bytes = b"",
        server: str = "",
        trainer: str = "",
        more: str = "",
    ) -> SiteConfig:
        folder = tmp_path / "site"
        if not folder.exists():
            enrol(folder, "north", address, ca or certificates(tmp_path))
        text = SITE.format(address=address, server=server, trainer=trainer) + more
        (folder / "site.toml").write_text(text)
        return load_config(folder / "site.toml", datasets_here=False)

    return build


def lines_of(found: Any) -> dict[str, Line]:
    lines = {line.name: line for line in found}
    for line in lines.values():
        assert line.status == "pass" or line.fix, line  # what to do next
    return lines


def ways(config: SiteConfig) -> dict[str, Line]:
    assert config.server is not None
    return lines_of(link.network(config.server))


def test_a_way_that_is_right_passes(make: Callable[..., SiteConfig], tmp_path: Path) -> None:
    ca = certificates(tmp_path)
    with aggregator(tmp_path) as address:
        found = ways(make(address, ca))
    assert {name: line.status for name, line in found.items()} == dict.fromkeys(
        ("name", "proxy", "certificate", "clock"), "pass"
    )
    assert "TLSv1.3, valid for 90 days" in found["certificate"].found


def test_names_and_firewalls(make: Callable[..., SiteConfig]) -> None:
    assert ways(make("aggregator.invalid:9443"))["name"].status == "fail"
    refused = ways(make("127.0.0.1:9"))["connection"]
    assert (refused.status, refused.found) == ("fail", "Connection refused")


@pytest.mark.parametrize(
    ("days", "name", "status", "words"),
    [
        (5, "127.0.0.1", "warn", "ends in 5 days"),
        (-3, "127.0.0.1", "fail", "expired"),
        (90, "192.0.2.7", "fail", "mismatch"),
    ],
)
def test_a_certificate_that_ends_or_is_of_another(
    make: Callable[..., SiteConfig], tmp_path: Path, days: int, name: str, status: str, words: str
) -> None:
    ca = certificates(tmp_path, days, name)
    with aggregator(tmp_path) as address:
        line = ways(make(address, ca))["certificate"]
    assert line.status == status
    assert words in line.found


def test_an_authority_of_others_and_one_that_is_none(
    make: Callable[..., SiteConfig], tmp_path: Path
) -> None:
    certificates(tmp_path)
    (tmp_path / "other").mkdir()
    other = certificates(tmp_path / "other")
    with aggregator(tmp_path) as address:
        config = make(address, other)
        assert ways(config)["certificate"].status == "fail"
        with aggregator(tmp_path, newest="TLSv1_1") as old:
            line = ways(make(old))["certificate"]
            assert (line.status, line.found) == ("fail", "no TLS 1.2 or newer is spoken there")
        assert config.server is not None
        for content in ("no certificate", ""):
            config.server.ca.write_text(content)
            assert ways(config)["authority"].status == "fail"
        config.server.ca.unlink()
        assert ways(config)["authority"].status == "fail"


def test_clocks(make: Callable[..., SiteConfig], tmp_path: Path) -> None:
    ca = certificates(tmp_path)
    with aggregator(tmp_path, hours=-2) as address:
        line = ways(make(address, ca))["clock"]
    assert line.status == "warn"
    assert 7190 < int(line.found.split()[0]) < 7210


def test_proxies(make: Callable[..., SiteConfig], tmp_path: Path) -> None:
    ca = certificates(tmp_path)
    with aggregator(tmp_path) as address:
        with proxy() as (place, asked):
            secret = f'proxy = "http://officer:hunter2@{place}"'
            found = ways(make(address, ca, server=secret))
            assert [found[name].status for name in ("proxy", "certificate", "clock")] == [
                "pass",
                "pass",
                "pass",
            ]
            assert all(b"Basic b2ZmaWNlcjpodW50ZXIy" in one for one in asked)
            assert "hunter2" not in str(found)
        for answer in (b"HTTP/1.1 403 Forbidden\r\n\r\n", b""):
            with proxy(answer) as (place, _):
                line = ways(make(address, ca, server=f'proxy = "http://{place}"'))["proxy"]
                assert line.status == "fail"
        gone = ways(make(address, ca, server='proxy = "http://proxy.invalid:3128"'))
        assert gone["name"].status == "fail"
        assert "proxy" in gone["name"].found


@pytest.mark.parametrize("place", ["localhost:abc", "[::1", "hunter2@:3128", "host:0", "a b:1"])
def test_proxies_that_are_none(
    make: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with pytest.raises(
        ConfigError, match=r"server\.proxy: a proxy is written http://host:port"
    ) as no:
        make(server=f'proxy = "http://officer:{place}"')
    assert "officer" not in str(no.value)
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:abc")
    line = ways(make())["proxy"]
    assert (line.status, line.fix) == ("fail", "Mend HTTPS_PROXY of this user")


def test_what_answers_in_the_aggregator_s_place_is_a_line_too(
    make: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed(*_: object) -> int:
        raise ProtocolError("an answer must not be compressed")

    monkeypatch.setattr(link.FleetClient, "activate", packed)
    config = make()
    assert config.server is not None
    line = lines_of(link.enrolment(config.server))["enrolment"]
    assert (line.status, line.found) == ("fail", "an answer must not be compressed")


def test_a_key_that_is_not_there_open_or_unknown(
    make: Callable[..., SiteConfig], tmp_path: Path
) -> None:
    config = make()
    assert config.server is not None
    key = config.server.state / "site.key"

    def found() -> dict[str, Line]:
        assert config.server is not None
        return lines_of(link.enrolment(config.server))

    assert (found()["key"].status, found()["enrolment"].status) == ("pass", "fail")
    key.chmod(0o644)
    assert "owner only" in found()["key"].found
    key.unlink()
    assert found()["key"].status == "fail"


def test_disk_and_memory(make: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    for free, status in ((100 << 30, "pass"), (1 << 30, "warn"), (1 << 20, "fail")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert machine.disk(config).status == status
    for free, status in ((64 << 30, "pass"), (1 << 30, "warn")):
        monkeypatch.setattr(machine, "_available", lambda free=free: free)
        assert machine.memory().status == status


def test_devices(make: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(machine.device(make(trainer='device = "cpu"')))["device"].status == "warn"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = make(trainer='device = "cuda:7"')
    assert lines_of(machine.device(config))["device"].status == "fail"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for free, status in ((20, "pass"), (2, "warn")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, f=free: (f << 30, 24 << 30))
        line = lines_of(machine.device(config))["device"]
        assert (line.status, f"24 GiB, {free} of them free" in line.found) == (status, True)


@pytest.mark.integration
def test_walls(make: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    assert {line.status for line in machine.walls(config)} == {"pass"}
    # On a kernel that makes no namespaces, both fail; a network that is allowed is
    # a warning, and so is a connector that could change the code.
    no = "import fedward_client.daemon.isolation as i\ndef no(*a): raise OSError\ni._unshare = no\n"
    wall = machine._wall
    monkeypatch.setattr(
        machine, "_wall", lambda name, code, **more: wall(name, f"{no}{code}", **more)
    )
    assert [line.status for line in machine.walls(config)] == ["fail", "fail", "warn"]
    allowed = make(trainer="allow_networked_trainer = true")
    assert {line.found for line in machine.walls(allowed)} == {
        "the kernel makes no namespaces for this user"
    }
    assert [line.status for line in machine.walls(allowed)] == ["warn", "fail", "warn"]


def test_a_kernel_that_cannot_make_all_read_only_is_told_apart(
    make: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = (
        "import fedward_client.daemon.isolation as i\ndef no(*a): raise OSError\n"
        "i._set_attributes = no\n"
    )
    wall = machine._wall
    monkeypatch.setattr(
        machine, "_wall", lambda name, code, **more: wall(name, f"{old}{code}", **more)
    )
    line = lines_of(machine.walls(make()))["connector and code"]
    assert line.status == "warn"
    assert line.found in ("1 of 2 places can be changed", "2 of 2 places can be changed")


def test_who_the_connector_will_be(
    make: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lines_of(machine.connector_user(make(server='user = "fedward-nobody"')))
    assert found["connector's user"].status == "fail"
    assert not list(machine.connector_user(make(server='user = "root"')))
    monkeypatch.setattr(machine.os, "geteuid", lambda: 0)
    assert lines_of(machine.connector_user(make()))["connector's user"].status == "warn"
    monkeypatch.setattr(machine.os, "geteuid", lambda: 1000)
    assert not list(machine.connector_user(make()))


def test_datasets(make: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def line() -> Line:
        return lines_of(machine.datasets(make()))["dataset chest"]

    config = make()
    root = config.datasets["chest"].root
    root.chmod(0o750)
    assert (line().status, "no cohort" in line().found) == ("warn", True)
    monkeypatch.setattr("fedward_client.cohort.open.cohort_path", lambda *_: root)
    assert line().status == "pass"
    root.rmdir()
    assert line().status == "fail"


def test_a_dataset_that_others_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fedward-"))
    try:
        folder.chmod(0o755)
        enrol(folder / "site", "north", "127.0.0.1:9", certificates(folder))
        for user, status in (("", "warn"), ('user = "nobody"', "fail")):
            if user and (os.geteuid() != 0 or not pwd.getpwnam("nobody")):
                continue
            text = SITE.format(address="127.0.0.1:9", server=user, trainer="")
            (folder / "site" / "site.toml").write_text(text)
            config = load_config(folder / "site" / "site.toml")
            assert [line.status for line in machine.datasets(config)] == [status]
    finally:
        shutil.rmtree(folder)


SANE: Changes = {
    "studies": [{"match": "a", "dataset": "chest"}],
    "coordinators": ["a" * 64],
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"studies": []}, "serves no study"),
        ({"coordinators": []}, "accepts no coordinator"),
        ({"coordinators": [], "any_coordinator": True}, "accepts every coordinator"),
        ({"require_privacy": False}, "without privacy"),
        ({"studies": [{**SANE["studies"][0], "require_privacy": False}]}, "without privacy"),
        ({"max_epsilon_per_cohort": 50.0}, "50"),
        ({"max_delta": 0.01}, "δ = 0.01"),
        ({"studies": [{**SANE["studies"][0], "max_delta": 0.01}]}, "δ = 0.01"),
        ({"minimum_count": 1}, "single image"),
    ],
)
def test_policies(make: Callable[..., SiteConfig], changes: Changes, words: str) -> None:
    config = make()

    def found(policy: Changes) -> list[Line]:
        own = PolicySection.model_validate(policy)
        return list(machine.policy(config.model_copy(update={"policy": own})))

    assert [line.status for line in found(SANE)] == ["pass"]
    (line,) = found({**SANE, **changes})
    assert (line.status, words in line.found, bool(line.fix)) == ("warn", True, True)


def test_the_whole_and_without_a_server(
    make: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedward_client.doctor.walls", lambda _: iter(()))
    config = make(server='proxy = "http://officer:hunter2@proxy.invalid:1"')
    lines = list(examine(config))
    text = str(lines)
    for secret in ("hunter2", "PRIVATE KEY", str(config.site.state.parent)):
        assert secret not in text
    assert worst(lines) == "fail"
    assert worst(line for line in lines if line.status == "pass") == "pass"
    alone = config.model_copy(update={"server": None})
    assert next(iter(examine(alone))).status == "fail"
