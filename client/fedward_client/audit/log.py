"""Append to the audit log: one entry and one fsync, or an error before anything is sent."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from fedward.errors import AuditError, OutputError
from fedward.files import locked, write_private
from fedward.rule_codes import RuleCode
from fedward_client.audit.entry import EVENTS, GENESIS, Entry, Event, head, seal
from fedward_client.audit.files import ACTIVE, HEAD, full_segments, last_entry, lines, read_head
from fedward_client.secret import existing_secret

_EVIDENCE: Final = "Run fedward-client audit verify; keep the folder and begin with another"


def audit_folder(state: Path) -> Path:
    """Where a site's audit log lies."""
    return state / "audit"


def audit_key(state: Path) -> bytes:
    """The key of a site's audit log, derived from its secret; raises ConfigError without one."""
    return hmac.new(existing_secret(state), b"audit log 1", hashlib.sha256).digest()


class _Tail(NamedTuple):
    """Where the log ends: its last entry, and the growing file as it was then."""

    seq: int
    hash: str
    inode: int
    size: int


class AuditLog:
    """An append-only log of hash-chained JSON lines, mode 0600.

    Several processes may append to one log. What :meth:`append` has returned is on the disk.

    Parameters
    ----------
    folder : Path
        Made when it is missing.
    key : bytes, optional
        Authenticates entries and head, so that whoever lacks it cannot write the chain anew.
    max_bytes : int
        Size at which a new segment is begun; the chain goes on.
    now : callable
        Gives the time, for tests.

    Attributes
    ----------
    last : tuple or None
        Number and hash of the last entry that this process wrote: a log that was put in place of
        its own does not have it.

    Raises
    ------
    AuditError
        The log is not whole, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        key: bytes | None = None,
        max_bytes: int = 16 << 20,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._folder, self._key, self._max, self._now = folder, key, max_bytes, now
        self._active = folder / ACTIVE
        self._tail: _Tail | None = None
        self.last: tuple[int, str] | None = None
        with self._alone():
            self._found()

    def append(self, event: Event, *, repeated: bool = False, **fields: Any) -> Entry | None:
        """Write an entry.

        Parameters
        ----------
        event : str
            One of :data:`fedward_client.audit.entry.EVENTS`.
        repeated : bool
            The same was written before: only see that the log is whole and can be opened.
        **fields
            JSON. Nothing that names a person or a file belongs here.

        Raises
        ------
        AuditError
            It was not written: a full disk, a log that is not whole, fields that are not JSON.
            What it would have told of must not happen then.
        """
        if event not in EVENTS:
            raise AuditError("an audit event must be one of the known ones", value=event)
        with self._alone():
            if not repeated:
                return self._append(event, fields)
            self._found()
            os.close(os.open(self._active, os.O_WRONLY | os.O_APPEND))
        return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(self._active):
                yield
        except (OSError, OutputError) as error:
            self._tail = None
            why = os.strerror(error.errno or 0) if isinstance(error, OSError) else error.value
            raise AuditError(
                RuleCode.UNWRITTEN,
                value=why,
                fix="Free some space, or mend its rights; nothing is sent until then",
            ) from None

    def _append(self, event: Event, fields: dict[str, Any]) -> Entry:
        tail = self._rotated(self._found())
        time = self._now().astimezone(UTC).isoformat(timespec="microseconds")
        entry = seal(tail.seq + 1, time, event, fields, tail.hash, self._key)
        self._tail = None  # whatever interrupts this: look at the files again
        handle = os.open(self._active, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._write(handle, entry, tail.size)
            status = os.fstat(handle)
        finally:
            os.close(handle)
        self._tail = _Tail(entry.seq, entry.hash, status.st_ino, status.st_size)
        self.last = entry.seq, entry.hash
        return entry

    def _write(self, handle: int, entry: Entry, before: int) -> None:
        made = head(entry.seq, entry.hash, self._key)
        try:
            content = entry.line()
            while content:
                content = content[os.write(handle, content) :]
            os.fsync(handle)
            write_private(self._folder / HEAD, made.line())
        except (OSError, OutputError):
            # Not acknowledged, so not there; unless the head already tells of it.
            if read_head(self._folder) != made:
                with suppress(OSError):
                    os.ftruncate(handle, before)
            raise

    def _found(self) -> _Tail:
        """Where the log ends; looked up anew when another process has written."""
        if self._tail is None or self._tail[2:] != _status(self._active):
            self._tail = self._recovered()
        return self._tail

    def _recovered(self) -> _Tail:
        content = self._active.read_bytes() if self._active.exists() else b""
        full = full_segments(self._folder)
        begun = b"\n" in content
        if not begun and not full and not (self._folder / HEAD).exists():
            write_private(self._folder / HEAD, head(0, GENESIS, self._key).line())
        source = content if begun or not full else full[-1].read_bytes()
        entry = last_entry(source)
        if entry is None and b"\n" in source:
            raise AuditError(RuleCode.AUDIT_WHOLE, fix=_EVIDENCE)
        self._check(entry)
        tail = _Tail(*((entry.seq, entry.hash) if entry else (0, GENESIS)), *_status(self._active))
        torn = lines(content)[1]
        return self._repaired(tail, len(content), torn) if torn else tail

    def _check(self, entry: Entry | None) -> None:
        """The last entry must be the head's, or the one after it (a crash between the two)."""
        anchor = read_head(self._folder)
        seq, hash_ = (entry.seq, entry.hash) if entry else (0, GENESIS)
        if anchor is None or anchor.fault(self._key) or (entry and entry.fault(self._key)):
            raise AuditError(RuleCode.AUDIT_WHOLE, fix=_EVIDENCE)
        if (seq, hash_) == (anchor.seq, anchor.hash):
            return
        if entry is None or (seq, entry.prev) != (anchor.seq + 1, anchor.hash):
            raise AuditError(RuleCode.AUDIT_WHOLE, fix=_EVIDENCE)
        write_private(self._folder / HEAD, head(seq, hash_, self._key).line())

    def _repaired(self, tail: _Tail, size: int, torn: bytes) -> _Tail:
        """Set a half line aside; it was never acknowledged, or the head would tell of it."""
        write_private(self._folder / f"torn-{tail.seq + 1:012d}.bin", torn)
        os.truncate(self._active, size - len(torn))
        self._tail = tail._replace(size=size - len(torn))
        self._append("repaired", {"cut_bytes": len(torn), "cause": "a write that did not finish"})
        return self._found()

    def _rotated(self, tail: _Tail) -> _Tail:
        if tail.size < self._max:
            return tail
        self._active.rename(self._folder / f"audit-{tail.seq:012d}.jsonl")
        return _Tail(tail.seq, tail.hash, 0, 0)


def _status(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, status.st_size
