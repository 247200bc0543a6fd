"""A systemd unit's filters as those of a container, so that they are tried without systemd."""

from __future__ import annotations

import re
import socket
from functools import cache
from pathlib import Path
from typing import Any, Final

from images import ROOT, run

_EXECUTE, _WRITE = 4, 2  # PROT_EXEC, PROT_WRITE of mmap(2)
# runc itself needs these between the filter and the program.
_RUNC: Final = frozenset({"capset", "execve", "prctl", "setgid", "setgroups", "setuid"})


def settings(unit: Path) -> dict[str, list[str]]:
    """A unit's settings; a name that comes again keeps all its values."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text("utf-8").splitlines():
        if match := re.match(r"(\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2].strip())
    return found


def seccomp(role: str) -> dict[str, Any]:
    """System calls, address families and W^X of a unit as an OCI profile."""
    unit = settings(ROOT / "docker" / "systemd" / f"fedward-{role}.service")
    allowed = _allowed(unit["SystemCallFilter"]) | _RUNC
    families = [getattr(socket, name) for name in unit["RestrictAddressFamilies"][0].split()]
    guarded = {"socket": [_rule(0, "SCMP_CMP_EQ", int(one)) for one in families]}
    if unit.get("MemoryDenyWriteExecute") == ["yes"]:
        no_execute, no_write = _lacks(_EXECUTE), _lacks(_WRITE)
        guarded |= {
            "mmap": [no_execute, no_write],
            "mprotect": [no_execute],
            "pkey_mprotect": [no_execute],
        }
    plain = {"names": sorted(allowed - set(guarded)), "action": "SCMP_ACT_ALLOW"}
    rules = [
        {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [one]}
        for name, ones in guarded.items()
        for one in ones
    ]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [plain, *rules],
    }


def _allowed(filters: list[str]) -> frozenset[str]:
    """What the lines allow and, with ``~``, take away again."""
    left: frozenset[str] = frozenset()
    for line in filters:
        names = frozenset[str]().union(*map(_calls, line.removeprefix("~").split()))
        left = left - names if line.startswith("~") else left | names
    return left


@cache
def _calls(name: str) -> frozenset[str]:
    """The system calls of a set of systemd's, or the one of that name."""
    if not name.startswith("@"):
        return frozenset({name})
    lines = run("systemd-analyze", "--no-pager", "syscall-filter", name).splitlines()[1:]
    inner = (line.strip() for line in lines if not line.strip().startswith("#"))
    return frozenset[str]().union(*(_calls(one) for one in inner if one))


def _rule(index: int, how: str, value: int) -> dict[str, Any]:
    return {"index": index, "op": how, "value": value}


def _lacks(flag: int) -> dict[str, Any]:
    """The third argument is without a flag."""
    return {"index": 2, "op": "SCMP_CMP_MASKED_EQ", "value": flag, "valueTwo": 0}
