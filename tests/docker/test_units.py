"""The systemd units: what they promise, and what systemd itself says of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedward_client.config import load_config

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "docker" / "systemd"
ROLES = ("trainer", "connector", "importer@", "server")
# The watch is an importer with a model: its user, and its walls.
role = pytest.mark.parametrize("role", (*ROLES, "watch@"))
HARD = (
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "ProtectSystem=strict",
    "ProtectHome=yes",
    "PrivateTmp=yes",
    "PrivateDevices=yes",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "ProtectProc=invisible",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged @resources",
    "UMask=0077",
)


def lines(role: str) -> list[str]:
    return (UNITS / f"fedward-{role}.service").read_text().splitlines()


@role
def test_every_unit_is_hard(role: str) -> None:
    assert set(HARD) <= set(lines(role))


def test_the_trainer_has_no_network_and_the_connector_no_image() -> None:
    assert {
        "PrivateNetwork=yes",
        "RestrictAddressFamilies=AF_UNIX",
        "IPAddressDeny=any",
        "InaccessiblePaths=-/var/lib/fedward/connector",
    } <= set(lines("trainer"))
    assert {
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "SocketBindDeny=any",
        "MemoryDenyWriteExecute=yes",
        "InaccessiblePaths=-/var/lib/fedward/trainer",
    } <= set(lines("connector"))
    assert {
        "InaccessiblePaths=-/var/lib/fedward/trainer -/var/lib/fedward/connector -/run/fedward",
        "IPAddressDeny=any",
        "SocketBindDeny=any",
        "MemoryDenyWriteExecute=yes",
    } <= set(lines("importer@"))
    walls = ("User=", "InaccessiblePaths=", "IPAddress", "SocketBind", "RestrictAddressFamilies=")
    both = ("importer@", "watch@")
    own, other = ([one for one in lines(which) if one.startswith(walls)] for which in both)
    assert own == other
    users = [[one for one in lines(which) if one.startswith("User=")] for which in ROLES]
    assert len({user for (user,) in users}) == len(ROLES)


def test_units_and_example_configuration_name_the_same_places() -> None:
    config = load_config(ROOT / "docker" / "site.toml", datasets_here=False)
    assert config.server is not None
    assert f"StateDirectory={config.site.state.relative_to('/var/lib')}" in lines("trainer")
    assert f"StateDirectory={config.server.state.relative_to('/var/lib')}" in lines("connector")
    assert f"RuntimeDirectory={config.trainer.socket.parent.relative_to('/run')}" in lines(
        "trainer"
    )
    assert f"StateDirectory={config.importer.state.relative_to('/var/lib')}" in lines("importer@")
    for which in ("trainer", "connector"):
        assert f"Group={config.trainer.group}" in lines(which)
    root = config.datasets["images"].root
    hidden = " ".join(one for one in lines("connector") if one.startswith("InaccessiblePaths="))
    assert any(root.is_relative_to(place) for place in re.findall(r"-(/[\w/]+)", hidden))
    text = (UNITS / "sysusers.conf").read_text()
    for name in (
        "fedward-link",
        "fedward-trainer",
        "fedward-connector",
        "fedward-importer",
        "fedward-server",
    ):
        assert re.search(rf"(?m)^[gu] {name}\b", text)


@pytest.fixture
def analyze(tmp_path: Path) -> str:
    """systemd-analyze, with units whose program exists."""
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("systemd-analyze is not here")
    for path in UNITS.glob("*.service"):
        text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={shutil.which('true')}", path.read_text())
        (tmp_path / path.name).write_text(text)
    return found


@role
def test_systemd_takes_the_unit_as_it_stands(role: str, analyze: str, tmp_path: Path) -> None:
    unit = str(tmp_path / f"fedward-{role}.service")
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", unit],
        text=True,
        capture_output=True,
        check=False,
    )
    said = [one for one in done.stderr.splitlines() if f"fedward-{role}" in one]
    assert done.returncode == 0 and not said, done.stderr


@role
def test_the_page_tells_the_exposure_that_systemd_finds(
    role: str, analyze: str, tmp_path: Path
) -> None:
    figures = {role.strip("@"): exposure(analyze, tmp_path / f"fedward-{role}.service")}
    if role == "trainer":
        shutil.copytree(UNITS / "fedward-trainer.service.d", tmp_path / "fedward-trainer.service.d")
        figures["trainer, with a GPU"] = exposure(analyze, tmp_path / "fedward-trainer.service")
    page = (ROOT / "docs" / "install.md").read_text("utf-8")
    for name, figure in figures.items():
        (told,) = re.findall(rf"(?m)^\| {name} \| ([\d.]+) \|", page)
        # Releases of systemd weigh options a little differently.
        assert abs(float(told) - figure) <= 0.5, name


def exposure(analyze: str, unit: Path) -> float:
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", str(unit)],
        text=True,
        capture_output=True,
        check=False,
    )
    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    return float(found[1])
