"""Build every image with buildah, without an engine, on a base made from Debian."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
ROLES: Final = ("server", "connector", "importer", "trainer")
BASE: Final = "python:3.11-slim"
_PATH: Final = "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
# Debian 12 has Python 3.11; these are what the Dockerfiles need of their base.
_PACKAGES: Final = "python3,python3-venv,ca-certificates"


@dataclass(frozen=True)
class Image:
    """A built image, and its files on this machine.

    Attributes
    ----------
    role : str
        Whose.
    name : str
        Its tag.
    config : dict
        What it says about user, entry point, environment and health check.
    files : Path
        Its root, mounted.
    """

    role: str
    name: str
    config: dict[str, Any]
    files: Path


def run(*command: str | Path) -> str:
    """Run a command; what it printed.

    Raises
    ------
    SystemExit
        It failed.
    """
    done = subprocess.run([*map(str, command)], text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip()


def buildah(work: Path, *words: str | Path) -> str:
    """Call buildah with a storage of its own, so that other images stay as they are."""
    return run("buildah", "--root", work / "storage", "--runroot", work / "run", *words)


def make_base(work: Path, mirror: str) -> None:
    """A Debian with Python under the name of the public base, unless one is there."""
    if buildah(work, "images", "--noheading", "--filter", f"reference={BASE}"):
        return
    files = work / "base"
    run("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", files, mirror)
    container = buildah(work, "from", "scratch")
    buildah(work, "copy", "--quiet", container, files, "/")
    buildah(work, "config", "--env", _PATH, container)
    buildah(work, "commit", "--quiet", "--format", "docker", container, BASE)
    buildah(work, "rm", container)


def build(work: Path, role: str, tag: str) -> Image:
    """Build one Dockerfile, and mount what came out of it."""
    name = f"fedward-{role}:{tag}"
    with tempfile.TemporaryDirectory() as folder:
        buildah(
            work,
            "build",
            "--isolation",
            "chroot",
            "--format",
            "docker",
            "--layers",
            "--pull-never",
            "--quiet",
            "--build-arg",
            "TORCH_INDEX=",
            *_pip_of_this_machine(Path(folder)),
            "--file",
            ROOT / f"docker/{role}.Dockerfile",
            "--tag",
            name,
            ROOT,
        )
    return mounted(work, role, name)


def mounted(work: Path, role: str, name: str) -> Image:
    """An image that is there already, with its files mounted."""
    told = json.loads(buildah(work, "inspect", "--type", "image", name))
    container = buildah(work, "from", "--pull-never", name)
    files = Path(buildah(work, "mount", container)).resolve()
    return Image(role, name, told["Docker"]["config"], files)


def _pip_of_this_machine(folder: Path) -> list[str]:
    """Where pip finds packages here, handed in for the time of the build only."""
    parser, volumes = ConfigParser(interpolation=None), dict[str, str]()
    parser["global"] = {}
    for line in run("pip", "config", "list").splitlines():
        name, _, quoted = line.partition("=")
        key, value = name.rpartition(".")[2], quoted.strip("'")
        if key != "constraint":
            parser["global"][key] = value
            volumes |= {place: place for place in _places(value)}
    with (folder / "pip.conf").open("w") as file:
        parser.write(file)
    volumes[str(folder / "pip.conf")] = "/etc/pip.conf"
    return [part for here, there in volumes.items() for part in ("--volume", f"{here}:{there}:ro")]


def _places(value: str) -> list[str]:
    """Folders and files of this machine that a setting names."""
    found = [Path(one) for one in re.findall(r"(?:file://|^|\s)(/[^\s]+)", value)]
    return [str(one.parent if one.name == "simple" else one) for one in found if one.exists()]
