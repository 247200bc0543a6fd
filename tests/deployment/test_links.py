"""The connector's link through everything that a network does, at a real SuperLink over TLS."""

from __future__ import annotations

import gzip
import http.server
import json
import signal
import socket
import ssl
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import warm_start
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesResponse

from fedward.errors import ConfigError, ProtocolError
from fedward.flower import fleet_client
from fedward.flower.control_client import ControlClient
from fedward.flower.fleet_client import FleetClient, LinkDown
from fedward.flower.server_session import RunSession
from fedward.https import proxy_of, use_proxy
from fedward.tensors import pack
from fedward_client.config import ServerSection
from fedward_client.connector import connector
from fedward_client.connector.connector import Connector
from fedward_client.enrol import enrol
from fedward_client.link.messages import TrainerMessage
from fedward_client.link.service import serve

pytestmark = pytest.mark.integration
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def until(until: Make) -> Callable[..., None]:
    """Waits for longer than elsewhere: on a busy machine a trainer takes a while to start."""
    return lambda condition, seconds=180.0: until(condition, seconds)


class Wire:
    """A cable that a test may pull: relays to a place, or wherever a CONNECT request says."""

    def __init__(self, target: str = "") -> None:
        self.target, self.connects, self.silent = target, list[str](), False
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def pull(self) -> None:
        """Cut every connection, and let nobody in."""
        _shut(self._listener)
        for end in self._ends:
            _shut(end)

    def plug_in(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                end, _ = listener.accept()
                self._ends.append(end)
                if not self.silent:
                    threading.Thread(target=self._join, args=(end,), daemon=True).start()

    def _join(self, end: socket.socket) -> None:
        with suppress(OSError):
            other = self._open(end)
            self._ends.append(other)
            threading.Thread(target=_pump, args=(other, end), daemon=True).start()
            _pump(end, other)

    def _open(self, end: socket.socket) -> socket.socket:
        place = self.target
        if not place:
            head = b""
            while b"\r\n\r\n" not in head:
                head += end.recv(1)
            word, place, _ = head.split(b"\r\n")[0].decode().split(" ")
            assert word == "CONNECT"
            self.connects.append(place)
        host, _, port = place.rpartition(":")
        other = socket.create_connection((host, int(port)))
        if not self.target:
            end.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        return other


def _pump(from_: socket.socket, to: socket.socket) -> None:
    with suppress(OSError):
        while part := from_.recv(1 << 16):
            to.sendall(part)
    for end in (from_, to):
        _shut(end)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


class Desk:
    """A trainer's desk that answers when it is let."""

    def __init__(self) -> None:
        self.free, self.asked = threading.Event(), list[str]()
        self.free.set()

    def answer(self, what: str, packet: TrainerMessage) -> TrainerMessage:
        self.asked.append(str(packet.record.get("x", packet.record)))
        assert self.free.wait(60)
        if "unreadable" in packet.record:
            return TrainerMessage(
                "refusal", {"site": "north", "round": 0, "rule": "r", "version": 1}
            )
        return TrainerMessage("facts", {"y": packet.record["x"]})

    def garbage(self, error: ProtocolError) -> TrainerMessage:
        return TrainerMessage("refusal", {"rule": error.rule})

    def attached(self, isolation: str) -> None: ...

    def detached(self) -> None: ...

    def told(self, link: Any) -> None: ...

    def cancel(self, study: str) -> int:
        return 0

    def status(self) -> dict[str, Any]:
        return {}

    def wait_for_news(self, seconds: float) -> bool:
        return threading.Event().wait(seconds)


class Site:
    """A connector in this process, at an address, before a desk of its own."""

    def __init__(
        self,
        folder: Path,
        address: str,
        ca: bytes,
        key: Any,
        idle: float,
        before: dict[str, Any] | None = None,
    ) -> None:
        (folder / "connector").mkdir(parents=True)
        if before:
            (folder / "connector" / "link.json").write_text(json.dumps(before))
        (folder / "ca.pem").write_bytes(ca)
        self.desk, self.stop, self.folder = Desk(), threading.Event(), folder
        self._end = serve(self.desk, folder / "run" / "t.sock", 1 << 24)
        server = ServerSection(
            address=address,
            ca=folder / "ca.pem",
            state=folder / "connector",
            retry_seconds=0.4,
            idle_seconds=idle,
            max_download_mib=1,
        )
        self.connector = Connector(
            "north", server, folder / "run" / "t.sock", key, "hidden", "1", self.stop
        )
        self.thread = threading.Thread(target=self.connector.run)
        self.thread.start()

    @property
    def link(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            told: dict[str, Any] = json.loads((self.folder / "connector" / "link.json").read_text())
            return told
        return {"state": ""}

    def spooled(self) -> list[str]:
        return [path.name for path in (self.folder / "connector" / "spool").iterdir()]

    def close(self) -> float:
        """Stop it; the seconds that took."""
        began = time.monotonic()
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        took = time.monotonic() - began
        self._end(0.1)
        return took


@pytest.fixture(scope="module")
def server(make_superlink: Make) -> Any:
    return make_superlink()


@pytest.fixture(scope="module")
def control(server: Any) -> ControlClient:
    return ControlClient(server.address, server.ca, server.control_secret)


@pytest.fixture(scope="module")
def session(
    server: Any, control: ControlClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    made = RunSession(control, server.runtime_secret, tmp_path_factory.mktemp("run") / "lock")
    yield made
    made.close(complete=True)


@pytest.fixture
def make_wire(server: Any) -> Iterator[Callable[..., Wire]]:
    made: list[Wire] = []

    def build(target: str | None = None) -> Wire:
        made.append(Wire(server.address if target is None else target))
        return made[-1]

    yield build
    for one in made:
        one.pull()


@pytest.fixture
def make_site(
    server: Any, control: ControlClient, new_key: Make, tmp_path: Path
) -> Iterator[Callable[..., tuple[Site, int]]]:
    """Builds a site at an address that is enrolled; gives its number too."""
    made: list[Site] = []

    def build(
        address: str = "", idle: float = 0.3, before: dict[str, Any] | None = None
    ) -> tuple[Site, int]:
        key, public = new_key()
        node = control.register(public, "north")
        folder = tmp_path / f"s{len(made)}"
        made.append(Site(folder, address or server.address, server.ca, key, idle, before))
        return made[-1], node

    yield build
    for one in made:
        one.close()


def order(node: int, x: str, ttl: float = 60.0) -> Message:
    message = Message(RecordDict({"config": ConfigRecord({"x": x})}), node, MessageType.TRAIN)
    message.metadata.ttl = ttl
    return message


def reply(session: Any, identifier: str, seconds: float = 20.0) -> RecordDict:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for message in session.grid.pull_messages([identifier]):
            content: RecordDict = message.content
            return content
    raise AssertionError("no reply came")


def send(session: Any, *messages: Message) -> list[str]:
    return list(session.grid.push_messages(messages))


def test_an_answer_that_was_ready_while_the_link_was_down_comes_when_it_is_back(
    make_wire: Make, make_site: Make, session: Any, until: Make
) -> None:
    wire = make_wire()
    site, node = make_site(wire.address)
    site.desk.free.clear()
    until(lambda: site.link["state"] == "online")
    late, lost = send(session, order(node, "late"), order(node, "lost", ttl=3.0))
    began = time.monotonic()
    until(lambda: sorted(site.desk.asked) == ["late", "lost"])
    wire.pull()
    site.desk.free.set()
    until(lambda: site.link["state"] == "down")
    assert "reachable" in site.link["last_error"]
    assert len(site.spooled()) == 2
    until(lambda: time.monotonic() - began > 3.2)
    wire.plug_in()
    assert dict(reply(session, late).config_records["facts"]) == {"y": "late"}
    # The other's round is over by now: it is dropped here, and never seen there.
    until(lambda: not site.spooled())
    (told,) = session.grid.pull_messages([lost])
    assert told.has_error()
    (again,) = send(session, order(node, "again"))
    assert dict(reply(session, again).config_records["facts"]) == {"y": "again"}
    assert sorted(site.desk.asked) == ["again", "late", "lost"]


def test_an_order_that_waited_until_its_round_was_over_is_not_carried_out(
    make_site: Make, session: Any, until: Make
) -> None:
    site, node = make_site()
    site.desk.free.clear()
    until(lambda: site.link["state"] == "online")
    first = send(session, *(order(node, f"first {number}") for number in range(4)))
    until(lambda: len(site.desk.asked) == 4)  # as many as it hands on at once
    send(session, order(node, "waits", ttl=3.0))
    bad = bad_messages(node)["bytes"]
    bad.metadata.ttl = 3.0
    assert all(session.grid._grid.push_messages([bad]))
    began = time.monotonic()
    until(lambda: len(site.spooled()) == 6)
    until(lambda: time.monotonic() - began > 3.2)
    site.desk.free.set()
    for identifier in first:
        reply(session, identifier)
    until(lambda: not site.spooled())
    assert "waits" not in site.desk.asked
    # What was no order at all is still heard of at the trainer, whose audit log must have it.
    assert len([asked for asked in site.desk.asked if "unreadable" in asked]) == 1


@pytest.fixture
def fleet(
    server: Any, control: ControlClient, new_key: Make
) -> Iterator[Callable[..., FleetClient]]:
    """Builds connections of an enrolled site; ``node`` is its number."""
    key, public = new_key()
    node = control.register(public, "north")
    made: list[FleetClient] = []

    def build(address: str = "", ca: bytes = b"") -> FleetClient:
        made.append(FleetClient(address or server.address, ca or server.ca, key, 1 << 20))
        return made[-1]

    build.node = node  # type: ignore[attr-defined]
    yield build
    for one in made:
        one.drop()


PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PROXIES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_proxy_is_used_from_the_file_or_the_environment(
    make_wire: Make, fleet: Any, server: Any, no_proxies: pytest.MonkeyPatch, until: Make
) -> None:
    proxy, dead = make_wire(""), "http://127.0.0.1:9"

    def section(address: str = "") -> ServerSection:
        return ServerSection(address=server.address, ca=Path("x"), proxy=address)

    assert proxy_of(section()) == ""
    no_proxies.setenv("HTTPS_PROXY", f"http://{proxy.address}")
    assert proxy_of(section()) == f"http://{proxy.address}"
    assert fleet().activate() == fleet.node
    assert proxy.connects == [server.address]
    # Where the environment excepts the aggregator, the wire goes straight there.
    no_proxies.setenv("NO_PROXY", "127.0.0.1")
    assert proxy_of(section()) == ""
    fleet().activate(fleet.node)
    assert len(proxy.connects) == 1
    # What site.toml says counts more than all of the environment.
    no_proxies.setenv("https_proxy", dead)
    no_proxies.setenv("NO_PROXY", "")
    with pytest.raises(LinkDown, match="Connection refused"):
        fleet().activate(fleet.node)
    no_proxies.setenv("NO_PROXY", "127.0.0.1")
    use_proxy(section(f"http://{proxy.address}"))
    failures: list[str] = []

    def activated() -> bool:
        # As the connector does: a connection may break, and is made again.
        try:
            return fleet().activate(fleet.node) == fleet.node
        except LinkDown as error:
            failures.append(str(error))
            assert len(failures) < 10, failures
            return False

    until(activated)
    assert len(proxy.connects) >= 2, failures


@pytest.mark.parametrize(("newest", "heard"), [("TLSv1_1", False), ("TLSv1_2", True)])
def test_nothing_is_said_below_tls_1_2(server: Any, fleet: Any, newest: str, heard: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.settings.certificate, server.settings.key)
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion[newest]
    context.set_ciphers("ALL:@SECLEVEL=0")
    said: list[bytes] = []

    def listen() -> None:
        with suppress(OSError):
            end, _ = listener.accept()
            with context.wrap_socket(end, server_side=True) as talk:
                said.append(talk.recv(100))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        with pytest.raises(LinkDown):
            fleet(f"127.0.0.1:{listener.getsockname()[1]}").activate()
        thread.join(10)
    assert bool(said) == heard


def other_authority() -> bytes:
    key, moment = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another authority")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(moment - timedelta(days=1))
        .not_valid_after(moment + timedelta(days=1))
        .add_extension(x509.BasicConstraints(True, None), True)
    )
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_only_the_sites_own_authority_is_trusted_for_the_name_that_was_asked(
    server: Any, fleet: Any
) -> None:
    with pytest.raises(LinkDown, match="certificate"):
        fleet(ca=other_authority()).activate()
    port = server.settings.port
    assert fleet(f"localhost:{port}").activate() == fleet.node
    with pytest.raises(LinkDown):
        fleet(f"127.0.0.2:{port}").activate()  # reachable, but not in the certificate
    with pytest.raises(ConfigError, match="PEM"):
        fleet(ca=b"no certificate \xff")


def _trees(*, known: bool) -> bytes:
    answer = PullMessagesResponse()
    answer.messages_list.add().metadata.message_id = "../../../../etc/passwd"
    if known:
        answer.message_object_trees.add().object_id = "x"
    return bytes(answer.SerializeToString())


HOSTILE: dict[str, tuple[int, dict[str, str], bytes]] = {
    "too large": (200, {}, b"x" * (40 << 20)),
    "a bomb": (200, {"content-encoding": "gzip"}, gzip.compress(bytes(1 << 26))),
    "elsewhere": (302, {"location": "https://127.0.0.1:9/v1/fleet/pull-messages"}, b""),
    "no record": (200, {}, b"\x80\x04garbage"),
    "no parts": (200, {}, _trees(known=False)),
    "no numbers": (200, {}, _trees(known=True)),
    "a page": (200, {"content-type": "text/html"}, b"<html>Log in to the guest network</html>"),
    "an odd error": (500, {}, b'{"code": "x"}'),
    "a list": (401, {"date": "yesterday"}, b"[1]"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_aggregator_that_is_none_breaks_nothing(server: Any, fleet: Any, kind: str) -> None:
    """Whatever it answers ends in an error that is waited out."""
    code, headers, body = HOSTILE[kind]
    sent: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            assert self.headers["accept-encoding"] == "identity"
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            parts = (body[start : start + (1 << 16)] for start in range(0, len(body), 1 << 16))
            sent.extend(map(self.wfile.write, parts))

        def log_message(self, *args: Any) -> None: ...

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.settings.certificate, server.settings.key)

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *args: Any) -> None: ...

    with Quiet(("127.0.0.1", 0), Handler) as made:
        made.socket = context.wrap_socket(made.socket, server_side=True)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        link = fleet(f"127.0.0.1:{made.server_port}")
        with pytest.raises((LinkDown, ProtocolError, fleet_client.LinkRefused)):
            link.pull()
        link.drop()
        made.shutdown()
    assert sum(sent) < 30 << 20  # two MiB, and what the kernel buffers


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_wrong_by_an_hour_is_no_hindrance(
    fleet: Any, session: Any, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    wrong = lambda: datetime.now(UTC) + timedelta(hours=hours)  # noqa: E731
    monkeypatch.setattr("fedward.flower.fleet_client.now", wrong)
    link = fleet()
    assert link.activate() == fleet.node
    assert link.clock_seconds == pytest.approx(-3600 * hours, abs=5)
    (identifier,) = send(session, order(fleet.node, "x", ttl=30.0))
    message = link.pull()
    assert message is not None
    with monkeypatch.context() as patched:
        patched.setattr("flwr.app.message.message.now", wrong)
        link.push(Message(RecordDict({"config": ConfigRecord({"y": 1})}), reply_to=message))
    assert dict(reply(session, identifier).config_records["config"]) == {"y": 1}


@pytest.mark.parametrize("how", ["no name", "nobody", "silence"])
def test_a_dead_network_is_told_and_a_stop_waits_for_nothing(
    make_wire: Make, make_site: Make, until: Make, how: str
) -> None:
    wire = make_wire()
    wire.silent = True
    places = {"no name": "aggregator.invalid:9443", "nobody": "127.0.0.1:9"}
    site, _ = make_site(places.get(how, wire.address))
    if how != "silence":
        until(lambda: site.link["state"] == "down")
        assert "reachable" in site.link["last_error"]
        assert "ConnectError" not in site.link["last_error"]
        assert how != "nobody" or "Connection refused" in site.link["last_error"]
        assert how != "no name" or "aggregator.invalid" not in json.dumps(site.link)
    else:
        until(lambda: wire._ends)
    assert site.close() < 5.0
    assert site.link["state"] == "stopped"


def test_what_a_killed_connector_said_does_not_pass_for_the_next_one_s(
    make_wire: Make, make_site: Make, until: Make
) -> None:
    wire = make_wire()
    wire.silent = True
    site, _ = make_site(wire.address, before={"state": "online"})
    until(lambda: wire._ends)
    assert site.link["state"] == "starting"


def test_the_pauses_between_tries_grow_and_differ() -> None:
    for attempt, most in ((1, 0.5), (4, 4.0), (50, 60.0)):
        pauses = [connector._pause(attempt, 60.0) for _ in range(400)]
        assert 0 < min(pauses) < 0.2 * most
        assert 0.9 * most < max(pauses) <= most
        assert statistics.stdev(pauses) > most / 5  # no two hospitals come back together


class Counting(FleetClient):
    """Tells what is called, and when."""

    calls: ClassVar[Counter[str]] = Counter()

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._client._client.event_hooks["request"].append(
            lambda request: self.calls.update([request.url.path.removeprefix("/v1/fleet/")])
        )


def test_a_question_is_held_until_an_order_comes_and_nothing_asks_for_code(
    make_site: Make, session: Any, until: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "FleetClient", Counting)
    site, node = make_site()
    until(lambda: site.link["state"] == "online")

    def pulls(seconds: float) -> int:
        before, end = Counting.calls["pull-messages"], time.monotonic() + seconds
        until(lambda: time.monotonic() > end)
        return Counting.calls["pull-messages"] - before

    assert 3 <= pulls(1.5) <= 6  # every 0.3 s
    site.close()
    site, node = make_site(idle=20.0)
    until(lambda: site.link["state"] == "online")
    until(lambda: pulls(0.5) == 0)
    began = time.monotonic()
    (identifier,) = send(session, order(node, "x"))
    reply(session, identifier)
    assert time.monotonic() - began < 10.0
    site.close()
    assert set(Counting.calls) == {
        "activate-node",
        "deactivate-node",
        "pull-messages",
        "push-messages",
        "confirm-message-received",
    } | ({"send-node-heartbeat"} & set(Counting.calls))


def bad_messages(node: int) -> dict[str, Message]:
    right = ConfigRecord({"x": "right"})
    whole = pack({"w": np.ones(10, np.float32)})
    pickled = Array(np.ones(3))
    pickled.data = (
        b"\x93NUMPY"
        + bytes([1, 0])
        + b"v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"
    )

    def arrays(array: Array, name: str = "packed") -> RecordDict:
        return RecordDict({"config": right, "arrays": ArrayRecord({name: array})})

    contents = {
        "no order": RecordDict({}),
        "two orders": RecordDict({"config": right, "more": right}),
        "another name": RecordDict({"order": right}),
        "bytes": RecordDict({"config": ConfigRecord({"x": b"code"})}),
        "a pickle": arrays(pickled),
        "truncated": arrays(Array(whole[: len(whole) // 2].copy())),
        "garbage": arrays(Array(np.frombuffer(b"\x80\x04x" * 50, np.uint8))),
        "unpacked": arrays(Array(np.ones(3)), "w"),
        "oversized": arrays(Array(np.zeros(3 << 20, np.uint8))),
    }
    return {name: Message(content, node, MessageType.TRAIN) for name, content in contents.items()}


def test_a_message_that_is_no_order_is_refused_and_the_link_goes_on(
    make_site: Make, session: Any, until: Make
) -> None:
    site, node = make_site()
    until(lambda: site.link["state"] == "online")
    sent = bad_messages(node)
    grid = session.grid._grid  # which packs nothing anew
    told = dict(zip(grid.push_messages(list(sent.values())), sent, strict=True))
    assert all(told)
    for identifier, name in told.items():
        refusal = reply(session, identifier).config_records["refusal"]
        assert refusal["rule"] == "r", name
    assert len(site.desk.asked) == len(sent)
    assert all("unreadable" in asked for asked in site.desk.asked)
    (again,) = send(session, order(node, "again"))
    assert dict(reply(session, again).config_records["facts"]) == {"y": "again"}


SITE = """
version = 1
[site]
name = "{name}"
[server]
address = "{address}"
ca = "aggregator-ca.pem"
retry_seconds = 1.0
idle_seconds = 0.2
[trainer]
socket = "run/t.sock"
[datasets.chest]
root = "nothing"
task = "classification"
classes = ["no", "yes"]
"""


class Process:
    """A real connector process before a desk in this one."""

    def __init__(
        self, folder: Path, server: Any, control: ControlClient, env: dict[str, str]
    ) -> None:
        self.folder, self.env, self.desk = folder, env, Desk()
        made = enrol(folder, folder.name, server.address, server.ca)
        self.node = control.register(made.public_key.encode(), folder.name)
        made.config.write_text(SITE.format(name=folder.name, address=server.address))
        self.end = serve(self.desk, folder / "run" / "t.sock", 1 << 24)

    def start(self) -> None:
        self.process = warm_start.popen(
            [
                *warm_start.program("fedward_client.cli", SHORTER),
                "connector",
                "--config",
                str(self.folder / "site.toml"),
            ],
            env=self.env,
        )

    def state(self) -> str:
        with suppress(OSError, ValueError):
            told = json.loads((self.folder / "connector" / "link.json").read_text())
            return str(told["state"])
        return ""

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 0
        self.end(0.1)


# The lease is two of a site's heartbeats, of which Flower takes none that comes more often than
# every 10 s.
ANY_LEASE = "import flwr.superlink.servicer.fleet.fleet_handlers as fleet\n"
ANY_LEASE += "fleet.HEARTBEAT_MIN_INTERVAL = 0"
SHORTER = """
import fedward.flower.fleet_client, fedward_client.connector.connector
for module in (fedward.flower.fleet_client, fedward_client.connector.connector):
    module.HEARTBEAT_SECONDS = 2.0
"""


def test_a_laptop_that_slept_and_a_site_that_forgot_its_number_come_back(
    make_superlink: Make,
    tmp_path: Path,
    until: Make,
    environment: dict[str, str],
) -> None:
    """Both are away for longer than the aggregator's lease."""
    server = make_superlink(before=ANY_LEASE)
    control = ControlClient(server.address, server.ca, server.control_secret)
    session = RunSession(control, server.runtime_secret, tmp_path / "lock")
    sleeper, forgetful = (
        Process(tmp_path / name, server, control, environment) for name in ("sleeper", "forgetful")
    )
    for one in (sleeper, forgetful):
        one.start()
    until(lambda: sleeper.state() == forgetful.state() == "online")
    sleeper.process.send_signal(signal.SIGSTOP)
    forgetful.process.kill()
    forgetful.process.wait()
    (forgetful.folder / "connector" / "node").unlink()
    forgetful.start()
    until(lambda: forgetful.state() == "waiting for an old connection to lapse")
    states = lambda: {n.node_id: n.status for n in control.nodes()}  # noqa: E731
    until(lambda: states()[sleeper.node] == "offline", 40)
    (identifier,) = send(session, order(sleeper.node, "slept"))
    sleeper.process.send_signal(signal.SIGCONT)
    assert dict(reply(session, identifier).config_records["facts"]) == {"y": "slept"}
    until(lambda: forgetful.state() == "online", 40)
    until(lambda: states()[sleeper.node] == states()[forgetful.node] == "online")
    for one in (sleeper, forgetful):
        one.close()
    session.close(complete=True)
    control.close()
