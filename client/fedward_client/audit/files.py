"""Files of the audit log: full segments, the current segment, and the head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from fedward_client.audit.entry import Entry, Head, parse, parse_head

ACTIVE: Final = "audit.jsonl"
HEAD: Final = "head.json"
_FULL: Final = re.compile(r"audit-\d{12}\.jsonl")


def full_segments(folder: Path) -> list[Path]:
    """Segments that were full, oldest first."""
    return sorted(path for path in folder.iterdir() if _FULL.fullmatch(path.name))


def segments(folder: Path) -> list[Path]:
    """All segments, oldest first."""
    active = folder / ACTIVE
    return [*full_segments(folder), *([active] if active.exists() else [])]


def lines(content: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines with their ends, and what stands behind the last end."""
    *whole, rest = content.split(b"\n")
    return [line + b"\n" for line in whole], rest


def last_entry(content: bytes) -> Entry | None:
    """The entry of the last whole line, None when there is none or it cannot be read."""
    whole, _ = lines(content)
    return parse(whole[-1]) if whole else None


def read_head(folder: Path) -> Head | None:
    """The head; None when it is missing or broken."""
    try:
        return parse_head((folder / HEAD).read_bytes())
    except OSError:
        return None
