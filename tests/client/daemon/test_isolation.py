"""What a process finds of its own network, in namespaces that are really made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client.daemon.isolation import find_readable

ROOT = Path(__file__).resolve().parents[3]
PAIR = "ip link add v0 type veth peer name v1"
FIND = f'{sys.executable} -c "from client.daemon.isolation import *; print(find_network().holds)"'


def found(*before: str) -> str:
    """What ``find_network`` says in a new network namespace after some commands."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("root and iproute2 can make network namespaces")
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", " && ".join((*before, FIND))], text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
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
