"""IPv6 literals, time zones, and certificates near or after their end."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from live_federation import free_port, write_certificates

from fedward.connections import host_and_port
from fedward.errors import ConfigError, ServiceError
from fedward.flower.fleet_client import FleetClient, LinkDown
from fedward_client.config import ServerSection, config_from
from fedward_client.connector.connector import Connector
from fedward_client.doctor.link import network
from fedward_client.enrol import enrol
from fedward_server import service
from fedward_server.api.health import Health
from fedward_server.cli_profile import ApiClient, CliProfile
from fedward_server.config import ServerConfig, TlsSection, load_config
from fedward_server.listen import serve_health
from fedward_server.setup import SetupOptions, initialise

SITE = {
    "version": 1,
    "site": {"name": "north"},
    "datasets": {"chest": {"root": "data", "task": "classification", "classes": ["a", "b"]}},
}


@pytest.fixture
def server(tmp_path: Path) -> ServerConfig:
    """An aggregator's configuration, all on ``::1``."""
    made = initialise(tmp_path / "agg", SetupOptions(hosts=("::1",)))
    found = load_config(made.config)
    ports = SimpleNamespace(sites=free_port(), api=free_port(), health=free_port())
    sites = found.sites.model_copy(update={"address": "::1", "port": ports.sites})
    api = found.api.model_copy(
        update={"address": "::1", "port": ports.api, "health_port": ports.health}
    )
    return found.model_copy(update={"sites": sites, "api": api})


def site(policy: dict[str, Any] | None = None, address: str = "[::1]:9443") -> Any:
    link = {"address": address, "ca": "ca.pem"}
    return config_from(
        {**SITE, "server": link, "policy": policy or {}}, Path(), datasets_here=False
    )


@pytest.mark.parametrize(
    ("address", "written"),
    [("::1", "[::1]:80"), ("[2001:db8::1]", "[2001:db8::1]:80"), ("a.example", "a.example:80")],
)
def test_an_ipv6_address_stands_in_brackets(address: str, written: str) -> None:
    assert host_and_port(address, 80) == written


def test_an_aggregator_listens_and_is_found_on_ipv6(server: ServerConfig) -> None:
    assert server.superlink_address == f"[::1]:{server.sites.port}"
    assert server.api_url == f"https://[::1]:{server.api.port}"
    stop = threading.Event()
    found: Any = SimpleNamespace(ready=True)
    running = serve_health(server, found, stop)
    with socket.create_connection(("::1", server.api.health_port), 5):
        pass
    stop.set()
    running.stop(0)


def test_a_hospital_names_an_ipv6_aggregator_in_brackets(tmp_path: Path) -> None:
    assert site(address="[2001:db8::1]:9443").server.address == "[2001:db8::1]:9443"
    for wrong in ("::1:9443", "2001:db8::1:9443", "[not an address]:9443", "[::1:9443"):
        with pytest.raises(ConfigError, match=r"in brackets|pattern"):
            site(address=wrong)
    with pytest.raises(ConfigError, match=r"an IPv6 address as \[address\]:port"):
        enrol(tmp_path, "north", "::1:9443", b"")


def test_quiet_hours_follow_the_time_zone_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = site({"timezone": "Asia/Tokyo", "quiet_hours": ["07:00-18:00"]}).policy
    noon = datetime(2026, 1, 5, 12, 0)
    there = policy.local_time(noon)
    away = noon.astimezone().utcoffset()
    assert away is not None
    assert (there - noon).total_seconds() == 9 * 3600 - away.total_seconds()
    assert site({"quiet_hours": ["07:00-18:00"]}).policy.local_time(noon) == noon
    with pytest.raises(ConfigError, match=r"policy\.timezone: a time zone is one of IANA's"):
        site({"timezone": "Europe/Atlantis"})


def at(server: ServerConfig, folder: Path, days: int, begins: int = -3) -> Health:
    folder.mkdir()
    write_certificates(folder, days, begins)
    tls = TlsSection(certificate=folder / "server.pem", key=folder / "server.key", ca=server.tls.ca)
    config = server.model_copy(update={"tls": tls})
    nobody: Any = SimpleNamespace(studies=SimpleNamespace(list=list), nodes=list)
    return Health(config, nobody, nobody)


