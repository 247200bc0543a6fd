"""A process that reads one file at a time; when a decoder hangs or dies, only it is lost."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Final

from client.index.extract import Extractor
from client.index.facts import FileFacts

# Spawned, not forked: a worker must not share SQLite's file handles or another worker's pipe.
_CONTEXT: Final = multiprocessing.get_context("spawn")
_START: Final = 120.0  # seconds in which a process must have begun
_GRACE: Final = 10.0  # seconds more than the parent allows, after which a worker ends by itself


@dataclass
class Worker:
    """One process and the file that it reads.

    Attributes
    ----------
    extract : Extractor
        What it does.
    memory : int
        Bytes of address space that it may take.
    seconds : float
        For one file, before it is killed.
    path : Path or None
        The file it is at; None while it waits for one.
    since : float
        When it began with that file.
    ready : bool
        Whether the process runs by now: its start is not the file's time.
    """

    extract: Extractor
    memory: int
    seconds: float
    path: Path | None = None
    since: float = 0.0
    ready: bool = False
    connection: Connection = field(init=False)
    process: SpawnProcess = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start the process, or another one in its place."""
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(
            target=_serve, args=(theirs, self.extract, self.memory, self.seconds), daemon=True
        )
        self.process.start()
        theirs.close()
        self.path, self.ready = None, False

    def give(self, path: Path) -> None:
        """Give it a file."""
        try:
            self.connection.send_bytes(os.fsencode(path))
        except OSError:  # it died while it had nothing to do, which is no file's fault
            self.end()
            self.start()
            self.connection.send_bytes(os.fsencode(path))
        self.path, self.since = path, time.monotonic()

    @property
    def late(self) -> bool:
        """Whether it has been at its file for too long."""
        limit = self.seconds if self.ready else _START
        return self.path is not None and time.monotonic() - self.since > limit

    def take(self) -> FileFacts | None:
        """What it found; None when it is only ready to begin.

        Raises
        ------
        EOFError, OSError
            It died over the file.
        """
        facts: FileFacts | None = self.connection.recv()
        if facts is None:
            self.since, self.ready = time.monotonic(), True
        else:
            self.path = None
        return facts

    def end(self) -> None:
        """Kill the process: it holds nothing that could be lost."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, extract: Extractor, memory: int, seconds: float) -> None:
    _confine(memory)
    try:
        connection.send(None)
        while True:
            path = Path(os.fsdecode(connection.recv_bytes()))
            # If the parent is killed, nobody else ends a decoder that hangs.
            signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)
            facts = extract(path)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(facts)
    except (EOFError, OSError):
        return  # the parent is gone


def _confine(memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold someone's image
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # Native decoders print what they meet, and that may be a name.
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    os.close(silence)
