"""One service of a compose file as a real container, by runc and without an engine."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from images import Image, run

NETWORK: Final = "fedward-check"
_CAPABILITIES: Final = ("bounding", "effective", "inheritable", "permitted", "ambient")


@dataclass
class Volumes:
    """Named volumes as folders; a new one takes owner and mode from the image, as with an engine.

    Attributes
    ----------
    folder : Path
        Where they lie.
    base : Path
        What relative places are relative to.
    """

    folder: Path
    base: Path

    def mounts(self, service: Mapping[str, Any], image: Image) -> list[dict[str, Any]]:
        """A service's mounts."""
        made = [self._mount(text, image) for text in service.get("volumes", ())]
        for text in service.get("tmpfs", ()):
            place, _, options = text.partition(":")
            made.append(
                {
                    "destination": place,
                    "type": "tmpfs",
                    "source": "tmpfs",
                    "options": ["nosuid", "nodev", *options.split(",")],
                }
            )
        return made

    def _mount(self, text: str, image: Image) -> dict[str, Any]:
        source, place, *mode = text.split(":")
        here = self.base / source if source.startswith((".", "/")) else self._named(source)
        inside = image.files / place.lstrip("/")
        if self._is_new(here):
            here.mkdir(parents=True)
            like = inside.stat() if inside.exists() else None
            os.chown(here, like.st_uid if like else 0, like.st_gid if like else 0)
            here.chmod(like.st_mode & 0o7777 if like else 0o755)
        return {
            "destination": place,
            "type": "bind",
            "source": str(here),
            "options": ["rbind", *(mode or ["rw"])],
        }

    def _named(self, name: str) -> Path:
        return self.folder / name

    def _is_new(self, place: Path) -> bool:
        return place.is_relative_to(self.folder) and not place.exists()


@dataclass
class Container:
    """A service that runs, or ran.

    Attributes
    ----------
    name : str
        The service's.
    health : sequence of str
        Its health check.
    process : Popen
        runc's.
    log : Path
        What it said.
    """

    name: str
    health: Sequence[str]
    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        """As runc knows it."""
        return f"fedward-{self.name}"

    def call(self, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command inside, as the container's user, with something on standard input."""
        return subprocess.run(
            ["runc", "exec", self.id, *command],
            text=True,
            capture_output=True,
            check=False,
            input=given,
        )

    def facts(self) -> dict[str, str]:
        """What the kernel says of its first process."""
        pid = json.loads(run("runc", "state", self.id))["pid"]
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def stop(self, seconds: float) -> int:
        """End it as an engine does; its exit code."""
        subprocess.run(["runc", "kill", self.id, "TERM"], capture_output=True, check=False)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            subprocess.run(["runc", "kill", self.id, "KILL"], capture_output=True, check=False)
            self.process.wait()
            return 137


def start(
    name: str,
    service: Mapping[str, Any],
    image: Image,
    volumes: Volumes,
    seccomp: Mapping[str, Any] | None = None,
) -> Container:
    """Start a service, under a filter of system calls if there is one."""
    bundle = volumes.folder.parent / "bundles" / name
    bundle.mkdir(parents=True, exist_ok=True)
    (bundle / "config.json").unlink(missing_ok=True)
    run("runc", "spec", "--bundle", bundle)
    spec = json.loads((bundle / "config.json").read_text())
    _fill(spec, service, image)
    if seccomp:
        spec["linux"]["seccomp"] = seccomp
    spec["mounts"] = [one for one in spec["mounts"] if one["type"] != "cgroup"]
    spec["mounts"] += [_hosts(volumes.folder.parent), *volumes.mounts(service, image)]
    (bundle / "config.json").write_text(json.dumps(spec))
    log = bundle / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["runc", "run", "--bundle", bundle, f"fedward-{name}"], stdout=file, stderr=file
        )
    check = service.get("healthcheck", {})
    return Container(name, check.get("test", ())[1:], process, log)


def _fill(spec: dict[str, Any], service: Mapping[str, Any], image: Image) -> None:
    """User, command, environment, capabilities and network as compose file and image say."""
    user, _, group = service.get("user", image.config["User"]).partition(":")
    entry = service.get("entrypoint", image.config["Entrypoint"])
    command = service.get("command", () if "entrypoint" in service else image.config["Cmd"])
    extra = [f"{key}={value}" for key, value in service.get("environment", {}).items()]
    kept = [f"CAP_{name}" for name in service.get("cap_add", ())]
    process = spec["process"]
    process |= {
        "terminal": False,
        "args": [*entry, *command],
        "env": [*image.config["Env"], *extra],
        "user": {"uid": int(user), "gid": int(group)},
        "capabilities": dict.fromkeys(_CAPABILITIES, kept),
        "noNewPrivileges": "no-new-privileges:true" in service.get("security_opt", ()),
        "rlimits": [],
    }
    if "ALL" not in service.get("cap_drop", ()):
        raise SystemExit("a service must drop all capabilities")
    spec["root"] = {"path": str(image.files), "readonly": bool(service.get("read_only"))}
    alone = service.get("network_mode") == "none"
    network = {"type": "network"} | ({} if alone else {"path": f"/run/netns/{NETWORK}"})
    spaces = [
        one for one in spec["linux"]["namespaces"] if one["type"] not in ("network", "cgroup")
    ]
    spec["linux"]["namespaces"] = [*spaces, network]


def _hosts(work: Path) -> dict[str, Any]:
    """The names that an engine would know; all of them share one loopback here."""
    file = work / "hosts"
    file.write_text("127.0.0.1 localhost aggregator\n")
    return {
        "destination": "/etc/hosts",
        "type": "bind",
        "source": str(file),
        "options": ["bind", "ro"],
    }
