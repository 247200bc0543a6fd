"""Build the images, run them, and check the compose files, all without a container engine.

    python docker/check

Needs root, and of Debian: buildah, debootstrap, runc and iproute2. It makes its base from Debian
under the name ``python:3.11-slim``, builds every Dockerfile on it, and runs the federation of
``federation.yaml`` to the end of its study in real containers.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import federation
import spec
from images import ROLES, ROOT, Image, build, buildah, make_base, mounted, run
from oci import Container, Volumes, start

_TOOLS = ("gcc", "cc", "c++", "make", "ld", "pip", "pip3", "uv", "git", "curl", "wget")
_ABSENT = {
    "server": ("pydicom", "highdicom", "nibabel", "ray", "pip", "uv"),
    "connector": ("torch", "monai", "opacus", "pydicom", "PIL", "nibabel", "ray", "pip", "uv"),
    "importer": ("torch", "monai", "flwr", "PIL", "pylibjpeg", "pip", "uv"),
    "trainer": ("flwr", "fastapi", "httpx", "uvicorn", "ray", "pip", "uv"),
}
_LOOK = """
import importlib.metadata as m, importlib.util as u, sys
print(*(f"{d.metadata['Name']}=={d.version}" for d in m.distributions()))
print(*(name for name in sys.argv[1:] if u.find_spec(name)))
"""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="of Debian")
    parser.add_argument("--work", type=Path, help="folder for what is made; else a temporary one")
    parser.add_argument("--built", action="store_true", help="take the images that are there")
    parser.add_argument("--keep", action="store_true", help="leave the images")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedward-check-") as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        spec.check_all(work)
        tag = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        if not asked.built:
            make_base(work, asked.mirror)
        images = [_image(work, role, tag, built=asked.built) for role in ROLES]
        for image in images:
            _check(image, work)
        services = spec.load(ROOT / "docker" / "federation.yaml", os.environ)["services"]
        federation.check(services, {image.name: image for image in images}, work)
        buildah(work, "rm", "--all")
        if not asked.keep:
            buildah(work, "rmi", "--all", "--force")


def _image(work: Path, role: str, tag: str, *, built: bool) -> Image:
    name = f"fedward-{role}:{tag}"
    image = mounted(work, role, name) if built else build(work, role, tag)
    size = int(run("du", "-sm", image.files).split()[0])
    print(f"{image.name}: {size} MB")
    return image


def _check(image: Image, work: Path) -> None:
    """Its entry point starts; it is not root; nothing that is not pinned, and no tool, is in it."""
    _demand(image.config["User"].split(":")[0] not in ("", "0", "root"), "the user is not root")
    _demand(bool(image.config.get("Healthcheck")), "there is a health check")
    help_text = _run(image, work, [*image.config["Entrypoint"], "--help"])
    _demand("Usage" in help_text, "the entry point starts")
    found = _run(image, work, ["sh", "-c", f"command -v {' '.join(_TOOLS)} || true"])
    _demand(not found.strip(), f"no tool that builds or fetches {found}")
    installed, present = _run(
        image, work, ["python", "-c", _LOOK, *_ABSENT[image.role]]
    ).splitlines()
    _demand(not present, f"nothing that it must not hold {present}")
    loose = _loose(installed.split())
    _demand(not loose, f"every package is pinned {loose}")


def _loose(installed: list[str]) -> list[str]:
    """Packages of another version than constraints.txt says; a local build satisfies a pin."""
    plain = [re.sub(r"\+.*", "", _named(one)) for one in installed]
    pins = {_named(one) for one in (ROOT / "constraints.txt").read_text().split() if "==" in one}
    return [one for one in plain if one not in pins and not one.startswith("fedward==")]


def _named(pin: str) -> str:
    name, _, version = pin.partition("==")
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


def _run(image: Image, work: Path, command: list[str]) -> str:
    """Run a command in the image as its user, sealed as a service is."""
    service = {
        "entrypoint": command,
        "command": [],
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "network_mode": "none",
        "tmpfs": ["/tmp"],
    }
    made: Container = start(f"try-{image.role}", service, image, Volumes(work / "v", ROOT))
    made.process.wait()
    return made.log.read_text()


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"NOT SO: {what}")
    print(f"  so: {what}")


if __name__ == "__main__":
    if os.geteuid():
        raise SystemExit("it needs root, for namespaces and mounts")
    for tool in ("buildah", "debootstrap", "runc", "ip"):
        if subprocess.run(["which", tool], capture_output=True, check=False).returncode:
            sys.exit(f"{tool} must be installed: apt-get install buildah debootstrap runc iproute2")
    main()
