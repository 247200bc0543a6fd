"""``fedward-client doctor``: everything that a hospital's part in a study depends on."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, Literal
from urllib.request import getproxies

from client.config import SiteConfig
from client.daemon.isolation import Finding, find_network, find_readable
from client.daemon.launch import hidden_places
from client.link.state import link_file
from fedward.errors import FedwardError

Status = Literal["pass", "warn", "fail"]
Process = Literal["trainer", "connector"]
_SECONDS: Final = 10.0
_DAYS: Final = 30
_CLOCK: Final = 30.0
_FREE: Final = 5 << 30
_WALLS: Final = "Run under systemd or as containers; see the install page"


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes
    ----------
    name : str
        What was looked at.
    status : str
        ``pass``, ``warn`` or ``fail``.
    found : str
        What it is; no secret and no patient is ever in it.
    fix : str
        The next step; "" where none is needed.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def examine(config: SiteConfig, process: Process | None = None) -> Iterator[Line]:
    """Look at everything, one line after the other.

    Parameters
    ----------
    config : SiteConfig
        The site.
    process : str or None
        Look only at what the trainer or the connector needs, from within walls that are there
        already: in its container, or as its user. None: at all of it, and build the walls.
    """
    if process != "trainer":
        yield from _outwards(config)
    if process == "connector":
        yield _found("connector and images", find_readable(hidden_places(config)), False)
        return
    yield _disk(config)
    yield _device(config)
    if process == "trainer":
        allowed = config.trainer.allow_networked_trainer
        yield _found("trainer's network", find_network(), allowed)
    else:
        yield from _walls(config)
    yield from _datasets(config)
    yield _policy(config)


def _outwards(config: SiteConfig) -> Iterator[Line]:
    if config.server is None:
        yield Line(
            "aggregator", "fail", "site.toml has no [server]", "Add it: fedward-client enrol"
        )
        return
    yield from _network(config)
    yield from _enrolled(config)


def _found(name: str, finding: Finding, allowed: bool) -> Line:
    if finding.holds:
        return Line(name, "pass", finding.text)
    return Line(name, "warn" if allowed else "fail", finding.text, _WALLS)


def _network(config: SiteConfig) -> Iterator[Line]:
    server = config.server
    if server is None:
        return
    host, _, port = server.address.rpartition(":")
    proxy = server.proxy or getproxies().get("https", "")
    yield Line("proxy", "pass", "a proxy is used" if proxy else "none is used")
    if not proxy:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
            yield Line("name", "pass", "the aggregator's name has an address")
        except OSError:
            yield Line("name", "fail", "the aggregator's name has no address", "Ask for its DNS")
            return
    yield from _tls(config, host.strip("[]"), int(port), proxied=bool(proxy))


def _tls(config: SiteConfig, host: str, port: int, *, proxied: bool) -> Iterator[Line]:
    server = config.server
    if server is None:
        return
    try:
        context = ssl.create_default_context(cafile=str(server.ca))
    except (OSError, ssl.SSLError):
        yield Line("authority", "fail", "server.ca is no certificate", "Ask the coordinator for it")
        return
    if not proxied:
        try:
            with (
                socket.create_connection((host, port), _SECONDS) as raw,
                context.wrap_socket(raw, server_hostname=host) as link,
            ):
                yield _expiry(link.getpeercert() or {}, link.version() or "")
        except ssl.SSLCertVerificationError as error:
            yield Line("certificate", "fail", error.verify_message, "Compare server.ca with theirs")
            return
        except OSError as error:
            found = os.strerror(error.errno) if error.errno else "no answer"
            yield Line("connection", "fail", found, "Let the firewall pass this one port outwards")
            return
    yield from _clock(server.address, context)


def _expiry(certificate: Mapping[str, object], version: str) -> Line:
    ends = ssl.cert_time_to_seconds(str(certificate.get("notAfter")))
    days = int((ends - datetime.now(UTC).timestamp()) / 86400)
    if days < _DAYS:
        return Line(
            "certificate", "warn", f"ends in {days} days", "Ask the coordinator to renew it"
        )
    return Line("certificate", "pass", f"{version}, valid for {days} days")


def _clock(address: str, context: ssl.SSLContext) -> Iterator[Line]:
    import httpx

    try:
        with httpx.Client(verify=context, timeout=_SECONDS) as client:
            told = client.get(f"https://{address}/health").headers.get("date", "")
        away = abs((parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (httpx.HTTPError, ValueError, TypeError):
        yield Line("clock", "warn", "the aggregator tells no time", "Set this clock by NTP")
        return
    if away > _CLOCK:
        yield Line("clock", "fail", f"{away:.0f} s from the aggregator's", "Set both clocks by NTP")
    else:
        yield Line("clock", "pass", f"within {max(1, round(away))} s of the aggregator's")


def _enrolled(config: SiteConfig) -> Iterator[Line]:
    from client.connector.fleet import Fleet, LeaseHeld, LinkDown, LinkRefused
    from client.connector.host import KEY_NAME, read_key

    server = config.server
    if server is None:
        return
    try:
        key = read_key(server.state / KEY_NAME)
        ca = server.ca.read_bytes()
    except FedwardError as error:
        yield Line("key", "fail", error.rule, error.fix)
        return
    except OSError:
        return
    running = link_file(server.state).exists()
    known = 0
    with suppress(OSError, ValueError):
        known = int((server.state / "node").read_text())
    fleet = Fleet(server.address, ca, key, 1 << 20)
    try:
        fleet.activate(known)
        yield Line("enrolment", "pass", "the aggregator knows this site's key")
        if not running:
            fleet.close()
    except (LeaseHeld, LinkRefused):
        yield Line("enrolment", "fail", "the aggregator does not take this site's key",
                   "Send connector/site.pub to the coordinator")  # fmt: skip
    except LinkDown as error:
        yield Line("enrolment", "fail", error.rule, error.fix)
    finally:
        fleet.drop()


def _disk(config: SiteConfig) -> Line:
    place = config.site.state
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < _FREE:
        return Line("disk", "warn", f"{free >> 30} GiB free", "Make room for prepared images")
    return Line("disk", "pass", f"{free >> 30} GiB free")


def _device(config: SiteConfig) -> Line:
    import torch

    from client.training.device import choose_device

    try:
        device = choose_device(config.trainer.device)
    except FedwardError as error:
        return Line("device", "fail", error.rule, error.fix)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Line("device", "pass", f"a GPU with {total >> 30} GiB")
    return Line(
        "device", "warn", "no GPU; training runs on the CPU", "Install a CUDA build of torch"
    )


def _walls(config: SiteConfig) -> Iterator[Line]:
    """Build the walls in two processes of their own, and let each say what it finds."""
    code = "from client.daemon.isolation import *; enter_no_network(); drop_privileges(); "
    yield _wall(
        "trainer's network", code + "f = find_network()", config.trainer.allow_networked_trainer
    )
    places = [str(place) for place in hidden_places(config)]
    code = (
        "from pathlib import Path; from client.daemon.isolation import *; "
        f"p = [Path(x) for x in {places!r}]; cover(p); drop_privileges(); f = find_readable(p)"
    )
    yield _wall("connector and images", code, False)


def _wall(name: str, code: str, allowed: bool) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", f"{code}; print(f.holds, f.text)"], cwd=folder, text=True,
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
    holds, _, text = done.stdout.strip().partition(" ")
    if done.returncode == 0 and holds == "True":
        return Line(name, "pass", text)
    found = text if done.returncode == 0 else "the kernel makes no namespaces for this user"
    return Line(name, "warn" if allowed else "fail", found, _WALLS)


def _datasets(config: SiteConfig) -> Iterator[Line]:
    from client.cohort.frozen import cohort_path

    for name, one in config.datasets.items():
        if not os.access(one.root, os.R_OK):
            yield Line(
                f"dataset {name}", "fail", "cannot be read", "Give the trainer's user access"
            )
            continue
        try:
            cohort_path(config.site.state, name)
            yield Line(f"dataset {name}", "pass", "readable, with a frozen cohort")
        except FedwardError:
            yield Line(f"dataset {name}", "warn", "readable, but no cohort is frozen",
                       f"fedward-client data freeze {name}")  # fmt: skip


def _policy(config: SiteConfig) -> Line:
    policy = config.policy
    checks: tuple[tuple[Callable[[], bool], str, str], ...] = (
        (lambda: not policy.studies, "serves no study", "Add [[policy.studies]]"),
        (lambda: not policy.coordinators and not policy.any_coordinator,
         "accepts no coordinator", "Add the coordinator's fingerprint"),
        (lambda: policy.any_coordinator, "accepts every coordinator", "Name those you trust"),
        (lambda: not policy.require_privacy, "lets updates leave without privacy",
         "Set require_privacy = true"),
    )  # fmt: skip
    for wrong, found, fix in checks:
        if wrong():
            return Line("policy", "warn", found, fix)
    return Line("policy", "pass", f"{len(policy.studies)} rules, approval {policy.approval}")


def worst(lines: list[Line]) -> Status:
    """The gravest status of all."""
    found = {line.status for line in lines}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"
