"""Scan a dataset into its index with several processes that a bad file cannot stop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Final

from fedward import rule_codes
from fedward.errors import Interrupted
from fedward_client.data.files import find
from fedward_client.index.extract import AGAIN, Extractor, FileFacts
from fedward_client.index.store import Index
from fedward_client.worker_pool import Limits, Worker

_BATCH: Final = 200  # files in a transaction
_PATIENCE: Final = 2.0  # seconds after which what was found is written, however little

Listen = Callable[["Summary"], None]
_Reader = Worker[Path, FileFacts]


@dataclass
class Summary:
    """What a scan did.

    Attributes
    ----------
    new, unchanged, gone : int
        Files read, files known from before, and files that are no longer there.
    reasons : Counter
        Of the files read, those that cannot serve, by reason.
    seconds : float
        Wall time.
    """

    new: int = 0
    unchanged: int = 0
    gone: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def scan(
    extract: Extractor, index: Index, limits: Limits | None = None, listen: Listen | None = None
) -> Summary:
    """Bring an index up to date.

    Parameters
    ----------
    extract : Extractor
        The dataset and how it is read.
    index : Index
        Kept after every few files, so that a killed scan goes on where it was.
    limits : Limits, optional
        What it may take.
    listen : callable, optional
        Hears of the progress.

    Raises
    ------
    Interrupted
        Ctrl-C; what was read is kept.
    OutputError
        The index cannot be written.
    """
    running = _Scan(extract, index, limits or Limits(), listen or (lambda _: None))
    return running.run()


class _Scan:
    def __init__(self, extract: Extractor, index: Index, limits: Limits, listen: Listen) -> None:
        self.extract, self.index, self.limits, self.listen = extract, index, limits, listen
        self.summary, self.number = Summary(), index.next_scan()
        self.settings = extract.settings
        self.found: list[FileFacts] = []
        self.seen: list[str] = []
        self.workers: list[_Reader] = []
        self.written = time.monotonic()

    def run(self) -> Summary:
        began = time.monotonic()
        try:
            for path in self._unknown():
                self._free().give(path)
            while any(worker.item for worker in self.workers):
                self._listen_to_workers()
            self._write()
            self.summary.gone = self.index.drop_before(self.number)
        except KeyboardInterrupt:
            self._write()
            raise Interrupted(
                "the scan was interrupted",
                value=f"{self.summary.new} files read",
                fix="What was read is kept; index again for the rest",
            ) from None
        finally:
            for worker in self.workers:
                worker.end()
        self.summary.seconds = time.monotonic() - began
        self.listen(self.summary)
        return self.summary

    def _unknown(self) -> Iterator[Path]:
        """Files that are new or changed; those that are known are marked as seen."""
        root = self.extract.root
        for path in [root] if root.is_file() else find(root, skipped=True):
            name = self.extract.name(path)
            try:
                info = path.stat()
                known = (info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            except OSError:
                known = (0, 0, 0)
            if self.index.is_known(name, *known, self.settings):
                self.seen.append(name)
                self.summary.unchanged += 1
                self._write_sometimes()
            else:
                yield path

    def _free(self) -> _Reader:
        while True:
            for worker in self.workers:
                if worker.item is None:
                    return worker
            if len(self.workers) < self.limits.workers:
                self.workers.append(Worker(self.extract, self.limits.memory, self.limits.seconds))
                return self.workers[-1]
            self._listen_to_workers()

    def _listen_to_workers(self) -> None:
        busy = {worker.connection: worker for worker in self.workers if worker.item}
        for connection in wait(list(busy), timeout=0.2):
            self._hear(busy[connection])  # type: ignore[index]
        for worker in self.workers:
            if worker.item and worker.late:
                self._keep(self._lost(worker, worker.item))
        self._write_sometimes()

    def _hear(self, worker: _Reader) -> None:
        path = worker.item
        try:
            facts = worker.take()
        except (EOFError, OSError):
            facts = None if path is None else self._lost(worker, path)
        if facts is not None:
            self._keep(facts)

    def _lost(self, worker: _Reader, path: Path) -> FileFacts:
        """The file that a worker hung or died over; another worker takes its place.

        The machine may have been the cause, so the next scan tries it again.
        """
        worker.end()
        worker.start()
        name, reason = self.extract.name(path), rule_codes.DECODER_FAILED
        facts = FileFacts(name, 0, AGAIN, 0, reason=reason)
        with suppress(OSError):  # it may be gone by now
            facts = replace(facts, size=path.stat().st_size)
        return facts

    def _keep(self, facts: FileFacts) -> None:
        self.found.append(facts)
        self.summary.new += 1
        if facts.reason:
            self.summary.reasons[facts.reason] += 1

    def _write_sometimes(self) -> None:
        waiting = len(self.found) + len(self.seen)
        if waiting >= _BATCH or (waiting and time.monotonic() - self.written > _PATIENCE):
            self._write()

    def _write(self) -> None:
        self.index.put(self.found, self.seen, self.number, self.settings)
        self.found, self.seen, self.written = [], [], time.monotonic()
        self.listen(self.summary)
