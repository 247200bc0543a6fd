"""Processes that do one thing at a time; when one hangs or dies, only what it was at is lost."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from fedward.errors import DeviceError, Interrupted
from fedward.rule_codes import RuleCode
from fedward_client.daemon.isolation import end_with_parent, undumpable

# What a process does with memory that it has freed.

_TRIM_THRESHOLD: Final = -1  # numbers of malloc.h
_MMAP_THRESHOLD: Final = -3
_LARGEST_KEPT: Final = 32 << 20  # glibc takes no more


def tune_malloc(size: int) -> None:
    """Have glibc keep up to so many bytes for what comes next (mallopt(3)).

    It gives the pages back and asks for them again, which costs as much time as reading a CT slice,
    and a tenth to a quarter of a private step of a U-Net (``benchmarks/dp.py``). Another C library
    goes on as it is.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, size)


# Processes that start in milliseconds, since they are forked from one that has the imports done.
#
# That one is started afresh and does nothing else, so what it forks shares no file, lock or thread
# with this process; only the pipe that it is given. It is reached over a pair of sockets without a
# name: nobody else can ask it for a process. It imports nothing of the program that asks, so a
# script needs no ``if __name__ == "__main__"`` for it.

_MOST: Final = 1 << 20
_GONE: Final = 10.0
_LEAVE: Final = 0.5
_LOOK: Final = 0.5
_CPU_CLOCK: Final = 2  # CPUCLOCK_SCHED
# Where modules are comes over the socket, before one of ours is imported. Ctrl-C is the parent's.
_BOOT: Final = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import json, socket, sys; "
    "orders = socket.socket(fileno=int(sys.argv[1])); "
    f"sys.path[:] = json.loads(orders.recv({_MOST})); "
    "from fedward_client.worker_pool import serve_forks; serve_forks(orders)"
)


@dataclass
class ForkedProcess:
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
    _ending: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def kill(self) -> None:
        """End it, and wait until it is gone."""
        # Whoever closes the pool and whoever works with it may both end a process.
        with self._ending:
            if self.handle < 0:
                return
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            self.wait(_GONE)
            os.close(self.handle)
            self.handle = -1

    def seconds(self) -> float:
        """Of the processor that it has used; 0 when it is gone."""
        with suppress(OSError):  # the clock's number is that of clock_getcpuclockid(3) in Linux
            return time.clock_gettime((~self.pid << 3) | _CPU_CLOCK)
        return 0.0

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
    ) -> ForkedProcess:
        order = [sys.path, [target.__module__, target.__qualname__], list(modules)]
        socket.send_fds(self._socket, [json.dumps(order).encode()], [connection.fileno()])
        answer, handles, _, _ = socket.recv_fds(self._socket, 64, 1, socket.MSG_CMSG_CLOEXEC)
        if not handles:
            raise EOFError("the template ended")
        return ForkedProcess(int(answer), handles[0])

    def close(self) -> None:
        self._socket.close()
        self.process.kill()  # it holds nothing that could be lost
        self.process.wait()


_lock = threading.Lock()
_template: _Template | None = None


def fork(
    target: Callable[[Connection], None], modules: Sequence[str], connection: Connection
) -> ForkedProcess:
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
        RuleCode.PROCESSES,
        fix="Free some memory, or raise the limit of processes; it needs Linux 5.3 or later",
    )


@atexit.register
def _end() -> None:
    if _template is not None and _template.owner == os.getpid():
        _template.close()


def serve_forks(orders: socket.socket) -> None:
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


Item = TypeVar("Item")
Result = TypeVar("Result")

_START: Final = 120.0  # seconds in which a process must have begun
_USUAL: Final = 64_000_000  # values that may be decoded in the time of the limits
_MOST_TIMES: Final = 60.0  # of the usual time, whatever a file claims
_STEP: Final = 0.001  # seconds of the processor by which whoever works gets on
_GRACE: Final = 10.0  # seconds more than the parent allows, after which a worker ends by itself
_FREED: Final = 64 << 20
_AHEAD: Final = 8  # results of each worker that may wait for an earlier one


@dataclass
class Limits:
    """What reading may take.

    Attributes
    ----------
    workers : int
        Processes.
    seconds : float
        Of the processor for one file, and more for a large one (:func:`take_longer`);
        also the longest time in which it may stand still. A machine that is busy with other things,
        or a slow disk, is no decoder's fault.
    memory : int
        Bytes of address space of one process, beside what its program takes.
    """

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    seconds: float = 60.0
    memory: int = 6 << 30


