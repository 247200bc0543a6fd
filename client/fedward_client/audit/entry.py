"""Entries of the audit log, and the head file that names the last one."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field

from fedward.errors import AuditError

Event = Literal[
    "started",
    "stopped",
    "plan",
    "decision",
    "approval",
    "charge",
    "sent",
    "refused",
    "withheld",
    "replaced",
    "evaluation",
    "policy",
    "version",
    "isolation",
    "paused",
    "resumed",
    "error",
    "repaired",
    "watchdog",
    "order",
]
EVENTS: Final = frozenset(get_args(Event))
GENESIS: Final = "0" * 64
LARGEST: Final = 1 << 20
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Sealed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    mac: Hex | None = None

    def line(self) -> bytes:
        """It as it stands in its file."""
        gone = {"mac"} if self.mac is None else set()
        return canonical(self.model_dump(exclude=gone)) + b"\n"


class Entry(_Sealed):
    """One entry.

    Attributes
    ----------
    seq : int
        From 1, without a gap.
    time : str
        ISO 8601 in UTC, by the site's clock, which may jump: the order is that of ``seq``.
    event : str
        One of :data:`EVENTS`.
    fields : dict
        What there is to say; JSON.
    prev, hash : str
        SHA-256 of the entry before and of this one.
    mac : str or None
        HMAC-SHA-256 of the hash with the site's key.
    """

    seq: int = Field(ge=1)
    time: str
    event: Event
    fields: dict[str, Any]
    prev: Hex
    hash: Hex

    def fault(self, key: bytes | None) -> bool:
        """Whether its hash, or with a key its authentication, does not fit its content."""
        content = self.model_dump(exclude={"hash", "mac"})
        return self.hash != digest(content) or not _genuine(self.mac, key, "entry", self.hash)


class Head(_Sealed):
    """Which entry is the last: by it a log that is cut off at its end is found out."""

    seq: int = Field(ge=0)
    hash: Hex

    def fault(self, key: bytes | None) -> bool:
        """Whether, with a key, its authentication does not fit."""
        return not _genuine(self.mac, key, "head", f"{self.seq} {self.hash}")


def seal(
    seq: int, time: str, event: Event, fields: Mapping[str, Any], prev: str, key: bytes | None
) -> Entry:
    """Make an entry.

    Raises
    ------
    AuditError
        The fields are not JSON, or far too large.
    """
    content = {"seq": seq, "time": time, "event": event, "fields": dict(fields), "prev": prev}
    try:
        # Through JSON and back: what is written must read back as what was hashed.
        plain = json.loads(canonical(content))
        hash_ = digest(plain)
        entry = Entry.model_validate({**plain, "hash": hash_, "mac": _mac(key, "entry", hash_)})
        if len(line := entry.line()) <= LARGEST and parse(line) == entry:
            return entry
    except (TypeError, ValueError, RecursionError):
        pass  # told below, without what the fields hold
    raise AuditError("an audit entry must be plain JSON of a moderate size", where=event)


def head(seq: int, hash_: str, key: bytes | None) -> Head:
    """Make a head."""
    return Head(seq=seq, hash=hash_, mac=_mac(key, "head", f"{seq} {hash_}"))


def parse(line: bytes) -> Entry | None:
    """Read a line; None when it is not exactly what this release writes."""
    return _read(Entry.model_validate, line)


def parse_head(content: bytes) -> Head | None:
    """Read a head file; None when it is not exactly what this release writes."""
    return _read(Head.model_validate, content)


_S = TypeVar("_S", bound=_Sealed)


def _read(make: Callable[[Any], _S], content: bytes) -> _S | None:
    try:
        made = make(json.loads(content))
        return made if made.line() == content else None
    except (ValueError, RecursionError):
        return None


def canonical(value: Mapping[str, Any]) -> bytes:
    """Sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def _mac(key: bytes | None, kind: str, text: str) -> str | None:
    if key is None:
        return None
    return hmac.new(key, f"{kind} {text}".encode(), hashlib.sha256).hexdigest()


def _genuine(mac: str | None, key: bytes | None, kind: str, text: str) -> bool:
    expected = _mac(key, kind, text)
    return expected is None or (mac is not None and hmac.compare_digest(mac, expected))
