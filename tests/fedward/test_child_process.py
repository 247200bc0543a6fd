"""A process ends with the one that started it, also where that one is the first of a container."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
START = """
import os, signal, subprocess, sys
from fedward.child_process import end_with_parent
child = subprocess.Popen(sys.argv[1:], preexec_fn=end_with_parent(signal.SIGTERM))
print(child.pid, flush=True)
sys.exit(child.wait())
"""


def test_a_child_of_process_one_lives() -> None:
    if os.geteuid():
        pytest.skip("root can make process namespaces")
    done = subprocess.run(
        ["unshare", "--pid", "--fork", sys.executable, "-c", START, "sh", "-c", "exit 7"],
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 7


def test_a_child_ends_with_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", START, sys.executable, "-c", "import time; time.sleep(60)"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    watch = os.pidfd_open(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert select.select([watch], [], [], 10)[0], "the child went on"
    os.close(watch)
    parent.stdout.close()
