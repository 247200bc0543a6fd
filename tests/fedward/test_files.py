"""One way to replace a file: whole or not at all, with the rights that were asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedward.errors import OutputError
from fedward.files import replace_file, sweep_partial, write_private, write_text

# Of a process that may write 4096 bytes to a file: what a full disk does to a longer content.
_FULL = """
import resource, signal, sys
from pathlib import Path
from fedward.errors import OutputError
from fedward.files import write_private
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_private(Path(sys.argv[1]), bytes(5000))
except OutputError:
    raise SystemExit(7)
"""


def test_a_file_is_replaced_with_the_rights_that_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        replace_file(path, b"one")
        assert path.stat().st_mode & 0o777 == 0o640
        os.umask(0)
        write_private(path, b"two", modified=5_000_000_000)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_mtime_ns == 5_000_000_000
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", _FULL, str(path)], timeout=60, check=False)
    assert done.returncode == 7
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_missing_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write_text(tmp_path / "none" / "file", "text")
    with pytest.raises(OutputError):
        write_private(tmp_path / "none" / "file", b"content")


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".partial-0011").write_bytes(b"half")
    (tmp_path / "whole").write_bytes(b"whole")
    sweep_partial(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["whole"]
