"""What the Dockerfiles promise, and that the lists of what they install are complete."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("server", "connector", "importer", "trainer")
OURS = {"fedward", "fedward_client", "fedward_server", "fedward_strategies", "fedward_simulation"}
role = pytest.mark.parametrize("role", ROLES)
# Where each process and the commands of its people begin.
BEGIN = {
    "server": ("server", "strategies", "fedward"),
    "connector": (
        "client/fedward_client/connector",
        "client/fedward_client/link",
        "client/fedward_client/daemon",
        "client/fedward_client/commands/daemon.py",
        "client/fedward_client/cli.py",
        "client/fedward_client/config.py",
        "client/fedward_client/enrol.py",
        "client/fedward_client/health.py",
        "fedward/tensors.py",
        "fedward/signing.py",
        "fedward/protocol.py",
    ),
    "importer": (
        "client/fedward_client/importer",
        "client/fedward_client/commands/fetch.py",
        "client/fedward_client/commands/store.py",
        "client/fedward_client/commands/walls.py",
        "client/fedward_client/commands/data.py",
        "client/fedward_client/doctor/pacs.py",
        "client/fedward_client/cli.py",
        "client/fedward_client/config.py",
    ),
    "trainer": (
        "client/fedward_client/trainer",
        "client/fedward_client/link",
        "client/fedward_client/daemon",
        "client/fedward_client/commands",
        "client/fedward_client/cohort",
        "client/fedward_client/data",
        "client/fedward_client/index",
        "client/fedward_client/training",
        "client/fedward_client/ledger",
        "client/fedward_client/audit",
        "client/fedward_client/policy",
        "client/fedward_client/egress",
        "client/fedward_client/cli.py",
        "client/fedward_client/health.py",
        "fedward",
    ),
}
# The network's side of the shared package: an import contract keeps the trainer from it.
NETWORK = {"fedward/flower", "fedward/connections.py", "fedward/https.py"}
# Asked for in another image only, and told so where it is missing.
ELSEWHERE: dict[str, set[str]] = {
    "server": set(),
    "connector": set(),
    "importer": set(),
    "trainer": {"flwr", "httpx"},
}


def text(role: str) -> str:
    return (ROOT / "docker" / f"{role}.Dockerfile").read_text("utf-8")


def stages(role: str) -> list[str]:
    return re.split(r"(?m)^FROM ", text(role))[1:]


def wanted(role: str) -> set[str]:
    lines = (ROOT / "docker" / "requirements" / f"{role}.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def names(role: str) -> set[str]:
    return {plain(Requirement(line).name) for line in wanted(role)}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@role
def test_the_last_stage_is_not_root_and_is_looked_after(role: str) -> None:
    last = stages(role)[-1]
    (user,) = re.findall(r"(?m)^USER (.+)$", last)
    number, _, group = user.partition(":")
    assert int(number) >= 10000 and int(group) >= 10000
    if role == "importer":  # it ends, and says how
        assert "\nHEALTHCHECK NONE\n" in last
    else:
        (check,) = re.findall(r"HEALTHCHECK (?:.*\\\n)*.*CMD \[(.+)\]", last)
        assert "health" in check
    (entry,) = re.findall(r'(?m)^ENTRYPOINT \["(.+)"\]$', last)
    assert entry in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@role
def test_the_last_stage_fetches_and_builds_nothing(role: str) -> None:
    first, last = stages(role)
    assert "AS build" in first.splitlines()[0]
    assert not re.search(r"pip install|apt-get|curl|wget|ADD ", last)
    assert re.findall(r"(?m)^COPY (.+)$", last) == ["--from=build /opt/fedward /opt/fedward"]


@role
def test_everything_is_pinned(role: str) -> None:
    assert re.findall(r"(?m)^ARG BASE=(.+)$", text(role)) == ["python:3.11-slim"]
    assert all(stage.startswith("${BASE}") for stage in stages(role))
    assert "latest" not in text(role)
    assert "PIP_CONSTRAINT=/src/constraints.txt" in text(role)
    pins = {
        plain(line.partition("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert names(role) <= pins


def imported(role: str) -> set[str]:
    """What a role's modules import, at their top or later, but for types."""
    found: set[str] = set()
    apart = {ROOT / path for path in NETWORK} if role == "trainer" else set()
    for path in BEGIN[role]:
        place = ROOT / path
        for file in [place] if place.suffix else sorted(place.rglob("*.py")):
            if apart & {file, *file.parents}:
                continue
            tree = ast.parse(file.read_text("utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                    node.body = []
                if isinstance(node, ast.Import):
                    found |= {one.name.split(".")[0] for one in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.split(".")[0])
    return found - OURS - set(sys.stdlib_module_names)


def with_what_they_need(lines: set[str]) -> set[str]:
    """Distributions, with everything that comes along when they are installed."""
    found: set[str] = set()
    left = [Requirement(line) for line in lines]
    while left:
        one = left.pop()
        key = f"{plain(one.name)}[{','.join(sorted(one.extras))}]"
        if key not in found:
            found |= {key, plain(one.name)}
            left += _needs(one)
    return found


def _needs(one: Requirement) -> list[Requirement]:
    extras = {*one.extras, ""}
    with suppress(PackageNotFoundError):
        return [
            need
            for need in map(Requirement, requires(one.name) or ())
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras)
        ]
    return []


@pytest.fixture(scope="module")
def known() -> Mapping[str, list[str]]:
    """Distributions by what they are imported as."""
    return packages_distributions()


@role
def test_what_a_role_imports_is_in_its_image(role: str, known: Mapping[str, list[str]]) -> None:
    installed = with_what_they_need(wanted(role))
    for name in sorted(imported(role) - ELSEWHERE[role]):
        found = {plain(one) for one in known.get(name, [name])}
        assert found & installed, f"{name} is in no list of the {role}"


def test_no_image_holds_what_it_must_not() -> None:
    assert not names("connector") & {"torch", "monai", "opacus", "pydicom", "pillow", "nibabel"}
    assert not names("trainer") & {"flwr", "httpx", "fastapi", "uvicorn"}
    assert not names("importer") & {"torch", "flwr", "pylibjpeg", "pillow"}
    assert not names("trainer") & {"pynetdicom", "dicomweb-client", "requests"}
    assert not names("server") & {"pydicom", "highdicom", "nibabel", "pylibjpeg"}


def test_only_the_code_goes_into_a_build() -> None:
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    folders = {name.removeprefix("fedward_") for name in OURS} | {"studies"}
    assert allowed == folders | {
        "LICENSE",
        "README.md",
        "constraints.txt",
        "docker/requirements",
        "pyproject.toml",
    }
