"""Processes that do one thing at a time; when one hangs or dies, only what it was at is lost."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

from client.forks import Fork, fork
from client.memory import keep_freed
from fedward.errors import Interrupted

Item = TypeVar("Item")
Result = TypeVar("Result")

_START: Final = 120.0  # seconds in which a process must have begun
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
        For one file; a decoder that takes longer is killed.
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
        For one item, before it is killed.
    item : object or None
        What it is at; None while it waits for something.
    since : float
        When it began with that.
    ready : bool
        Whether the process runs by now: its start is not the item's time.
    """

    work: Callable[[Item], Result]
    memory: int
    seconds: float
    item: Item | None = None
    since: float = 0.0
    ready: bool = False
    connection: Connection = field(init=False)
    process: Fork = field(init=False)

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
        try:
            self.connection.send((item, self.seconds))
        except OSError:  # it died while it had nothing to do, which is no item's fault
            self.end()
            self.start()
            with suppress(OSError):
                self.connection.send((item, self.seconds))
        self.item, self.since = item, time.monotonic()

    @property
    def late(self) -> bool:
        """Whether it has been at its item for too long."""
        limit = self.seconds if self.ready else _START
        return self.item is not None and time.monotonic() - self.since > limit

    def take(self) -> Result | None:
        """What it found; None when it is only ready to begin.

        Raises
        ------
        EOFError, OSError
            It died over the item.
        """
        result: Result | None = self.connection.recv()
        if result is None:
            self.since, self.ready = time.monotonic(), True
        else:
            self.item = None
        return result

    def end(self) -> None:
        """Kill the process: it holds nothing that could be lost."""
        self.process.kill()
        with suppress(OSError):  # whoever still waited for it may have closed it
            self.connection.close()


def _modules(work: object) -> Iterator[str]:
    """Where work comes from, also what it wraps."""
    while work is not None:
        yield str(work.__module__)
        work = getattr(work, "work", None)


def _serve(connection: Connection) -> None:
    try:
        work, memory = connection.recv()
        _confine(memory)
        connection.send(None)
        while True:
            item, seconds = connection.recv()
            # If the parent is killed, nobody else ends a decoder that hangs.
            signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds + _GRACE))
            result = work(item)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(result)
    except (EOFError, OSError):
        return  # the parent is gone


def _confine(memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold someone's image
    limit = memory + _mapped()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    keep_freed(_FREED)
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


class Crew(Generic[Item, Result]):
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
        crew: Crew[Item, Result],
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
