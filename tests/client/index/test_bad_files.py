"""Trees and files that nobody would make on purpose: each is counted, none stops a scan."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from fedward_client.data.files import find
from fedward_client.data.options import PatientOptions
from fedward_client.index.extract import AGAIN, Extractor, FileFacts
from fedward_client.index.scan import Limits, scan
from fedward_client.index.store import Index, open_index
from fedward_client.worker_pool import Worker

SECRET = b"k" * 32
ONE = Limits(workers=1)


def by_path(root: Path, index: Index, limits: Limits = ONE, **settings: Any) -> Any:
    extract = Extractor(root, settings.pop("format", "dicom"), SECRET, **settings)
    scan(extract, index, limits)
    facts = {one.path: one for one in index.facts()}
    return lambda path: facts[extract.name(path)]


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with open_index(tmp_path / "state", "odd") as index:
        yield index


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A folder into which another user can look."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    yield root
    shutil.rmtree(root)


@pytest.mark.integration
def test_a_tree_deeper_than_the_stack(tmp_path, index, dx):
    root = tmp_path / "root"
    root.mkdir()
    start, below = Path.cwd(), "d"
    try:
        os.chdir(root)
        for _ in range(1100):
            Path(below).mkdir()
            os.chdir(below)
        Path("x.txt").write_text("hello")
        os.chdir(start)
        assert by_path(root, index)(root / "/".join([below] * 1100) / "x.txt").reason == "not DICOM"
        assert index.count() == 1
    finally:
        os.chdir(root / "/".join([below] * 1100))
        Path("x.txt").unlink(missing_ok=True)
        for _ in range(1100):
            os.chdir("..")
            Path(below).rmdir()
        os.chdir(start)


@pytest.mark.integration
def test_names_that_are_no_text(tmp_path, index, dx):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    name = Path(os.fsdecode(b"caf\xe9\n.dcm"))
    shutil.copy(dx(tmp_path / "a.dcm", np.ones((4, 4))), root / "sub" / name)
    found = by_path(root, index)
    assert found(root / "sub" / name).reason == ""
    assert found(root / "sub" / name).high == 1.0


def test_the_order_is_the_same_and_links_are_not_entered(tmp_path):
    for name in ("b/2", "b/1", "a/1", "z", ".hidden/1", "__MACOSX/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "itself").symlink_to(tmp_path / "a" / "itself")
    found = [path.relative_to(tmp_path).as_posix() for path in find(tmp_path)]
    assert found == ["z", "a/1", "a/itself", "b/1", "b/2"]
    assert [path.name for path in find(tmp_path, without=("a", "b"))] == ["z"]
    found = [path.relative_to(tmp_path).as_posix() for path in find(tmp_path, skipped=True)]
    assert found == [".hidden", "__MACOSX", "z", "a/1", "a/itself", "a/up", "b/1", "b/2"]


@pytest.mark.integration
def test_what_is_not_entered_is_counted(tmp_path, index, dx):
    root = tmp_path / ".export"  # a dataset may lie in a hidden folder
    shown = dx(root / "sub" / "a.dcm", np.ones((4, 4)))
    for name in (".trash", "__MACOSX"):
        dx(root / name / "b.dcm", np.ones((4, 4)))
    (root / "sub" / ".a.dcm").write_bytes(shown.read_bytes())
    (root / "sub" / "Thumbs.db").write_bytes(b"")
    (root / "up").symlink_to(root)
    dx(tmp_path / "elsewhere" / "c.dcm", np.ones((4, 4)))
    (root / "more").symlink_to(tmp_path / "elsewhere")
    found = by_path(root, index)
    assert found(shown).reason == ""
    hidden = (".trash", "__MACOSX", "sub/.a.dcm", "sub/Thumbs.db")
    assert {found(root / name).reason for name in hidden} == {"hidden"}
    assert {found(root / name).reason for name in ("up", "more")} == {"linked folder"}
    assert index.count() == 7
    again = scan(Extractor(root, "dicom", SECRET), index, ONE)
    assert (again.new, again.unchanged) == (0, 7)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can read as another user")
def test_what_may_not_be_read_is_counted_and_tried_again(open_root, index, dx):
    (open_root / "file.dcm").write_bytes(dx(open_root / "a.dcm", np.ones((4, 4))).read_bytes())
    (open_root / "shut").mkdir(mode=0o700)
    (open_root / "shut" / "b.dcm").write_bytes(b"")
    (open_root / "file.dcm").chmod(0o600)
    extract = Extractor(open_root, "dicom", SECRET)
    os.seteuid(65534)
    try:
        facts = {path.name: extract(path) for path in find(open_root)}
    finally:
        os.seteuid(0)
    assert {name: one.reason for name, one in facts.items()} == {
        "a.dcm": "",
        "file.dcm": "not permitted",
        "shut": "not permitted",
    }
    index.put(facts.values(), [], index.next_scan(), extract.settings)
    summary = scan(extract, index, ONE)
    assert (summary.new, summary.unchanged, summary.gone) == (2, 1, 1)
    assert summary.reasons == {"not DICOM": 1}


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, index):
    path, over = tmp_path / "root" / "growing.dcm", threading.Event()
    path.parent.mkdir()
    path.write_bytes(bytes(30 << 20))

    def grow() -> None:
        with path.open("ab") as file:
            while not over.wait(0.001):
                file.write(b"x")
                file.flush()

    thread = threading.Thread(target=grow)
    thread.start()
    extract = Extractor(path.parent, "dicom", SECRET)
    time.sleep(0.01)
    facts = extract(path)
    over.set()
    thread.join()
    assert (facts.reason, facts.modified, facts.digest) == ("changed while read", AGAIN, "")
    index.put([facts], [], index.next_scan(), extract.settings)
    assert scan(extract, index, ONE).reasons == {"not DICOM": 1}
    assert scan(extract, index, ONE).unchanged == 1


def test_the_same_times_and_size_do_not_hide_another_file(tmp_path, dx):
    root = tmp_path / "root"
    path = dx(root / "a.dcm", np.ones((4, 4)), SOPInstanceUID="1.2.1")
    before, info = Extractor(root, "dicom", SECRET)(path), path.stat()
    other = dx(tmp_path / "b.dcm", np.zeros((4, 4)), SOPInstanceUID="1.2.2")
    assert other.stat().st_size == info.st_size
    time.sleep(0.05)  # the system's clock for entries is a coarse one
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    other.replace(path)
    after = path.stat()
    known = (before.size, before.modified, before.changed)
    assert known[:2] == (after.st_size, after.st_mtime_ns)
    assert known[2] != after.st_ctime_ns


@pytest.mark.integration
def test_bombs_cost_no_memory(tmp_path, index):
    root = tmp_path / "root"
    root.mkdir()
    Pillow.new("1", (14_000, 14_000)).save(root / "bomb.png")
    Pillow.new("L", (12_000, 12_000)).save(root / "large.png")
    Pillow.new("L", (12, 10), 7).save(root / "small.png")
    found = by_path(root, index, Limits(workers=1, memory=200 << 20), format="folders")
    assert found(root / "bomb.png").reason == "too large"
    assert found(root / "large.png").reason == "too large"
    assert (found(root / "small.png").reason, found(root / "small.png").low) == ("", 7.0)


@pytest.mark.integration
def test_a_frame_beyond_the_memory_of_a_worker(tmp_path, index, dx):
    large = dx(tmp_path / "root" / "large.dcm", np.zeros((7000, 7000)))
    small = dx(tmp_path / "root" / "small.dcm", np.zeros((7, 7)))
    found = by_path(large.parent, index, Limits(workers=1, memory=450 << 20))
    assert found(large).reason == "too large"
    assert found(small).reason == ""


@pytest.mark.integration
def test_other_ids_that_stand_for_nobody_make_it_read_again(tmp_path, index, dx):
    root = tmp_path / "root"
    path = dx(root / "a.dcm", np.zeros((7, 7)), PatientID="Test Person")
    nobody = dx(root / "b.dcm", np.zeros((7, 7)), PatientID="")
    first = by_path(root, index)
    assert (first(path).nobody, first(nobody).nobody) == ("", "missing")
    people = PatientOptions(frozenset({"test person"}))
    again = by_path(root, index, patients=people)
    assert again(path).nobody == "shared"
    assert scan(Extractor(root, "dicom", SECRET, people), index).new == 0


@pytest.mark.integration
def test_a_worker_that_nobody_watches_ends_by_itself(tmp_path, dx):
    slow = dx(tmp_path / "slow.dcm", np.zeros((20_000, 8, 8)))
    worker = Worker(Extractor(tmp_path, "dicom", SECRET), 6 << 30, seconds=-9.0)
    try:
        worker.give(slow)
        assert worker.take() is None
        assert worker.process.wait(20)
    finally:
        worker.end()


@pytest.mark.integration
def test_a_worker_that_died_idle_costs_no_file(tmp_path, dx):
    path = dx(tmp_path / "a.dcm", np.zeros((8, 8)))
    worker = Worker(Extractor(tmp_path, "dicom", SECRET), 6 << 30, seconds=60)
    try:
        assert worker.take() is None
        os.kill(worker.process.pid, signal.SIGKILL)
        assert worker.process.wait(20)
        worker.give(path)
        assert worker.take() is None
        facts = worker.take()
        assert isinstance(facts, FileFacts)
        assert facts.reason == ""
    finally:
        worker.end()
