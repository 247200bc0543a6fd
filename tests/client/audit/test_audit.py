"""The audit log: whatever is done to its bytes is found."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedward.errors import AuditError
from fedward_client.audit.log import AuditLog
from fedward_client.audit.verify import entries, verify

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
    for kind, lines in changes.items():
        put(copy, lines)
        found = verify(copy, KEY)
        assert found.fault is not None, kind
        assert found.fault.kind == kind
        with pytest.raises(AuditError, match=f"{kind} at {found.fault.seq}"):
            found.enforce()
    put(copy, whole)
    assert verify(copy, KEY).whole


def rewritten(line: bytes, **changes: object) -> bytes:
    """An entry with another content and a hash that fits it, as an outsider can make it."""
    entry = {**json.loads(line), **changes}
    content = {k: v for k, v in entry.items() if k not in ("hash", "mac")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    entry["hash"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_the_hash_is_sha256_over_the_entry_and_the_one_before(written: Path) -> None:
    before = "0" * 64
    for line in lines_of(written):
        assert json.loads(rewritten(line)) == json.loads(line)
        assert json.loads(line)["prev"] == before
        before = json.loads(line)["hash"]
    head = json.loads((written / "head.json").read_bytes())
    assert (head["seq"], head["hash"]) == (6, before)


def test_a_chain_written_anew_is_found_by_the_key_and_only_by_it(copy: Path) -> None:
    *kept, last = lines_of(copy)
    forged = rewritten(last, fields={"study": "other"})
    put(copy, [*kept, forged])
    assert verify(copy).fault is not None  # the head knows another hash
    head = json.loads((copy / "head.json").read_bytes())
    head["hash"] = json.loads(forged)["hash"]
    (copy / "head.json").write_bytes(
        json.dumps(head, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    )
    assert verify(copy).whole
    found = verify(copy, KEY)
    assert found.fault is not None and (found.fault.kind, found.fault.seq) == ("edited", 6)


def test_an_entry_of_another_place_in_a_chain_that_fits_is_found(copy: Path) -> None:
    whole = lines_of(copy)
    put(copy, [*whole[:3], rewritten(whole[3], prev="0" * 64), *whole[4:]])
    found = verify(copy)
    assert found.fault is not None and found.fault.kind == "inserted"


def test_a_cut_log_and_a_head_that_is_gone_or_of_another_end_are_found(copy: Path) -> None:
    head = (copy / "head.json").read_bytes()
    AuditLog(copy, KEY).append("stopped")
    (copy / "head.json").write_bytes(head)  # as a crash leaves it, and mended by the next entry
    assert verify(copy, KEY).behind
    log = AuditLog(copy, KEY)
    log.append("started")
    assert verify(copy, KEY).whole and not verify(copy, KEY).behind
    (copy / "head.json").write_bytes(head)
    assert verify(copy, KEY).fault is not None
    with pytest.raises(AuditError, match="whole"):
        AuditLog(copy, KEY)
    (copy / "head.json").unlink()
    assert verify(copy, KEY).fault is not None
    with pytest.raises(AuditError, match="whole"):
        AuditLog(copy, KEY)
    (copy / "audit.jsonl").unlink()
    with pytest.raises(AuditError, match="readable"):
        verify(copy, KEY)


@pytest.mark.parametrize("keep", [1, 60, -1])
def test_a_write_that_did_not_finish_is_set_aside_and_told(copy: Path, keep: int) -> None:
    half = lines_of(copy)[-1][:keep]
    with (copy / "audit.jsonl").open("ab") as file:
        file.write(half)
    found = verify(copy, KEY)
    assert found.fault is not None and (found.fault.kind, found.fault.seq) == ("torn", 7)
    AuditLog(copy, KEY).append("started")
    assert verify(copy, KEY).whole
    assert [one.event for one in entries(copy)][-2:] == ["repaired", "started"]
    assert (copy / "torn-000000000007.bin").read_bytes() == half


def test_an_entry_that_was_whole_is_not_repaired_away(copy: Path) -> None:
    content = (copy / "audit.jsonl").read_bytes()
    (copy / "audit.jsonl").write_bytes(content[:-30])
    assert verify(copy, KEY).fault is not None
    with pytest.raises(AuditError, match="whole"):
        AuditLog(copy, KEY)
    assert (copy / "audit.jsonl").read_bytes() == content[:-30]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_other_bytes_of_log_or_head_are_found(written: Path, data: st.DataObject) -> None:
    path = written / data.draw(st.sampled_from(["audit.jsonl", "head.json"]))
    kept = path.read_bytes()
    start = data.draw(st.integers(0, len(kept)))
    end = data.draw(st.integers(start, min(len(kept), start + 40)))
    new = kept[:start] + data.draw(st.binary(max_size=8)) + kept[end:]
    assume(new != kept)
    try:
        path.write_bytes(new)
        assert not verify(written, KEY).whole
    finally:
        path.write_bytes(kept)


def test_a_segment_that_is_gone_is_found(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", KEY, max_bytes=1000)
    for number in range(20):
        log.append("sent", round=number)
    full = sorted((tmp_path / "log").glob("audit-*.jsonl"))
    kept = full[1].read_bytes()
    full[1].unlink()
    found = verify(tmp_path / "log", KEY)
    assert found.fault is not None and found.fault.kind == "deleted"
    full[1].write_bytes(kept)
    assert verify(tmp_path / "log", KEY).whole


@pytest.mark.parametrize("fields", [{"x": float("nan")}, {"x": b"a"}, {"x": "a" * (2 << 20)}])
def test_what_is_not_plain_json_is_not_written(tmp_path: Path, fields: dict[str, Any]) -> None:
    log = AuditLog(tmp_path / "log", KEY)
    with pytest.raises(AuditError, match="plain JSON"):
        log.append("sent", **fields)
    with pytest.raises(AuditError, match="known"):
        log.append("gossip")  # type: ignore[arg-type]
    log.append("sent", tuple=(1, 2), nested={"a": [1.5, None, "ä\n"]})
    assert verify(tmp_path / "log", KEY).entries == 1


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
    assert (tmp_path / "log" / "audit.jsonl").stat().st_size == size
    log.append("sent", round=3)
    assert verify(tmp_path / "log", KEY).whole
    assert [one.fields["round"] for one in entries(tmp_path / "log")] == [1, 3]


@pytest.mark.integration
def test_a_kill_while_writing_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedward_client.audit.log import AuditLog\n"
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