@dataclass
class Worker(Generic[Item, Result]):
    """One process and what it is at.

    Attributes
    ----------
    work : callable
        What it does; goes to the process by pickle, as items and results do.
    memory : int
        Bytes of address space that it may take beside its program.
    seconds : float
        For one item, before it is killed; see :class:`Limits`.
    item : object or None
        What it is at; None while it waits for something.
    since : float
        When it began with that, or was last seen to get on.
    ready : bool
        Whether the process runs by now: its start is not the item's time.
    more : float
        Seconds that the item was given beside.
    """

    work: Callable[[Item], Result]
    memory: int
    seconds: float
    item: Item | None = None
    since: float = 0.0
    ready: bool = False
    more: float = 0.0
    _used: float = 0.0
    _seen: float = 0.0
    connection: Connection = field(init=False)
    process: ForkedProcess = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start the process, or another one in its place."""
        self.connection, theirs = Pipe()
        self.process = fork(_serve, list(_modules(self.work)), theirs)
        theirs.close()
        self.item, self.ready = None, False
        with suppress(OSError):  # it died already; whoever listens to it hears that
            self.connection.send((self.work, self.memory))

    def give(self, item: Item) -> None:
        """Give it something to do."""
        used = self.process.seconds()
        try:
            self.connection.send((item, self.seconds))
        except OSError:  # it died while it had nothing to do, which is no item's fault
            self.end()
            self.start()
            with suppress(OSError):
                self.connection.send((item, self.seconds))
            used = 0.0
        self.item, self.since, self.more = item, time.monotonic(), 0.0
        self._used = self._seen = used

    @property
    def late(self) -> bool:
        """Whether it computed for too long at its item, or stood still for as long."""
        if self.item is None:
            return False
        now = time.monotonic()
        if not self.ready:
            return now - self.since > _START
        used = self.process.seconds()
        if used - self._seen > _STEP:
            self.since, self._seen = now, used
        return max(used - self._used - self.more, now - self.since) > self.seconds

    def take(self) -> Result | None:
        """What it found; None when it is only ready to begin, or asked for more time.

        Raises
        ------
        EOFError, OSError
            It died over the item.
        """
        result: Result | _MoreTime | None = self.connection.recv()
        if result is None:
            self.since, self.ready = time.monotonic(), True
            self._used = self._seen = self.process.seconds()
        elif isinstance(result, _MoreTime):
            self.more += result.times * self.seconds
            return None
        else:
            self.item = None
        return result

    def end(self) -> None:
        """Kill the process: it holds nothing that could be lost."""
        self.process.kill()
        with suppress(OSError):  # whoever still waited for it may have closed it
            self.connection.close()


@dataclass(frozen=True)
class _MoreTime:
    """What a worker asks for that has found out how large its item is."""

    times: float


_asked: tuple[Connection, float] | None = None


def take_longer(values: int) -> None:
    """Ask for the time that so many decoded values take; in a worker only, else nothing."""
    if _asked is not None and values > _USUAL // 8:
        connection, seconds = _asked
        times = min(values / _USUAL, _MOST_TIMES)
        connection.send(_MoreTime(times))
        left, _ = signal.getitimer(signal.ITIMER_PROF)
        signal.setitimer(signal.ITIMER_PROF, left + seconds * times)


def _modules(work: object) -> Iterator[str]:
    """Where work comes from, also what it wraps."""
    while work is not None:
        yield str(work.__module__)
        work = getattr(work, "work", None)


def _serve(connection: Connection) -> None:
    global _asked
    try:
        work, memory = connection.recv()
        _confine(memory)
        connection.send(None)
        while True:
            item, seconds = connection.recv()
            _asked = connection, max(0.0, seconds)
            signal.setitimer(signal.ITIMER_PROF, max(1.0, seconds + _GRACE))
            result = work(item)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(result)
    except (EOFError, OSError):
        return  # the parent is gone


def _confine(memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    end_with_parent()  # nobody else would end a decoder that hangs
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold someone's image
    limit = memory + _mapped()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tune_malloc(_FREED)
    # Native decoders print what they meet, and that may be a name.
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    os.close(silence)


def _mapped() -> int:
    """Bytes of address space that the program has taken by now: torch alone may map gigabytes."""
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


class WorkerPool(Generic[Item, Result]):
    """Workers that share a list of items; use it as a context manager.

    Nothing is started before there is something to do, and the workers stay for the next list.

    Parameters
    ----------
    work : callable
        What is done with each item; must not return None.
    limits : Limits
        What it may take.
    """

    def __init__(self, work: Callable[[Item], Result], limits: Limits | None = None) -> None:
        self.work, self.limits = work, limits or Limits()
        self.workers: list[Worker[tuple[int, Item], tuple[int, Result]]] = []
        self._closed = False

    def in_order(
        self, items: Iterable[Item], seconds: Callable[[Item], float] = lambda _: 0.0
    ) -> Iterator[Result | None]:
        """The result of each item in the order given; None where two workers were lost over it.

        Parameters
        ----------
        items : iterable
            Taken only a little ahead of the results.
        seconds : callable
            What an item may take beside what the limits allow for each.
        """
        running = _Running(self, enumerate(items), seconds)
        try:
            yield from running.results()
        finally:
            for worker in [w for w in self.workers if w.item is not None]:
                worker.end()
                with suppress(ValueError):  # the pool was closed meanwhile
                    self.workers.remove(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def check(self) -> None:
        """Whether work may go on.

        Raises
        ------
        Interrupted
            It was closed.
        """
        if self._closed:
            raise Interrupted("the reading of images was ended", fix="Start it again")

    def close(self) -> None:
        """End the processes; a list that another thread is still at ends with them."""
        self._closed = True
        for worker in self.workers:
            worker.end()
        self.workers.clear()


class _Running(Generic[Item, Result]):
    """One list on its way through a crew."""

    def __init__(
        self,
        crew: WorkerPool[Item, Result],
        items: Iterator[tuple[int, Item]],
        seconds: Callable[[Item], float],
    ) -> None:
        self.crew, self.items, self.seconds = crew, items, seconds
        self.done: dict[int, Result | None] = {}
        self.again: deque[tuple[int, Item]] = deque()
        self.lost: set[int] = set()
        self.due, self.ended = 0, False

    def results(self) -> Iterator[Result | None]:
        while True:
            self._give()
            if self.due in self.done:
                yield self.done.pop(self.due)
                self.due += 1
            elif any(worker.item is not None for worker in self.crew.workers):
                self._hear()
            elif self.ended and not self.again:
                return

    def _give(self) -> None:
        while self._has_room() and (worker := self._free()) is not None:
            item = self.again.popleft() if self.again else next(self.items, None)
            if item is None:
                self.ended = True
                return
            worker.seconds = self.crew.limits.seconds + self.seconds(item[1])
            worker.give(item)

    def _has_room(self) -> bool:
        if self.again:
            return True
        busy = [w.item[0] for w in self.crew.workers if w.item is not None]
        latest = max([self.due - 1, *self.done, *busy])
        return not self.ended and latest < self.due + _AHEAD * self.crew.limits.workers

    def _free(self) -> Worker[tuple[int, Item], tuple[int, Result]] | None:
        workers = self.crew.workers
        if (idle := next((w for w in workers if w.item is None), None)) is not None:
            return idle
        if len(workers) >= self.crew.limits.workers:
            return None
        self.crew.check()
        limits = self.crew.limits
        workers.append(Worker(_Numbered(self.crew.work), limits.memory, limits.seconds))
        return workers[-1]

    def _hear(self) -> None:
        busy = {w.connection: w for w in self.crew.workers if w.item is not None}
        for connection in wait(list(busy), timeout=0.2):
            self._take(busy[connection])  # type: ignore[index]
        for worker in busy.values():
            if worker.late:
                self._lose(worker)

    def _take(self, worker: Worker[tuple[int, Item], tuple[int, Result]]) -> None:
        try:
            found = worker.take()
        except (EOFError, OSError):
            self._lose(worker)
            return
        if found is not None:
            self.done[found[0]] = found[1]

    def _lose(self, worker: Worker[tuple[int, Item], tuple[int, Result]]) -> None:
        item = worker.item
        worker.end()
        self.crew.check()
        worker.start()
        if item is None:
            return
        if item[0] in self.lost:
            self.done[item[0]] = None
        else:  # a busy machine may have been the cause, and the outcome is kept for long
            self.lost.add(item[0])
            self.again.append(item)


@dataclass(frozen=True)
class _Numbered(Generic[Item, Result]):
    """Work that hands each item's number back with its result."""

    work: Callable[[Item], Result]

    def __call__(self, item: tuple[int, Item]) -> tuple[int, Result]:
        return item[0], self.work(item[1])
