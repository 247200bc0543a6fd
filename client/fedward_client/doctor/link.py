"""The way to the aggregator: proxy, name, certificate, clock, key."""

from __future__ import annotations

import os
import socket
import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

import httpx
from cryptography import x509

from fedward.errors import FedwardError
from fedward.flower.fleet_client import FleetClient, LeaseHeld, LinkDown, LinkRefused
from fedward.https import proxy_of, read_ca, tls_context, use_proxy, why_untrusted
from fedward_client.config import ServerSection
from fedward_client.connector.process import KEY_NAME, read_key
from fedward_client.doctor.line import Line
from fedward_client.link.state import CERTIFICATE_DAYS, link_file, read_state

_SECONDS: Final = 10.0
_CLOCK: Final = 30.0


def network(server: ServerSection) -> Iterator[Line]:
    """From the name to the clock; ends where going on is impossible."""
    host, _, port = server.address.rpartition(":")
    host, proxy = host.strip("[]"), proxy_of(server)
    use_proxy(server)
    try:
        where = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        name, number = (where.hostname or "", where.port or 80) if proxy else (host, int(port))
    except ValueError:
        yield Line("proxy", "fail", "it is no http://host:port", "Mend HTTPS_PROXY of this user")
        return
    whose = "the proxy's" if proxy else "the aggregator's"
    try:
        socket.getaddrinfo(name, number)
        yield Line("name", "pass", f"{whose} name has an address")
    except (OSError, UnicodeError):
        yield Line("name", "fail", f"{whose} name has no address", "Look at DNS, and at the name")
        return
    yield from _secured(server, host, int(port), where if proxy else None)


def _secured(
    server: ServerSection, host: str, port: int, proxy: SplitResult | None
) -> Iterator[Line]:
    try:
        context = tls_context(read_ca(server))
    except FedwardError as error:
        yield Line("authority", "fail", error.rule, error.fix)
        return
    try:
        raw = _through(proxy, host, port) if proxy else _straight(host, port)
    except (OSError, HTTPException) as error:
        yield _no_way(error, proxied=proxy is not None)
        return
    yield Line("proxy", "pass", "it lets the site through" if proxy else "none is used")
    with raw:
        yield (line := _certificate(raw, context, host, server))
    if line.status != "fail":
        yield _clock(server.address, context)


def _straight(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port), _SECONDS)


def _through(proxy: SplitResult, host: str, port: int) -> socket.socket:
    """A connection that the proxy made (CONNECT, RFC 9110)."""
    kind = HTTPSConnection if proxy.scheme == "https" else HTTPConnection
    way = kind(proxy.hostname or "", proxy.port or 80, timeout=_SECONDS)
    headers = {}
    if proxy.username:
        who = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + b64encode(who.encode()).decode()
    way.set_tunnel(host, port, headers)
    way.connect()
    return way.sock


def _no_way(error: Exception, *, proxied: bool) -> Line:
    number = error.errno if isinstance(error, OSError) else None
    found = os.strerror(number) if number else "no answer"
    if not proxied:
        return Line("connection", "fail", found, "Let the firewall pass this one port outwards")
    if "Tunnel" in str(error):
        found = "it refuses to connect the site"
    return Line("proxy", "fail", found, "Have it allow CONNECT to the aggregator's host and port")


def _certificate(
    raw: socket.socket, context: ssl.SSLContext, host: str, server: ServerSection
) -> Line:
    try:
        with context.wrap_socket(raw, server_hostname=host) as link:
            given = x509.load_der_x509_certificate(link.getpeercert(binary_form=True) or b"")
            version = link.version() or ""
    except ssl.SSLCertVerificationError as error:
        found, fix = why_untrusted(error) or (error.verify_message, "")
        return Line("certificate", "fail", found, fix)
    except (OSError, ValueError):
        return Line(
            "certificate",
            "fail",
            "no TLS 1.2 or newer is spoken there",
            "Ask the coordinator; or a firewall breaks TLS open",
        )
    chain = [given, *x509.load_pem_x509_certificates(server.ca.read_bytes())]
    left = min(one.not_valid_after_utc for one in chain) - datetime.now(UTC)
    if left.days < CERTIFICATE_DAYS:
        return Line(
            "certificate",
            "warn",
            f"{version}, ends in {left.days} days",
            "Ask the coordinator to renew it",
        )
    return Line("certificate", "pass", f"{version}, valid for {left.days} days")


def _clock(address: str, context: ssl.SSLContext) -> Line:
    try:
        with httpx.Client(verify=context, timeout=_SECONDS) as client:
            told = client.get(f"https://{address}/health").headers.get("date", "")
        away = (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
    except (httpx.HTTPError, ValueError, TypeError):
        return Line("clock", "warn", "the aggregator tells no time", "Set this clock by NTP")
    if abs(away) > _CLOCK:
        # The link itself goes by the aggregator's clock; certificates and the audit log do not.
        return Line(
            "clock", "warn", f"{abs(away):.0f} s from the aggregator's", "Set both clocks by NTP"
        )
    return Line("clock", "pass", f"within {max(1, round(abs(away)))} s of the aggregator's")


def enrolment(server: ServerSection) -> Iterator[Line]:
    """Whether the key is there, and known to the aggregator."""
    try:
        key, ca = read_key(server.state / KEY_NAME), read_ca(server)
    except FedwardError as error:
        yield Line("key", "fail", error.rule, error.fix)
        return
    yield Line("key", "pass", "readable by its owner alone")
    known = 0
    with suppress(OSError, ValueError):
        known = int((server.state / "node").read_text())
    fleet = FleetClient(server.address, ca, key, 1 << 20)
    try:
        fleet.activate(known)
        yield Line("enrolment", "pass", "the aggregator knows this site's key")
        if not _running(server):
            fleet.close()
    except LeaseHeld:
        yield Line(
            "enrolment",
            "fail",
            "the aggregator does not take this site's key",
            "Send connector/site.pub to the coordinator; if the site was connected until "
            "just now, look again in a minute",
        )
    except LinkRefused:
        yield Line(
            "enrolment",
            "fail",
            "the aggregator does not know this site's key, not yet or not any more",
            "Send connector/site.pub to the coordinator, who adds it",
        )
    except LinkDown as error:
        yield Line("enrolment", "fail", error.rule, "Mend what failed above")
    except FedwardError as error:  # something else answers in the aggregator's place
        yield Line("enrolment", "fail", error.rule, "Compare server.address with the coordinator's")
    finally:
        fleet.drop()


def _running(server: ServerSection) -> bool:
    """Whether a connector may be at work, which must not be signed off."""
    try:
        return read_state(link_file(server.state))[0].state != "stopped"
    except FedwardError:
        return False
