"""The federation on one machine, run to the end of its study, and looked at while it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from images import ROOT, Image, run
from oci import NETWORK, Container, Volumes, start
from units import seccomp

_PATIENCE: Final = 3600.0
_STOP: Final = 20.0
_NO_CAPABILITY: Final = "0" * 16


@dataclass
class Federation:
    """The services of a compose file, started when what they depend on is ready.

    Attributes
    ----------
    services : dict
        Of the compose file.
    images : dict
        Image by name.
    volumes : Volumes
        Theirs.
    """

    services: Mapping[str, Any]
    images: Mapping[str, Image]
    volumes: Volumes
    running: dict[str, Container] = field(default_factory=dict)

    def up(self) -> None:
        """Start everything; back when every step has ended and everything else is healthy."""
        for name in self.services:
            self._start(name)
        for name, service in self.services.items():
            steps = service.get("restart") == "no"
            self._wait(name, "service_completed_successfully" if steps else "service_healthy")

    def _start(self, name: str) -> None:
        if name in self.running:
            return
        service = self.services[name]
        for other, how in service.get("depends_on", {}).items():
            self._start(other)
            self._wait(other, how["condition"])
        print(f"  {name}")
        image = self.images[service["image"]]
        # What stays runs under the filters of its systemd unit, which are the tighter ones.
        filters = None if service.get("restart") == "no" else seccomp(image.role)
        self.running[name] = start(name, service, image, self.volumes, filters)

    def _wait(self, name: str, condition: str) -> None:
        one, end = self.running[name], time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            code = one.process.poll()
            if condition == "service_completed_successfully" and code == 0:
                return
            if code is not None:
                break
            if condition == "service_healthy" and one.call(*one.health).returncode == 0:
                return
            time.sleep(0.5)
        raise SystemExit(f"{name} did not get as far as {condition}:\n{one.log.read_text()}")

    def down(self) -> dict[str, int]:
        """End what runs; exit code by service."""
        left = {name: one for name, one in self.running.items() if one.process.poll() is None}
        return {name: one.stop(_STOP) for name, one in reversed(left.items())}


def check(services: Mapping[str, Any], images: Mapping[str, Image], work: Path) -> None:
    """Run the federation, hold what it promises against what is so, and end it."""
    shutil.rmtree(work / "volumes", ignore_errors=True)
    federation = Federation(services, images, Volumes(work / "volumes", ROOT / "docker"))
    subprocess.run(["ip", "netns", "delete", NETWORK], capture_output=True, check=False)
    run("ip", "netns", "add", NETWORK)
    run("ip", "-n", NETWORK, "link", "set", "lo", "up")
    try:
        federation.up()
        print(federation.running["study"].log.read_text())
        for name, one in federation.running.items():
            if one.process.poll() is None:
                _look(name, one)
        _look_at_results(work / "volumes" / "results")
    finally:
        codes = federation.down()
        run("ip", "netns", "delete", NETWORK)
    print(f"ended with {codes}")
    _demand(not any(codes.values()), "every service ends cleanly on SIGTERM")


def _look(name: str, one: Container) -> None:
    facts = one.facts()
    _demand(facts["Uid"].split()[0] != "0", f"{name} is not root")
    _demand(facts["CapEff"] == facts["CapBnd"] == _NO_CAPABILITY, f"{name} has no capability")
    _demand(facts["NoNewPrivs"] == "1", f"{name} gains no privilege")
    _demand(one.call("touch", "/opt/fedward/x").returncode != 0, f"{name} cannot write its image")
    if name.endswith("trainer"):
        _look_at_walls(name, one)
    if name == "aggregator":
        key = ec.generate_private_key(ec.SECP384R1()).public_key()
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        added = one.call("fedward-server", "site", "add", "third", "/dev/stdin", given=pem)
        _demand(added.returncode == 0, "a hospital is enrolled by a key on standard input")
    if name.endswith("connector"):
        found = one.call("python", "-c", "import torch")
        _demand(found.returncode != 0, f"{name} holds no torch")
        _demand(one.call("ls", "/data").returncode != 0, f"{name} has no data")


def _look_at_walls(name: str, one: Container) -> None:
    told = json.loads(one.call("fedward-client", "status", "--json").stdout)
    now = told["trainer"]
    print(
        f"  {name}: network: {now['network']}; connector: {now['connector']}; "
        f"link: {told['link']['state']}; budget: {told['budget']}"
    )
    _demand(now["walls"] and now["connector"] == "hidden", f"{name} and its connector are apart")
    _demand(told["link"]["state"] == "online", f"{name} knows of the link")
    whole = one.call("fedward-client", "audit", "verify")
    _demand(whole.returncode == 0, f"{name} kept its audit log")


def _look_at_results(folder: Path) -> None:
    for name in ("report.html", "model.safetensors", "model.md"):
        _demand((folder / name).stat().st_size > 1000, f"the study left {name}")


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"NOT SO: {what}")
    print(f"  so: {what}")
