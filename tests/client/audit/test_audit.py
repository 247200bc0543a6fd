"""The audit log: whatever is done to its bytes is found."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.audit.log import AuditLog
from client.audit.verify import entries, verify
from fedward.errors import AuditError

KEY = b"k" * 32


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit") / "log"
    log = AuditLog(folder, KEY)
    for number in range(6):
        log.append("sent", study="s", round=number)
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "log")
    return tmp_path / "log"


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "audit.jsonl").read_bytes().splitlines(keepends=True)


def put(folder: Path, lines: list[bytes]) -> None:
    (folder / "audit.jsonl").write_bytes(b"".join(lines))


def test_a_log_is_whole_and_readable_by_its_owner_alone(written: Path) -> None:
    found = verify(written, KEY)
    assert found.whole
    assert found.entries == 6
    assert [one.fields["round"] for one in entries(written)] == list(range(6))
    assert all(path.stat().st_mode & 0o077 == 0 for path in written.iterdir())


def test_an_edit_a_deletion_an_insertion_a_move_and_a_cut_are_found(copy: Path) -> None:
    whole = lines_of(copy)
    edited = json.loads(whole[2])
    edited["fields"]["round"] = 99
    changes = {
        "edited": [*whole[:2], json.dumps(edited).encode() + b"\n", *whole[3:]],
        "deleted": [*whole[:2], *whole[3:]],
        "inserted": [*whole[:3], whole[2], *whole[3:]],
        "reordered": [whole[0], whole[2], whole[1], *whole[3:]],
        "truncated": whole[:-2],
    }
    for name, lines in changes.items():
        put(copy, lines)
        found = verify(copy, KEY)
        assert not found.whole, name
        with pytest.raises(AuditError):
            found.enforce()
    put(copy, whole)
    assert verify(copy, KEY).whole


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10_000), by=st.integers(1, 255))
def test_any_changed_byte_is_found(written: Path, place: int, by: int) -> None:
    content = bytearray((written / "audit.jsonl").read_bytes())
    kept = bytes(content)
    content[place % len(content)] ^= by
    try:
        (written / "audit.jsonl").write_bytes(bytes(content))
        assert not verify(written, KEY).whole
    finally:
        (written / "audit.jsonl").write_bytes(kept)


def test_who_lacks_the_key_cannot_write_the_chain_anew(tmp_path: Path) -> None:
    forger = AuditLog(tmp_path / "log", b"other key, other key, other key!")
    forger.append("sent", study="s", round=1)
    assert not verify(tmp_path / "log", KEY).whole


def test_a_chain_goes_on_over_segments_and_restarts(tmp_path: Path) -> None:
    for number in range(30):
        AuditLog(tmp_path / "log", KEY, max_bytes=1500).append("sent", round=number)
    found = verify(tmp_path / "log", KEY)
    assert found.whole
    assert found.entries == 30
    assert len(list((tmp_path / "log").glob("*.jsonl"))) > 1


def _append(folder: Path) -> None:
    log = AuditLog(folder, KEY)
    for number in range(20):
        log.append("sent", round=number)


def test_several_processes_share_one_chain(tmp_path: Path) -> None:
    AuditLog(tmp_path / "log", KEY)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path / "log",)) for _ in range(3)]
    for one in writers:
        one.start()
    for one in writers:
        one.join(60)
    found = verify(tmp_path / "log", KEY)
    assert found.whole
    assert found.entries == 60


def test_a_full_disk_is_an_error_and_no_half_entry(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", KEY)
    log.append("sent", round=1)
    size = (tmp_path / "log" / "audit.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, before[1]))
    try:
        with pytest.raises(AuditError, match="writable"):
            log.append("sent", round=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    log.append("sent", round=3)
    assert verify(tmp_path / "log", KEY).whole


@pytest.mark.integration
def test_a_kill_while_writing_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from client.audit.log import AuditLog\n"
        f"log = AuditLog(Path({str(tmp_path / 'log')!r}), {KEY!r}); n = 0\n"
        "while True:\n    n += 1; log.append('sent', round=n); print(n, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ}, text=True
    )
    assert process.stdout is not None
    with process.stdout as told:
        said = 0
        for line in told:
            said = int(line)
            if said > 30:
                process.kill()
                break
    process.wait()
    log = AuditLog(tmp_path / "log", KEY)
    log.append("started", process="trainer")
    found = verify(tmp_path / "log", KEY)
    assert found.whole
    assert found.entries >= said + 1
