"""Verify the audit log: hash chain, HMACs and head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedward.errors import AuditError
from fedward.files import locked
from fedward_client.audit.entry import GENESIS, Entry, Head, parse
from fedward_client.audit.files import ACTIVE, HEAD, lines, read_head, segments

FaultKind = Literal["edited", "deleted", "inserted", "reordered", "truncated", "torn", "head"]


@dataclass(frozen=True)
class Fault:
    """The first thing that is wrong.

    Attributes
    ----------
    kind : str
        What was done: an entry edited, deleted, inserted or moved, the end cut off or torn, the
        head broken.
    seq : int
        The entry that should have stood there.
    """

    kind: FaultKind
    seq: int


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes
    ----------
    entries : int
        Whole entries up to the first fault.
    hash : str
        Of the last of them: noted down elsewhere, it shows an older log that was put in place.
    fault : Fault or None
        The first fault.
    behind : bool
        The head is one entry behind, as a crash leaves it; the next entry mends that.
    """

    entries: int
    hash: str
    fault: Fault | None
    behind: bool = False

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return self.fault is None

    def enforce(self) -> None:
        """Raise AuditError for a fault."""
        if self.fault:
            raise AuditError(
                "the audit log must be whole",
                value=f"{self.fault.kind} at {self.fault.seq}",
                fix="Keep the folder as it is, and find out who could write to it",
            )


def verify(folder: Path, key: bytes | None = None) -> Verification:
    """Check every entry, their order, and the head.

    Parameters
    ----------
    folder : Path
        The log's (see :func:`fedward_client.audit.audit_folder`).
    key : bytes, optional
        The site's. Without it a chain that was written anew from some entry on, head and all, is
        not found out.

    Raises
    ------
    AuditError
        There is no log, or it cannot be read.
    """
    content, anchor = _content(folder)
    found, rest = lines(content)
    last, fault = _chain(found, key)
    if fault is None and rest:
        # What the head tells of was whole once; what it does not was never finished.
        cut = anchor is not None and anchor.seq > (last.seq if last else 0)
        fault = Fault("edited" if cut else "torn", last.seq + 1 if last else 1)
    behind = False
    if fault is None:
        fault, behind = _against(anchor, last, key)
    return Verification(last.seq if last else 0, last.hash if last else GENESIS, fault, behind)


def check_written(folder: Path, seq: int, hash_: str) -> None:
    """Hold the log against what its writer remembers.

    Raises
    ------
    AuditError
        It does not hold that entry: another log, whole in itself, was put in its place.
    """
    if not any((one.seq, one.hash) == (seq, hash_) for one in entries(folder)):
        raise AuditError(
            "the audit log must be the one that the daemon writes",
            value=f"entry {seq}",
            fix="Keep the folder as it is, and find out who could write to it",
        )


def check_there(folder: Path) -> None:
    """Raise AuditError when there is no log."""
    _content(folder)


def entries(folder: Path) -> Iterator[Entry]:
    """The entries that can be read, oldest first; raises AuditError when there is no log."""
    for line in lines(_content(folder)[0])[0]:
        entry = parse(line)
        if entry is not None:
            yield entry


def _content(folder: Path) -> tuple[bytes, Head | None]:
    try:
        if not (folder / HEAD).exists() and not segments(folder):
            raise FileNotFoundError
        # A copy handed to an auditor has no lock, and may lie where nothing can be written.
        guarded = (folder / f"{ACTIVE}.lock").exists()
        with locked(folder / ACTIVE, shared=True) if guarded else nullcontext():
            return b"".join(path.read_bytes() for path in segments(folder)), read_head(folder)
    except OSError:
        raise AuditError("there must be a readable audit log", fix="Check site.state") from None


def _chain(found: list[bytes], key: bytes | None) -> tuple[Entry | None, Fault | None]:
    last: Entry | None = None
    for place, line in enumerate(found):
        seq, prev = (last.seq + 1, last.hash) if last else (1, GENESIS)
        entry = parse(line)
        if entry is None or entry.fault(key):
            return last, Fault("edited", seq)
        if entry.seq != seq:
            return last, Fault(_misplaced(entry, seq, found[place:]), seq)
        if entry.prev != prev:
            return last, Fault("inserted", seq)
        last = entry
    return last, None


def _misplaced(entry: Entry, seq: int, rest: list[bytes]) -> FaultKind:
    if entry.seq < seq:
        return "inserted"
    later = (parse(line) for line in rest)
    return "reordered" if any(one and one.seq == seq for one in later) else "deleted"


def _against(
    anchor: Head | None, last: Entry | None, key: bytes | None
) -> tuple[Fault | None, bool]:
    seq, hash_ = (last.seq, last.hash) if last else (0, GENESIS)
    if anchor is None or anchor.fault(key):
        return Fault("head", seq), False
    if anchor.seq > seq:
        return Fault("truncated", seq + 1), False
    if (anchor.seq, anchor.hash) == (seq, hash_):
        return None, False
    if last and (anchor.seq + 1, anchor.hash) == (seq, last.prev):
        return None, True
    return Fault("head" if anchor.seq == seq else "inserted", anchor.seq + 1), False
