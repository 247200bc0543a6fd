"""What a process finds of its own network, in namespaces that are really made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedward_client.daemon.isolation import find_readable

ROOT = Path(__file__).resolve().parents[3]
PAIR = "ip link add v0 type veth peer name v1"
FIND = (
    f"{sys.executable} -c "
    "'from fedward_client.daemon.isolation import *; print(find_network().holds)'"
)


def found(*before: str) -> str:
    """What ``find_network`` says in a new network namespace after some commands."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("root and iproute2 can make network namespaces")
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", " && ".join((*before, FIND))],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    if "Not supported" in done.stderr or "Unknown device" in done.stderr:
        pytest.skip("this kernel makes no interfaces")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_empty_namespace_is_no_network_with_loopback_up_or_down() -> None:
    assert found() == found("ip link set lo up") == "True"


def test_an_interface_counts_once_it_is_up() -> None:
    assert found(PAIR) == "True"
    assert found(PAIR, "ip link set v0 up") == "False"


def test_a_route_counts_where_loopback_alone_is_up() -> None:
    assert found("ip link set lo up", "ip route add default dev lo") == "False"


def test_what_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "one").touch()
    assert find_readable([tmp_path / "gone"]).holds
    assert not find_readable([tmp_path / "gone", tmp_path / "full"]).holds


WALLED = """
import json, os, subprocess, sys
from pathlib import Path
from fedward_client.daemon.isolation import *
folder = Path(sys.argv[1])
cover([folder / "images", folder / "labels.csv"])
keep_from_writing([folder / "own"])
drop_privileges()
(folder / "own" / "kept").write_text("mine")
try:
    (folder / "site.toml").write_text("any_coordinator = true")
    changed = True
except OSError as error:
    changed = os.strerror(error.errno)
child = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
rights = {line.split()[1] for line in child.splitlines() if line.startswith(("CapEff", "CapBnd"))}
print(json.dumps({
    "images": os.listdir(folder / "images"), "labels": (folder / "labels.csv").read_text(),
    "hidden": find_readable([folder / "images", folder / "labels.csv"]).holds,
    "changed": changed, "unchangeable": find_writable([folder / "site.toml", folder]).holds,
    "own": find_writable([folder / "own"]).text, "rights": sorted(rights),
}))
"""


def test_behind_its_walls_a_process_sees_no_image_and_changes_nothing_but_its_folder(
    tmp_path: Path,
) -> None:
    for name in ("images", "own"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "1.dcm").write_text("pixels")
    (tmp_path / "labels.csv").write_text("DOE^JANE,yes")
    (tmp_path / "site.toml").write_text("any_coordinator = false")
    done = subprocess.run(
        [sys.executable, "-c", WALLED, tmp_path],
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if "the kernel makes no namespace" in done.stderr:
        pytest.skip("this kernel makes no namespaces for this user")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "images": [],
        "labels": "",
        "hidden": True,
        "changed": "Read-only file system",
        "unchangeable": True,
        "own": "1 of 1 places can be changed",
        "rights": ["0" * 16],
    }
    assert (tmp_path / "own" / "kept").read_text() == "mine"
    assert (tmp_path / "site.toml").read_text() == "any_coordinator = false"


def test_a_connector_s_user_that_is_nobody_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root starts the connector as another user")
    (tmp_path / "images").mkdir()
    (tmp_path / "site.toml").write_text(
        'version = 1\n[site]\nname = "a"\n[server]\naddress = "localhost:1"\nca = "ca.pem"\n'
        'user = "fedward-nobody"\n[datasets.x]\nroot = "images"\ntask = "classification"\n'
        'classes = ["a", "b"]\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "fedward_client.daemon.launch", "connector", tmp_path / "site.toml"],
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 19
    assert "server.user: the connector's user must exist on this machine" in done.stderr
    assert "Traceback" not in done.stderr
