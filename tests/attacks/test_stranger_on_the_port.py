"""A stranger on the network against the ports of a running aggregator.

The attacker knows the addresses and the certificate, holds no key and no token, and writes raw
bytes. Each attack is bounded in count and size, so that what the aggregator holds, computes or
writes shows in its figures. While an attack stands, an enrolled hospital and an operator are
served.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sqlite3
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedward.flower.fleet_client import FleetClient
from fedward.flower.framing import PARTS_HEADER
from fedward_server.config import load_config

pytestmark = pytest.mark.integration
MIB = 1 << 20
SECONDS = 6
PER_NETWORK = 24
LIMITS = {
    "unauthenticated_connections": 48,
    "unauthenticated_connections_per_network": PER_NETWORK,
    "unauthenticated_seconds": SECONDS,
    "failures_per_minute": 5,
}
# Both ports of the service that speak HTTP: how they are called, and whose process answers.
HTTP_PORTS = {"fleet": "fedward.flower.superlink", "api": "fedward_server.service"}


@dataclass
class Target:
    """An aggregator, seen from outside, and the figures of its processes from inside."""

    service: Any
    fleet: FleetClient

    def port(self, name: str) -> int:
        return int(self.service.sites_port if name == "fleet" else self.service.api_port)

    def process(self, name: str) -> int:
        return int(self.service.processes()[HTTP_PORTS[name]])

    def resident(self, name: str) -> float:
        """MiB of memory of the process behind a port."""
        pages = Path(f"/proc/{self.process(name)}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / MIB

    def processor_seconds(self, name: str) -> float:
        """Processor time of the process behind a port, since its start."""
        fields = Path(f"/proc/{self.process(name)}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def dial(self, name: str, tls: bool = True) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self.port(name)), timeout=30)
        if not tls:
            return plain
        context = ssl.create_default_context(cafile=str(self.service.folder / "tls" / "ca.crt"))
        return context.wrap_socket(plain, server_hostname="127.0.0.1")

    def serves(self) -> None:
        """The hospital and the operator get their answers, now and on new connections."""
        self.fleet.beat()
        again = connect(self.service, self.fleet._signing._key)  # its connections are new
        again.node = self.fleet.node
        again.beat()
        again._client.close()
        assert self.service.get("/v1/studies", self.service.token).status_code == 200


def connect(service: Any, key: ec.EllipticCurvePrivateKey) -> FleetClient:
    ca = (service.folder / "tls" / "ca.crt").read_bytes()
    return FleetClient(f"127.0.0.1:{service.sites_port}", ca, key, 1 << 30)


@pytest.fixture(scope="module")
def target(make_service: Callable[..., Any], tmp_path_factory: Any) -> Iterator[Target]:
    """An aggregator with one enrolled hospital, and small limits."""

    def prepare(folder: Path) -> None:
        path = folder / "server.toml"
        text = path.read_text()
        for key, value in LIMITS.items():
            text, found = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
            assert found == 1, key
        path.write_text(text)

    service = make_service(prepare=prepare)
    key = ec.generate_private_key(ec.SECP384R1())
    public = tmp_path_factory.mktemp("key") / "site.pub"
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    service.call("site", "add", "north", public)
    fleet = connect(service, key)
    fleet.activate()
    yield Target(service, fleet)
    fleet._client.close()
    service.stop()


def head(method: str, path: str, *more: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: aggregator", *more, "", ""]).encode()


def sent(link: socket.socket, content: bytes) -> bool:
    """Whether a connection took all of it."""
    try:
        link.sendall(content)
    except OSError:
        return False
    return True


def closed(link: socket.socket, seconds: float) -> bool:
    """Whether the aggregator ends a connection within a time; answers on it are read away."""
    end = time.monotonic() + seconds
    link.setblocking(False)
    while time.monotonic() < end:
        try:
            if link.recv(65536) == b"":
                return True
        except (BlockingIOError, ssl.SSLWantReadError):
            time.sleep(0.02)
        except OSError:
            return True
    return False


def answer(link: socket.socket, seconds: float = 20.0) -> int:
    """The status that comes back; 0 for none."""
    link.settimeout(seconds)
    try:
        line = link.recv(65536).split(b" ")
    except OSError:
        return 0
    return int(line[1]) if len(line) > 1 else 0


CHUNK = b"%x\r\n%s\r\n" % (MIB, bytes(MIB))
FRAME = (40 * MIB).to_bytes(8, "big")
BODIES = {
    "a call's body": ("activate-node", (), b""),
    "a frame that does not end": (
        "push-messages",
        (f"{PARTS_HEADER}: 1",),
        b"8\r\n" + FRAME + b"\r\n",
    ),
}


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_of_strangers_are_not_held(target: Target, kind: str) -> None:
    """25 connections, each with 8 MiB of a body that does not end."""
    path, headers, first = BODIES[kind]
    kinds = (f"content-type: {PROTOBUF_MEDIA_TYPE}", "transfer-encoding: chunked")
    before, links = target.resident("fleet"), list[socket.socket]()
    for _ in range(25):
        link = target.dial("fleet")
        links.append(link)
        fine = sent(link, head("POST", f"/v1/fleet/{path}", *kinds, *headers) + first)
        for _ in range(8):
            fine = fine and sent(link, CHUNK)
    time.sleep(0.5)
    during = target.resident("fleet")
    target.serves()
    for link in links:
        link.close()
    print(f"{kind}: {before:.0f} MiB before, {during:.0f} during, {target.resident('fleet'):.0f}")
    assert during - before < 40
    assert target.resident("fleet") - before < 40


def test_a_stranger_is_answered_before_its_body_is_sent(target: Target) -> None:
    """The API answers by the token alone; whoever has none sends nothing more."""
    said = ("content-type: application/json", "content-length: 1900000", "expect: 100-continue")
    for name, path in (("api", "/v1/studies"), ("fleet", "/v1/fleet/push-messages")):
        with target.dial(name) as link:
            assert sent(link, head("POST", path, *said))
            assert answer(link, 5) == 401, name
            assert closed(link, 5)


@pytest.mark.parametrize("name", HTTP_PORTS)
@pytest.mark.parametrize("kind", ["value", "address", "count"])
def test_headers_are_small(target: Target, name: str, kind: str) -> None:
    """24 MiB of a header, of the address or of many headers; then 400 single bytes of it."""
    begin, large, small = {
        "value": (b"GET /healthz HTTP/1.1\r\nx: ", bytes(b"a" * MIB), b"a"),
        "address": (b"GET /", bytes(b"a" * MIB), b"a"),
        "count": (b"GET /healthz HTTP/1.1\r\n", b"a: b\r\n" * 20_000, b"a: b\r\n"),
    }[kind]
    used, held, pieces = target.processor_seconds(name), target.resident(name), 0
    with target.dial(name) as link:
        taken = sent(link, begin) and all(sent(link, large) for _ in range(24))
        while taken and pieces < 400:
            time.sleep(0.002)
            taken, pieces = sent(link, small), pieces + 1
        told = answer(link, 2)
        held = target.resident(name) - held
        assert closed(link, 10)
    used = target.processor_seconds(name) - used
    print(f"{name}, {kind}: {used:.2f} s of a processor, {held:.0f} MiB, {pieces} pieces, {told}")
    assert told == (400 if kind == "count" else 431) or not taken
    assert used < 0.3 and held < 10
    target.serves()


@pytest.mark.parametrize("name", HTTP_PORTS)
def test_a_header_above_the_bound_is_told(target: Target, name: str) -> None:
    with target.dial(name) as link:
        assert sent(link, b"GET /health HTTP/1.1\r\nx: " + b"a" * (20 << 10))
        assert answer(link, 5) == 431
        assert closed(link, 5)


@pytest.mark.parametrize("name", HTTP_PORTS)
def test_requests_in_a_row_without_waiting_are_not_held(target: Target, name: str) -> None:
    """Pipelining: 60,000 requests at once on one connection."""
    before, got = target.resident(name), bytearray()
    with target.dial(name) as link:
        one = head("POST", "/v1/fleet/pull-messages") if name == "fleet" else head("GET", "/readyz")
        link.settimeout(2)
        sent(link, one * 60_000)
        during = target.resident(name)
        with contextlib.suppress(OSError):
            while piece := link.recv(65536):
                got += piece
    answers = got.count(b"HTTP/1.1 ")
    print(f"{name}: {before:.0f} MiB before, {during:.0f} during, {answers} answers")
    assert answers <= 2
    assert during - before < 10


@pytest.mark.parametrize("name", HTTP_PORTS)
def test_connections_of_strangers_are_bounded_in_number_and_in_time(
    target: Target, name: str
) -> None:
    """60 connections: without a handshake, without a request, with a byte of one now and then."""
    links = [target.dial(name, tls=number % 3 > 0) for number in range(60)]
    slow = links[2::3]
    for link in slow:
        sent(link, b"GET /healthz HTTP/1.1\r\nx: a")
    target.serves()
    still = [link for link in links if not closed(link, 0.02)]
    print(f"{name}: {len(still)} of 60 still there")
    assert len(still) <= PER_NETWORK
    began = time.monotonic()
    while still and time.monotonic() - began < 4 * SECONDS:
        for link in still:
            link.settimeout(0.2)
            assert link not in slow or sent(link, b"a") or closed(link, 1)
        still = [link for link in still if not closed(link, 0.02)]
    print(f"{name}: {len(still)} after {time.monotonic() - began:.1f} s")
    for link in links:
        link.close()
    assert not still


def audit(target: Target) -> list[tuple[str, str, str]]:
    config = load_config(target.service.config)
    with contextlib.closing(sqlite3.connect(config.server.state / "registry.db")) as database:
        return list(database.execute("SELECT actor, address, action FROM audit"))


def test_calls_without_a_token_are_counted_and_not_written_one_by_one(target: Target) -> None:
    """60 calls with a path of 2 kB each."""
    before, told = len(audit(target)), set[int]()
    for batch in range(3):
        links = [target.dial("api") for _ in range(20)]
        for number, link in enumerate(links):
            path = f"/v1/secret-{batch}-{number}-" + "x" * 2000
            assert sent(link, head("POST", path, "content-length: 0"))
        told |= {answer(link) for link in links}
        for link in links:
            link.close()
    rows = audit(target)
    print(f"{len(rows) - before} rows for 60 calls")
    assert len(rows) - before <= 1
    assert "secret" not in json.dumps(rows)
    assert told == {401, 429}


def test_wrong_tokens_do_not_lock_out_a_valid_one(target: Target) -> None:
    """20 guesses from the address of an operator, also with the visible half of its token."""
    base = f"https://127.0.0.1:{target.service.api_port}"
    context = ssl.create_default_context(cafile=str(target.service.folder / "tls" / "ca.crt"))
    prefix = target.service.token.rpartition("_")[0][:13]
    with httpx.Client(base_url=base, verify=context, timeout=60) as client:

        def guess(number: int) -> int:
            text = f"{prefix}_{number:043d}" if number % 2 else f"fw_{number:010x}_{number:043d}"
            headers = {"Authorization": f"Bearer {text}"}
            return client.get("/v1/studies", headers=headers).status_code

        with ThreadPoolExecutor(10) as pool:
            told = list(pool.map(guess, range(20)))
    print({code: told.count(code) for code in set(told)})
    assert set(told) == {401, 429}
    answers = [target.service.get("/v1/studies", target.service.token) for _ in range(5)]
    assert [one.status_code for one in answers] == [200] * 5


def test_a_signature_of_a_key_that_is_not_enrolled_opens_nothing(target: Target) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    stamp = now().isoformat()
    enrolled = public_key_to_bytes(target.fleet._signing._key.public_key())
    for public in (public_key_to_bytes(key.public_key()), enrolled, b"no key", b"x" * 4000):
        signed = b64encode(sign_message(key, stamp.encode("ascii"))).decode()
        with target.dial("fleet") as link:
            assert sent(
                link,
                head(
                    "POST",
                    "/v1/fleet/push-messages",
                    "content-length: 100000000",
                    f"flwr-public-key: {b64encode(public).decode()}",
                    f"flwr-signature: {signed}",
                    f"flwr-timestamp: {stamp}",
                ),
            )
            assert answer(link, 5) == 401


def test_the_health_port_holds_little(target: Target) -> None:
    """Large questions are refused, and connections bounded, while monitoring is answered."""
    port = load_config(target.service.config).api.health_port
    ca = (target.service.folder / "tls" / "ca.crt").read_bytes()
    links = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    with grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(ca)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1
        with pytest.raises(grpc.RpcError) as refused:
            stub.Check(health_pb2.HealthCheckRequest(service="x" * 100_000), timeout=30)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    # With more than it has room for, the port closes what is too many.
    links += [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    still, end = links, time.monotonic() + 30
    while len(still) > 64 and time.monotonic() < end:
        still = [link for link in still if not closed(link, 0.01)]
    for link in links:
        link.close()
    assert len(still) <= 64
