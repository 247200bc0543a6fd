"""Atomic writes of files, and locks of files and folders."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from fedward.errors import OutputError, ServiceError
from fedward.rule_codes import RuleCode

PARTIAL: Final = ".partial-"
"""Beginning of the names of what is not whole yet."""


def replace_file(
    path: Path, content: bytes, *, mode: int | None = None, modified: int | None = None
) -> None:
    """Write a file aside and give it its name when it is safe on the disk.

    A reader sees the old file or the new one, never a part, also after a power cut.

    Parameters
    ----------
    path : Path
        Replaced if it is there; its folder must exist.
    content : bytes
        All of it.
    mode : int, optional
        Who may read it, whatever the umask; without it, what the umask says.
    modified : int, optional
        Time of change to give it, ns.

    Raises
    ------
    OSError
        It cannot be written; nothing is left of it.
    """
    aside = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    handle = os.open(aside, flags, 0o666 if mode is None else mode)
    try:
        with os.fdopen(handle, "wb") as file:
            if mode is not None:
                os.fchmod(handle, mode)
            file.write(content)
            file.flush()
            os.fsync(handle)
        if modified is not None:
            os.utime(aside, ns=(modified, modified))
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def sweep_partial(folder: Path) -> None:
    """Remove what a process that was killed while it wrote left in a folder that it had alone."""
    for half in folder.glob(f"{PARTIAL}*"):
        half.unlink(missing_ok=True)


def write_private(
    path: Path, content: bytes, *, modified: int | None = None, mode: int = 0o600
) -> None:
    """Replace a file that only its owner can read (:func:`replace_file`).

    Raises
    ------
    OutputError
        It cannot be written.
    """
    try:
        replace_file(path, content, mode=mode, modified=modified)
    except OSError as error:
        raise OutputError(
            "the folder of the result must be writable",
            code=RuleCode.STATE_WRITABLE,
            value=os.strerror(error.errno or 0),
            fix="Choose another, or free some space",
        ) from None


def write_text(path: Path, text: str) -> None:
    """Replace a file with UTF-8 text (:func:`replace_file`).

    Raises
    ------
    OutputError
        The folder is missing or cannot be written.
    """
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise OutputError(
            "results must be writable",
            value=f"{path.name}: {error.strerror}",
            fix="Choose another --out, or free some space",
        ) from error


def _sync_folder(path: Path) -> None:
    # A rename survives a power cut only when the folder itself is on the disk.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Locks of flock(2): they end with the processes that hold them, however those end.


def hold(path: Path, *, shared: bool = False, wait: bool = True) -> int:
    """Take the lock of a file, which is made where it is missing.

    Parameters
    ----------
    path : Path
        The file; nobody else writes or removes it.
    shared : bool
        For readers: several may hold it at once.
    wait : bool
        Whether to wait until nobody else holds it.

    Returns
    -------
    int
        A handle; closing it gives the lock back.

    Raises
    ------
    BlockingIOError
        Another process holds it, and this one does not wait.
    OSError
        The file cannot be opened.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock beside a file, ``PATH.lock``; see :func:`hold`."""
    handle = hold(path.with_name(f"{path.name}.lock"), shared=shared)
    try:
        yield
    finally:
        os.close(handle)


# One aggregator at a time on one state folder: two would run every study twice.

_LOOK: Final = 0.2
Holder = Literal["run", "service"]


@contextmanager
def alone(state: Path, holder: Holder, patience: float = 0.0) -> Iterator[None]:
    """Hold a state folder as long as this process lives; the lock ends with it, however it ends.

    Parameters
    ----------
    state : Path
        The folder.
    holder : str
        ``run`` keeps the SuperLink and the service, ``service`` the studies.
    patience : float
        Seconds to wait for a process that is about to end.

    Raises
    ------
    ServiceError
        Another process holds it.
    OutputError
        The folder cannot be written.
    """
    end = time.monotonic() + patience
    while True:
        try:
            handle = hold(state / f"{holder}.lock", wait=False)
            break
        except BlockingIOError:
            if time.monotonic() >= end:
                raise ServiceError(
                    "one aggregator at a time may use a state folder",
                    value=state.name,
                    where="server.state",
                    fix="Stop the `fedward-server run` that uses it",
                ) from None
        except OSError as error:
            raise OutputError(
                "the state folder must be writable",
                value=error.strerror,
                where="server.state",
                fix="See its owner, and free some space",
            ) from None
        time.sleep(_LOOK)
    try:
        yield
    finally:
        os.close(handle)