def test_the_aggregator_tells_weeks_before_that_its_certificate_ends(
    server: ServerConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()
    stop.set()
    with caplog.at_level(logging.WARNING, "fedward.server"):
        logging.getLogger("fedward").propagate = True
        service._tell_certificate(at(server, tmp_path / "later", 90), stop)
        assert not caplog.records
        soon = at(server, tmp_path / "soon", 12)
        service._tell_certificate(soon, stop)
    assert "the certificate ends in 11 days" in caplog.text
    assert "certificate" not in soon.find()
    ended = at(server, tmp_path / "ended", -1).find()["certificate"]
    assert ended.startswith("ended ") and "fedward-server certificate renew" in ended


def test_an_aggregator_whose_clock_is_a_day_behind_tells_it(
    server: ServerConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To such a clock a certificate that was made today begins tomorrow."""
    stop = threading.Event()
    stop.set()
    behind = at(server, tmp_path / "behind", 90, 1)
    with caplog.at_level(logging.WARNING, "fedward.server"):
        logging.getLogger("fedward").propagate = True
        service._tell_certificate(behind, stop)
    assert (
        "by this machine's clock the certificate begins in 24 hours; set the clock" in caplog.text
    )
    assert behind.find()["certificate"] == "begins in 24 hours by this clock; set it (NTP)"
    assert not behind.ready


def test_the_hospital_tells_weeks_before_too(tmp_path: Path) -> None:
    write_certificates(tmp_path, 90)
    section = ServerSection(address="[::1]:9", ca=tmp_path / "ca.pem", state=tmp_path / "state")
    key = ec.generate_private_key(ec.SECP384R1())
    connector = Connector("north", section, tmp_path / "s", key, "hidden", "1")
    # The authority of this test ends first, tomorrow.
    connector._note_certificate(None, (tmp_path / "ca.pem").read_bytes())
    assert connector._attachment.state.certificate_days == 0


@contextmanager
def listening(folder: Path) -> Iterator[str]:
    """Somebody who speaks TLS with the certificate of a folder, and nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as port:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    raw, _ = port.accept()
                    with suppress(OSError), context.wrap_socket(raw, server_side=True) as link:
                        link.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{port.getsockname()[1]}"


@pytest.mark.parametrize(
    ("days", "begins", "found", "fix"),
    [
        (90, 1, "is not valid yet by this machine's clock, ", "it is behind"),
        (-1, -3, "has expired by this machine's clock, ", "if it is ahead"),
    ],
    ids=["a day behind", "a day ahead"],
)
def test_a_clock_that_is_a_day_off_is_named_by_hospital_and_operator(
    server: ServerConfig, tmp_path: Path, days: int, begins: int, found: str, fix: str
) -> None:
    """What such a clock makes of a certificate is what one of another day is to a right clock."""
    write_certificates(tmp_path, days, begins)
    ca, key = tmp_path / "ca.pem", ec.generate_private_key(ec.SECP384R1())
    told = rf"valid, for its name.*{found}{datetime.now(UTC):%Y-%m}.*clock \(NTP\).*{fix}"
    with listening(tmp_path) as address:
        fleet = FleetClient(address, ca.read_bytes(), key, 1 << 20)
        with pytest.raises(LinkDown, match=told):
            fleet.activate()
        fleet.drop()
        section = ServerSection(address=address, ca=ca, state=tmp_path / "state")
        (line,) = [one for one in network(section) if one.name == "certificate"]
        assert line.status == "fail" and found in line.found and fix in line.fix
        client = ApiClient(CliProfile(f"https://{address}", "t", ca))
        with pytest.raises(ServiceError, match=told):
            client.call("GET", "/v1/sites")


def test_the_end_of_a_certificate_is_named_as_such(tmp_path: Path) -> None:
    write_certificates(tmp_path, -1)
    key = ec.generate_private_key(ec.SECP384R1())
    with listening(tmp_path) as address:
        fleet = FleetClient(address, (tmp_path / "ca.pem").read_bytes(), key, 1 << 20)
        with pytest.raises(LinkDown, match=r"certificate must be valid.*expired.*renew"):
            fleet.activate()
        fleet.drop()
