"""Processes that start in milliseconds, since they are forked from one that has the imports done.

That one is started afresh and does nothing else, so what it forks shares no file, lock or thread
with this process; only the pipe that it is given. It is reached over a pair of sockets without a
name: nobody else can ask it for a process. It imports nothing of the program that asks, so a script
needs no ``if __name__ == "__main__"`` for it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from client.daemon.isolation import undumpable
from fedward.errors import DeviceError

_MOST: Final = 1 << 20
_GONE: Final = 10.0
_LEAVE: Final = 0.5
_LOOK: Final = 0.5
# Where modules are comes over the socket, before one of ours is imported. Ctrl-C is the parent's.
_BOOT: Final = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import json, socket, sys; "
    "orders = socket.socket(fileno=int(sys.argv[1])); "
    f"sys.path[:] = json.loads(orders.recv({_MOST})); "
    "from client.forks import offer; offer(orders)"
)


@dataclass
class Fork:
    """A process that was forked for this one.

    Attributes
    ----------
    pid : int
        Its number.
    handle : int
        Its pidfd: a number may go to another process, this does not (pidfd_open(2)).
    """

    pid: int
    handle: int

    def kill(self) -> None:
        """End it, and wait until it is gone."""
        if self.handle < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)
        self.wait(_GONE)
        os.close(self.handle)
        self.handle = -1

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds."""
        if not wait([self.handle], seconds):
            return False
        # Its parent takes leave of it, or this process where it is the first of a container.
        end = time.monotonic() + _LEAVE
        while time.monotonic() < end and self._is_listed():
            with suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
            time.sleep(0.001)
        return True

    def _is_listed(self) -> bool:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, 0)
            return True
        return False


class _Template:
    """The process that the others are forked from."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", "-c", _BOOT, str(theirs.fileno())]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        with suppress(OSError):  # it ended at once; whoever asks it hears that
            self._socket.send(json.dumps(sys.path).encode())

    def fork(
        self, target: Callable[..., None], modules: Sequence[str], connection: Connection
    ) -> Fork:
        order = [sys.path, [target.__module__, target.__qualname__], list(modules)]
        socket.send_fds(self._socket, [json.dumps(order).encode()], [connection.fileno()])
        answer, handles, _, _ = socket.recv_fds(self._socket, 64, 1, socket.MSG_CMSG_CLOEXEC)
        if not handles:
            raise EOFError("the template ended")
        return Fork(int(answer), handles[0])

    def close(self) -> None:
        self._socket.close()
        self.process.kill()  # it holds nothing that could be lost
        self.process.wait()


_lock = threading.Lock()
_template: _Template | None = None


def fork(
    target: Callable[[Connection], None], modules: Sequence[str], connection: Connection
) -> Fork:
    """Start a process.

    Parameters
    ----------
    target : callable
        A function of a module, called with the connection.
    modules : sequence of str
        What it will need; imported once, for all processes that come after.
    connection : Connection
        Its end of a pipe; this process may close it afterwards.

    Raises
    ------
    DeviceError
        No process can be started.
    """
    global _template
    with _lock:
        for _ in range(2):
            try:
                if _template is None or _template.owner != os.getpid():
                    _template = None
                    _template = _Template()
                return _template.fork(target, modules, connection)
            except BaseException as error:  # after Ctrl-C an answer would be another's
                if _template is not None:
                    _template.close()
                _template = None
                if not isinstance(error, OSError | EOFError):
                    raise
    raise DeviceError(
        "this machine must let a process be started that reads images",
        fix="Free some memory, or raise the limit of processes; it needs Linux 5.3 or later",
    )


@atexit.register
def _end() -> None:
    if _template is not None and _template.owner == os.getpid():
        _template.close()


def offer(orders: socket.socket) -> None:
    """Fork on demand, until nobody asks any more: what the process does that others come from."""
    undumpable()  # what reads images has its parent's walls, and shows nobody its memory
    signal.signal(signal.SIGCHLD, _reap)
    # In the middle of an import it would not hear that nobody asks any more.
    parent = os.getppid()
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0) if os.getppid() != parent else None)
    signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
    with suppress(OSError):  # whoever asked is gone, and so is what was forked for it
        while _fork_one(orders):
            pass


def _fork_one(orders: socket.socket) -> bool:
    order, handles, _, _ = socket.recv_fds(orders, _MOST, 1, socket.MSG_CMSG_CLOEXEC)
    if not order:
        return False
    target = _load(*json.loads(order))
    # Whoever is reaped before there is a handle of it cannot be waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    if (pid := os.fork()) == 0:
        orders.close()
        _become(target, handles[0])
    os.close(handles[0])
    handle = os.pidfd_open(pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    socket.send_fds(orders, [str(pid).encode()], [handle])
    os.close(handle)
    return True


def _load(paths: list[str], place: list[str], modules: list[str]) -> Callable[[Connection], None]:
    sys.path[:] = paths
    for one in modules:
        with suppress(Exception):  # it fails again where it is used, and is told there
            importlib.import_module(one)
    target: Callable[[Connection], None] = getattr(importlib.import_module(place[0]), place[1])
    return target


def _become(target: Callable[[Connection], None], handle: int) -> None:
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        target(Connection(handle))
        code = 0
    finally:
        os._exit(code)


def _reap(*_: Any) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
