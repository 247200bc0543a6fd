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
from typing import Final, Literal

from client.index.extract import Extractor
from client.index.facts import FileFacts

# Spawned, not forked: a worker must not share SQLite's file handles or another worker's pipe.
_CONTEXT: Final = multiprocessing.get_context("spawn")
_START: Final = 60.0  # seconds that a process may take to start on a busy machine


@dataclass
class Worker:
    """One process and the file that it reads.

    Attributes
    ----------
    extract : Extractor
        What it does.
    memory : int
        Bytes of address space that it may take.
    path : Path or None
        The file it is at; None while it waits for one.
    since : float
        When it began with that file, or with starting.
    ready : bool
        Whether it has started; until then its time is its own, not the file's.
    """

    extract: Extractor
    memory: int
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
            target=_serve, args=(theirs, self.extract, self.memory), daemon=True
        )
        self.process.start()
        theirs.close()
        self.path, self.ready = None, False

    def give(self, path: Path) -> bool:
        """Give it a file; False when the process is gone."""
        self.path, self.since = path, time.monotonic()
        try:
            self.connection.send_bytes(os.fsencode(path))
        except OSError:
            return False
        return True

    def take(self) -> FileFacts | Literal["ready"] | None:
        """What it found, or that it has started; None when it died."""
        try:
            said: FileFacts | Literal["ready"] = self.connection.recv()
        except (EOFError, OSError):
            return None
        if isinstance(said, FileFacts):
            self.path = None
        else:
            self.ready, self.since = True, time.monotonic()
        return said

    def is_late(self, seconds: float) -> bool:
        """Whether its file, or its start, takes longer than it may."""
        limit = seconds if self.ready else max(seconds, _START)
        return self.path is not None and time.monotonic() - self.since > limit

    def end(self) -> None:
        """Kill the process: it holds nothing that could be lost."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, extract: Extractor, memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        connection.send("ready")
        while True:
            connection.send(extract(Path(os.fsdecode(connection.recv_bytes()))))
    except (EOFError, OSError):
        return  # the parent is gone
