"""Keep network and images apart, and find out whether they are.

Linux namespaces (namespaces(7)): the trainer runs in a network namespace with nothing in it; the
connector in a mount namespace in which the images and the site's state are covered. Both work
without root where the kernel lets users make user namespaces. What holds them in is that neither
keeps a capability with which it could leave.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_NEWNS: Final = 0x00020000
_NEWUSER: Final = 0x10000000
_NEWNET: Final = 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_RDONLY = 4096, 16384, 1 << 18, 1
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE, _PR_SET_PDEATHSIG = 24, 38, 4, 1
_LAST_CAPABILITY: Final = 63
_SIOCGIFFLAGS, _IFF_UP = 0x8913, 0x1
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 1
# With these root still reads files of other users, which is all that a trainer needs it for.
READ_OTHERS: Final = frozenset({0, 1, 2, 3})

# What a connection attempt says where no packet could leave.
_NO_WAY: Final = frozenset(
    {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
)

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    """``struct mount_attr`` of mount_setattr(2)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")
    )


@dataclass(frozen=True)
class Finding:
    """What a process found out about its own walls.

    Attributes
    ----------
    holds : bool
        Whether they hold.
    text : str
        In words without any path or address.
    """

    holds: bool
    text: str


def enter_no_network() -> None:
    """Put this process into a network namespace of its own.

    Raises
    ------
    OSError
        The kernel does not let it.
    """
    _unshare(_NEWNET)


def cover(places: Iterable[Path]) -> None:
    """Cover folders and files for this process and its children.

    Raises
    ------
    OSError
        The kernel does not let it.
    """
    _unshare(_NEWNS)
    _mount(None, Path("/"), _MS_REC | _MS_PRIVATE)
    for place in places:
        if place.is_dir():
            _mount("tmpfs", place, _MS_RDONLY, kind="tmpfs", options="size=0,mode=000")
        elif place.exists():
            _mount("/dev/null", place, _MS_BIND)


def keep_from_writing(but: Iterable[Path]) -> None:
    """After :func:`cover`, make all else read-only for this process and its children.

    Parameters
    ----------
    but : iterable of Path
        Folders that stay as they are.

    Raises
    ------
    OSError
        The kernel does not let it; it can since Linux 5.12 (mount_setattr(2)).
    """
    folders = list(but)
    for folder in folders:
        _mount(str(folder), folder, _MS_BIND)
    _set_attributes(Path("/"), _AT_RECURSIVE, _MountAttributes(attr_set=_ATTR_RDONLY))
    for folder in folders:
        _set_attributes(folder, 0, _MountAttributes(attr_clr=_ATTR_RDONLY))


def drop_privileges(keep: frozenset[int] = frozenset()) -> None:
    """Give up every capability but these for ever, so that the walls cannot be left."""
    for number in range(_LAST_CAPABILITY + 1):
        if number not in keep:
            _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def undumpable() -> None:
    """Let no other process of this user look into this one's memory or root."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def find_network() -> Finding:
    """Whether this process has a network: its interfaces, and a real attempt to connect."""
    names = [name for name in _interfaces() if name != "lo" and _is_up(name)]
    if names:
        return Finding(False, f"{len(names)} network interfaces besides loopback")
    # Documentation addresses (RFC 5737, RFC 3849): nobody is there, but a route would be.
    for family, host in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            if probe.connect_ex((host, 9)) not in _NO_WAY:
                return Finding(False, "a route to other machines")
    return Finding(True, "no interface and no route")


def find_writable(places: Iterable[Path | str]) -> Finding:
    """Whether this process can change any of these folders or files."""
    listed = list(places)
    writable = sum(os.access(place, os.W_OK) for place in listed)
    if writable:
        return Finding(False, f"{writable} of {len(listed)} places can be changed")
    return Finding(True, "unchangeable")


def find_readable(places: Iterable[Path]) -> Finding:
    """Whether this process can read any of these folders or files."""
    listed = list(places)
    readable = sum(_readable(place) for place in listed)
    if readable:
        return Finding(False, f"{readable} of {len(listed)} places can be read")
    return Finding(True, "hidden")


def _interfaces() -> list[str]:
    """Names of this process's interfaces, also where it may make no sockets but Unix ones."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return [line.partition(":")[0].strip() for line in lines if ":" in line]


def _is_up(name: str) -> bool:
    """Whether an interface may carry anything.

    Kernels with tunnels put one that is down into each new namespace; without CAP_NET_ADMIN nobody
    inside sets it up. An interface that cannot be asked counts as up.
    """
    asked = struct.pack("16sH14x", name.encode(), 0)  # struct ifreq, netdevice(7)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            told = fcntl.ioctl(probe, _SIOCGIFFLAGS, asked)
    except OSError:
        return True
    return bool(struct.unpack_from("H", told, 16)[0] & _IFF_UP)


def _readable(place: Path) -> bool:
    try:
        if place.is_dir():
            with os.scandir(place) as entries:
                return any(True for _ in entries)
        with place.open("rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def _unshare(what: int) -> None:
    if _libc.unshare(what) == 0:
        return
    user, group = os.geteuid(), os.getegid()
    if _libc.unshare(what | _NEWUSER):
        raise OSError(ctypes.get_errno(), "the kernel makes no namespace for this user")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _mount(
    source: str | None, target: Path, flags: int, kind: str | None = None, options: str = ""
) -> None:
    parts = [part.encode() if part else None for part in (source, str(target), kind)]
    if _libc.mount(*parts, flags, options.encode() or None):
        raise OSError(ctypes.get_errno(), "a folder could not be covered")


def _set_attributes(place: Path, how: int, wanted: _MountAttributes) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    path = str(place).encode()
    if _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path, how, ctypes.byref(wanted), size):
        raise OSError(ctypes.get_errno(), "what is mounted could not be made read-only")
