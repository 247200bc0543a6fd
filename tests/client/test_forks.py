"""Forked processes: quick, alone with their pipe, gone with whoever asked for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from fedward.errors import DeviceError
from fedward_client import worker_pool
from fedward_client.worker_pool import ForkedProcess, fork

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.integration
MODULE = """
import ctypes, os, sys, threading
def tell(connection):
    opened = []
    for name in os.listdir("/proc/self/fd"):
        try:
            opened.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    connection.send([os.getpid(), sorted(opened), threading.active_count(),
                     "decimal" in sys.modules, len(os.listdir("/proc/self/task")),
                     ctypes.CDLL(None).prctl(3)])
    connection.recv()
"""
ORPHANS = """
import time
from multiprocessing import Pipe
from fedward_client.worker_pool import fork
import told
if __name__ == "__main__":
    ours, theirs = Pipe()
    made = fork(told.tell, [], theirs)
    theirs.close()
    ours.recv()
    print(made.pid, flush=True)
    time.sleep(600)
"""
UNGUARDED = """
from multiprocessing import Pipe
from fedward_client.worker_pool import fork
import told
print("begins", flush=True)
ours, theirs = Pipe()
made = fork(told.tell, [], theirs)
print(ours.recv()[0] == made.pid, flush=True)
made.kill()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("told")
    (folder / "told.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    import told

    yield told
    sys.path.remove(str(folder))


def start(told: Any) -> tuple[ForkedProcess, Connection]:
    ours, theirs = Pipe()
    made = fork(told.tell, ["decimal"], theirs)
    theirs.close()
    return made, ours


def test_it_has_its_pipe_and_nothing_else_of_this_process(told: Any, tmp_path: Path) -> None:
    with (tmp_path / "ours").open("w"):
        (first, one), (second, two) = start(told), start(told)
        pids = []
        for made, connection in ((first, one), (second, two)):
            pid, opened, threads, imported, tasks, dumpable = connection.recv()
            assert pid == made.pid
            assert (threads, tasks, imported) == (1, 1, True)
            assert dumpable == 0  # no other process of this user can look into it
            sockets = [name for name in opened if name.startswith("socket:")]
            assert len(sockets) == 1
            assert not any(str(tmp_path) in name for name in opened)
            pids.append(pid)
        assert len(set(pids)) == 2
        parent = int(Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent != os.getpid()
        first.kill()
        second.kill()
        first.kill()  # twice does no harm
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_several_threads_may_end_it_at_once(told: Any) -> None:
    """Was: a trainer that was stopped while it prepared images sometimes ended with a traceback."""
    made, _connection = start(told)
    at_once, failed = threading.Barrier(8), list[OSError]()

    def end() -> None:
        at_once.wait()
        try:
            made.kill()
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=end) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not Path(f"/proc/{made.pid}").exists()


def test_another_takes_the_place_of_a_template_that_was_killed(told: Any) -> None:
    made, connection = start(told)
    assert worker_pool._template is not None
    before = worker_pool._template.process.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    again, other = start(told)
    assert connection.recv()[0] == made.pid
    assert other.recv()[0] == again.pid
    assert worker_pool._template.process.pid != before
    connection.close()  # what has no reader left ends
    assert made.wait(10)
    again.kill()


def test_a_machine_without_room_for_a_process_is_told(
    told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(worker_pool, "_template", None)
    monkeypatch.setattr("subprocess.Popen", full)
    with pytest.raises(DeviceError, match="raise the limit of processes"):
        start(told)


def test_threads_may_ask_at_the_same_time(told: Any) -> None:
    made: list[tuple[ForkedProcess, Connection]] = []
    threads = [threading.Thread(target=lambda: made.append(start(told))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.pid for one, _ in made) == sorted(link.recv()[0] for _, link in made)
    for one, _ in made:
        one.kill()


def script(text: str, told: Any, folder: Path) -> subprocess.Popen[bytes]:
    (folder / "asks.py").write_text(text)
    paths = os.pathsep.join([str(ROOT), str(Path(told.__file__).parent)])
    return subprocess.Popen(
        [sys.executable, str(folder / "asks.py")],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
    )


def test_a_script_needs_no_guard_and_runs_once(told: Any, tmp_path: Path) -> None:
    done, _ = script(UNGUARDED, told, tmp_path).communicate(timeout=60)
    assert done.decode().split() == ["begins", "True"]


def test_all_end_when_the_process_that_asked_is_killed(told: Any, tmp_path: Path) -> None:
    asks = script(ORPHANS, told, tmp_path)
    assert asks.stdout
    pid = json.loads(asks.stdout.readline())
    stat = Path(f"/proc/{pid}/stat")
    template = int(stat.read_text().rpartition(")")[2].split()[1])
    asks.kill()
    asks.wait()
    asks.stdout.close()
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() or Path(f"/proc/{template}").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
