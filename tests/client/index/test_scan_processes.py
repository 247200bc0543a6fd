"""A scan as a process: what Ctrl-C and SIGKILL leave, what it prints, how much memory it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedward.errors import OutputError
from fedward_client.index.scan import scan
from fedward_client.index.store import open_index

HERE = Path(__file__).parents[3]
PLANTED = ("DOE^JANE", "MRN4711", "1.2.826.0.99.4711", "19550712", "ward-7-doe", "ACC99123")
PROGRAM = """
import json, resource, sys
from pathlib import Path
from fedward_client.index.extract import Extractor
from fedward_client.index.scan import Limits, scan
from fedward_client.index.store import open_index
if __name__ == "__main__":
    state, root = Path(sys.argv[1]), Path(sys.argv[2])
    with open_index(state, "chest") as index:
        try:
            done = scan(Extractor(root, "dicom", b"k" * 32), index, Limits(workers=2))
        except BaseException as error:
            print(type(error).__name__, error)
            raise SystemExit(getattr(error, "exit_code", 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"new": done.new, "known": done.unchanged, "peak": peak}))
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    running = []

    def start(root: Path, state: str = "state") -> subprocess.Popen[str]:
        running.append(
            subprocess.Popen(
                [sys.executable, str(tmp_path / "program.py"), str(tmp_path / state), str(root)],
                env={**os.environ, "PYTHONPATH": str(HERE)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Whoever starts the tests in the background may have Ctrl-C ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def until(condition, seconds: float = 60.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def count(state: Path) -> int:
    try:
        with open_index(state, "chest") as index:
            return index.count()
    except OutputError:  # the other process is making its table
        return 0


@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_scan_that_is_stopped_keeps_what_it_read_and_leaves_no_process(
    tmp_path, export, dx, start, number, code
):
    for k in range(250):
        (export / f"{k:04d}.txt").write_text(f"{k}")
    dx(export / "zzz" / "slow.dcm", np.zeros((60_000, 8, 8)))
    process = start(export)
    until(lambda: process.poll() is not None or count(tmp_path / "state") >= 200)
    workers = children_of(process.pid)
    process.send_signal(number)
    out, err = process.communicate(timeout=90)
    assert process.returncode == code
    if number == signal.SIGINT:
        assert out.startswith("Interrupted the scan was interrupted")
        assert not err
        until(lambda: not any(alive(pid) for pid in workers), 10)
    assert not any(planted in out + err for planted in PLANTED)
    kept = count(tmp_path / "state")
    assert kept >= 200
    (export / "zzz" / "slow.dcm").unlink()
    again = start(export)
    out, _ = again.communicate(timeout=60)
    found = json.loads(out)
    assert (found["known"], found["new"]) == (kept, 271 - kept)
    until(lambda: not any(alive(pid) for pid in workers), 90)


@pytest.mark.integration
def test_memory_does_not_grow_with_the_number_of_files(tmp_path, start):
    peaks = {}
    for number in (300, 1500):
        root = tmp_path / f"root-{number}"
        root.mkdir()
        for k in range(number):
            (root / f"{k:05d}.txt").write_text(str(k))
        out, err = start(root, f"state-{number}").communicate(timeout=120)
        assert not err
        peaks[number] = json.loads(out)["peak"]  # KiB
        assert json.loads(out)["new"] == number
    assert abs(peaks[1500] - peaks[300]) < 4096


def test_a_worker_does_not_load_torch():
    code = (
        "import sys, fedward_client.worker_pool, fedward_client.index.extract; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.integration
def test_an_open_index_holds_no_identifier(tmp_path, export):
    from fedward_client.index.extract import Extractor

    with open_index(tmp_path / "state", "chest") as index:
        heard = []
        scan(Extractor(export, "dicom", b"k" * 32), index, listen=lambda s: heard.append(repr(s)))
        files = list((tmp_path / "state").rglob("chest*"))
        assert {file.suffix for file in files} == {".sqlite", ".sqlite-wal", ".sqlite-shm"}
        content = b"".join(file.read_bytes() for file in files)
        assert b"DX" in content
        for planted in (*PLANTED, "labels.csv", "odd"):
            assert planted.encode() not in content
            assert planted not in "".join(heard)
