"""A view of this machine in which other users can read Python and this checkout."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SEALED = ("--clear-groups", "--no-new-privs", "--bounding-set=-all")


def closed(path: Path) -> Path | None:
    """The highest folder on the way that others may not enter."""
    for folder in [*reversed(path.parents), path]:
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


def opening(stash: Path) -> list[str]:
    """Lay a folder that all may enter over each closed one, and show in it only what is needed."""
    needed = {Path(one).resolve() for one in (sys.base_prefix, sys.prefix, ROOT)}
    lines = ["set -e"]
    for number, folder in enumerate(sorted({one for path in needed if (one := closed(path))})):
        inside = sorted(path for path in needed if path.is_relative_to(folder))
        moved = []
        for path in [one for one in inside if not set(one.parents) & set(inside)]:
            kept = stash / f"{number}-{len(moved)}"
            kept.mkdir()
            lines.append(f"mount --rbind {shlex.quote(str(path))} {shlex.quote(str(kept))}")
            moved.append((kept, path))
        lines.append(f"mount -t tmpfs -o mode=0755 tmpfs {shlex.quote(str(folder))}")
        for kept, path in moved:
            lines.append(f"mkdir -p {shlex.quote(str(path))}")
            lines.append(f"mount --move {shlex.quote(str(kept))} {shlex.quote(str(path))}")
    return lines


@pytest.fixture(scope="session")
def as_user() -> Callable[[int, int], list[str]]:
    """What a command line begins with that runs as a user who may do nothing more."""
    return lambda user, group: ["setpriv", f"--reuid={user}", f"--regid={group}", *SEALED]


@pytest.fixture(scope="session")
def open_view(
    tmp_path_factory: pytest.TempPathFactory, as_user: Callable[[int, int], list[str]]
) -> Iterator[list[str]]:
    """What a command line begins with that runs in that view."""
    if os.geteuid() or not all(map(shutil.which, ("setpriv", "unshare", "nsenter", "mount"))):
        pytest.skip("root and util-linux can start processes as other users")
    script = [*opening(tmp_path_factory.mktemp("view")), "echo ready", "exec sleep infinity"]
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    if holder.stdout.readline() != "ready\n":
        pytest.skip("this kernel makes no mount namespaces here")
    view = ["nsenter", f"--target={holder.pid}", "--mount"]
    reads = [*view, *as_user(61003, 61003), sys.executable, "-c", "import fedward_client.cli"]
    subprocess.run(reads, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd="/")
    yield view
    holder.kill()
    holder.wait()
