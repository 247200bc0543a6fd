"""Fetch a dataset's images: from the PACS into quarantine, and from there into its folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from fedward.errors import ConfigError, FedwardError, OutputError, PacsError
from fedward_client.config import DatasetSection, SiteConfig
from fedward_client.data.files import QUARANTINE
from fedward_client.importer.check import CONFLICT, PASSING, UNASKED, Expected, examine
from fedward_client.importer.journal import Journal
from fedward_client.importer.query import Found, Query, Series
from fedward_client.importer.settings import FetchSection, PacsSection
from fedward_client.importer.source import Session, Stopped, Throttle, open_source
from fedward_client.policy.hours import quiet_until

_TRIES: Final = 3
_IN_VAIN: Final = 5  # series after another of which nothing came: the PACS is gone
_GRACE: Final = 5.0  # seconds that threads have to end
_QUIET: Final = 30.0  # seconds between two looks at the clock
_PIECE: Final = 200  # objects of a series after which the hours are looked at again
_CHUNK: Final = 1 << 20
_MIB: Final = 1 << 20
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass
class Outcome:
    """What became of a query; numbers only.

    Attributes
    ----------
    patients, studies, series, objects : int
        That fit it.
    here, refused_before : int
        Of the objects, those that were fetched and those that were refused by an earlier call.
    misfits : int
        Answers of the PACS that did not fit the question.
    fetched, bytes : int
        Objects that came into the dataset now.
    again : int
        Objects that were sent once more.
    refused : Counter
        Objects that were not taken, by reason.
    missing : int
        Objects that did not come.
    seconds : float
        Wall time of the fetching.
    """

    patients: int = 0
    studies: int = 0
    series: int = 0
    objects: int = 0
    here: int = 0
    refused_before: int = 0
    misfits: int = 0
    fetched: int = 0
    bytes: int = 0
    again: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    missing: int = 0
    seconds: float = 0.0

    @property
    def to_fetch(self) -> int:
        """Objects that are asked for."""
        return self.objects - self.here - self.refused_before

    @property
    def whole(self) -> bool:
        """Whether all that was asked for came, and nothing else."""
        return not self.missing and not self.refused

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **vars(self),
            "refused": dict(self.refused),
            "seconds": round(self.seconds, 3),
            "to_fetch": self.to_fetch,
        }


Listen = Callable[[str], None]


def fetch_dataset(
    config: SiteConfig,
    name: str,
    *,
    dry_run: bool = False,
    retry_refused: bool = False,
    listen: Listen = lambda _: None,
) -> Outcome:
    """Fetch what a dataset's query finds and is not here.

    Parameters
    ----------
    config : SiteConfig
        The site.
    name : str
        The dataset.
    dry_run : bool
        Count only.
    retry_refused : bool
        Ask again for objects that were refused before.
    listen : callable
        Hears of the progress, in words without identifiers.

    Raises
    ------
    ConfigError
        The dataset names no PACS, or is no folder of DICOM files.
    PacsError
        The PACS cannot be asked, or ends every connection.
    OutputError
        The disk is full, or another process fetches the dataset.
    """
    dataset, section, pacs = fetch_of(config, name)
    state = config.importer.state
    dataset.root.mkdir(mode=0o750, parents=True, exist_ok=True)
    quarantine = dataset.root / QUARANTINE
    quarantine.mkdir(mode=0o700, exist_ok=True)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(state / f"{name}.lock"):
        journal = Journal(state / f"{name}.sqlite", dataset.root)
        try:
            if retry_refused:
                journal.forget_refused()
            return _Fetch(config, dataset, section, pacs, journal, listen).run(dry_run=dry_run)
        finally:
            journal.close()


def fetch_of(config: SiteConfig, name: str) -> tuple[DatasetSection, FetchSection, PacsSection]:
    """A dataset with its query and its PACS.

    Raises
    ------
    ConfigError
        It has none, or is no folder of DICOM files.
    """
    dataset = config.dataset(name)
    if dataset.fetch is None:
        raise ConfigError(
            "a dataset that is fetched must say what, and from which PACS",
            fix=f"Add [datasets.{name}.fetch]",
            where=f"datasets.{name}",
        )
    if dataset.root.is_file() or dataset.format not in (None, "dicom"):
        raise ConfigError(
            "what a PACS sends is DICOM, in a folder",
            fix='Name a folder, and remove format or set it to "dicom"',
            where=f"datasets.{name}.root",
        )
    return dataset, dataset.fetch, config.pacs[dataset.fetch.pacs]


def place_of(root: Path, study: str, series: str, uid: str) -> Path:
    """Where an object lies; no name of a folder or a file holds a UID."""
    parts = [hashlib.sha256(one.encode()).hexdigest()[:24] for one in (study, series, uid)]
    return root / parts[0] / parts[1] / f"{parts[2]}.dcm"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                "one process at a time may fetch a dataset",
                fix="Wait for the other one, or end it",
                where="importer.state",
            ) from None
        yield


class _Fetch:
    def __init__(
        self,
        config: SiteConfig,
        dataset: DatasetSection,
        section: FetchSection,
        pacs: PacsSection,
        journal: Journal,
        listen: Listen,
    ) -> None:
        self._config, self._dataset, self._section = config, dataset, section
        self._pacs, self._journal, self._listen = pacs, journal, listen
        self._throttle = Throttle(pacs.max_mib_per_second * _MIB)
        self._quarantine = dataset.root / QUARANTINE
        self._source = open_source(pacs, self._quarantine, self._keep, self._throttle)
        self._outcome = Outcome()
        self._wanted: dict[str, Expected] = {}
        self._done: dict[str, str] = {}  # SHA-256 of what is in the dataset
        self._refused: set[str] = set()
        self._fatal: FedwardError | None = None
        self._last: PacsError | None = None
        self._in_vain = 0
        self._lock = threading.Lock()

    def run(self, *, dry_run: bool) -> Outcome:
        outcome = self._outcome
        try:
            found = Query(self._dataset, self._section, self._source, self._tell_found).run()
            self._count(found)
            if not dry_run:
                self._adopt(found)
                began = time.monotonic()
                self._check_room()
                self._fetch(found)
                outcome.seconds = time.monotonic() - began
        finally:
            self._throttle.stop.set()
            self._source.close()
            for half in self._quarantine.iterdir():
                half.unlink(missing_ok=True)
        if self._fatal is not None:
            raise self._fatal
        if not dry_run:
            outcome.missing = outcome.to_fetch - outcome.fetched - len(self._refused)
            if outcome.missing and not outcome.fetched and self._last is not None:
                raise self._last
        return outcome

    def _tell_found(self, found: Found) -> None:
        self._listen(f"{len(found.studies)} studies, {found.objects} objects found")

    def _count(self, found: Found) -> None:
        outcome = self._outcome
        for one in found.series:
            expected = Expected(one.study, one.uid, one.patient, one.modality)
            self._wanted |= dict.fromkeys(one.objects, expected)
        known = self._journal.known(self._wanted)
        self._done = {uid: sha256 for uid, (reason, sha256) in known.items() if not reason}
        outcome.patients, outcome.studies = len(found.patients), len(found.studies)
        outcome.series, outcome.objects = len(found.series), len(self._wanted)
        outcome.here = len(self._done)
        outcome.refused_before = len(known) - outcome.here
        outcome.misfits = found.misfits
        for uid, (reason, _) in known.items():
            if reason:
                del self._wanted[uid]

    def _adopt(self, found: Found) -> None:
        """Take over what a killed process had fetched and not noted, and remove halves."""
        for one in found.series:
            for uid in one.objects:
                path = place_of(self._dataset.root, one.study, one.uid, uid)
                if uid in self._wanted and uid not in self._done and path.exists():
                    self._note(path, uid)
        for path in sorted(self._quarantine.iterdir()):
            self._keep(path, known_only=True)

    def _note(self, path: Path, uid: str) -> None:
        if examine(path, self._wanted) != (uid, ""):
            path.unlink()  # a power cut may leave half a file
            return
        self._done[uid] = digest = _digest(path)
        self._outcome.here += 1
        self._journal.add(uid, "", digest, path.stat().st_size)

    def _fetch(self, found: Found) -> None:
        todo: queue.SimpleQueue[Series] = queue.SimpleQueue()
        for one in found.series:
            if self._missing(one):
                todo.put(one)
        workers = [
            threading.Thread(target=self._work, args=(todo,), daemon=True)
            for _ in range(min(self._pacs.associations, todo.qsize()))
        ]
        began = time.monotonic()
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers):
                workers[0].join(0.1)
                workers = [worker for worker in workers if worker.is_alive()]
                self._tell_fetched(began)
        finally:
            self._throttle.stop.set()
            self._source.close()
            end = time.monotonic() + _GRACE
            for worker in workers:
                worker.join(max(0.0, end - time.monotonic()))

    def _tell_fetched(self, began: float) -> None:
        outcome = self._outcome
        rate = outcome.bytes / _MIB / max(1e-3, time.monotonic() - began)
        until = self._quiet_until()
        pause = f", quiet until {until:%H:%M}" if until else f", {rate:.1f} MiB/s"
        self._listen(f"{outcome.fetched} of {outcome.to_fetch} objects fetched{pause}")

    def _missing(self, series: Series) -> dict[str, str]:
        """Objects that are neither here nor refused, to their SOP classes."""
        return {
            uid: sop
            for uid, sop in series.objects.items()
            if uid in self._wanted and uid not in self._done and uid not in self._refused
        }

    def _work(self, todo: queue.SimpleQueue[Series]) -> None:
        session = self._source.session()
        try:
            while not self._throttle.stop.is_set():
                self._series(todo.get_nowait(), session)
        except (queue.Empty, Stopped):
            pass
        except FedwardError as error:
            self._fail(error)
        finally:
            session.close()

    def _series(self, series: Series, session: Session) -> None:
        before = len(self._missing(series))
        for turn in range(_TRIES):
            missing = self._missing(series)
            if not missing or self._throttle.stop.is_set():
                break
            try:
                for some in self._pieces(missing):
                    self._wait_for_hours()
                    whole = not turn and len(some) == len(series.objects)
                    session.retrieve(series.study, series.uid, some, whole)
            except PacsError as error:
                self._last = error
                session.close()
                self._throttle.stop.wait(0.5 * 2.0**turn)
        with self._lock:
            came = len(self._missing(series)) < before
            self._in_vain = 0 if came else self._in_vain + 1
            gone = self._in_vain >= _IN_VAIN
        if gone and self._last is not None:
            self._fail(self._last)

    def _pieces(self, missing: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """All at once; with quiet hours, no more than end soon after these begin."""
        items = list(missing.items())
        size = _PIECE if self._pacs.quiet_hours else len(items)
        for start in range(0, len(items), size):
            yield dict(items[start : start + size])

    def _quiet_until(self) -> datetime | None:
        now = self._config.policy.local_time(datetime.now())
        return quiet_until(self._pacs.quiet_hours, now)

    def _wait_for_hours(self) -> None:
        while self._quiet_until() is not None:
            if self._throttle.stop.wait(_QUIET):
                raise Stopped

    def _keep(self, path: Path, *, known_only: bool = False) -> bool:
        """Check a file in quarantine and move it into the dataset, or remove it."""
        try:
            return self._take(path, known_only=known_only)
        except OSError as error:
            full = error.errno in _FULL
            self._fail(_no_room() if full else _not_writable(error))
        except OutputError as error:
            self._fail(error)
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        return False

    def _take(self, path: Path, *, known_only: bool) -> bool:
        uid, reason = examine(path, self._wanted)
        digest = "" if reason else _digest(path)
        with self._lock:
            if uid in self._done and reason in ("", UNASKED):
                if digest == self._done[uid]:
                    self._outcome.again += 1
                    return True
                reason = CONFLICT
            if reason:
                if not known_only:
                    self._outcome.refused[reason] += 1
                    self._refuse(uid, reason)
                return False
            self._done[uid] = digest
        size = path.stat().st_size
        try:
            self._check_room()
            self._move(path, self._wanted[uid], uid)
        except BaseException:
            with self._lock:
                del self._done[uid]
            raise
        with self._lock:
            self._outcome.fetched += 1
            self._outcome.bytes += size
        self._journal.add(uid, "", digest, size)
        return True

    def _refuse(self, uid: str, reason: str) -> None:
        """Ask no more for an object that another try would not make better."""
        if uid in self._wanted and uid not in self._done and reason not in PASSING:
            self._refused.add(uid)
            self._journal.add(uid, reason, "", 0)

    def _move(self, path: Path, expected: Expected, uid: str) -> None:
        target = place_of(self._dataset.root, expected.study, expected.series, uid)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(0o640)
        path.rename(target)

    def _check_room(self) -> None:
        free = shutil.disk_usage(self._dataset.root).free
        if free < self._config.importer.reserve_gib * (1 << 30):
            raise _no_room()

    def _fail(self, error: FedwardError) -> None:
        self._fatal = self._fatal or error
        self._throttle.stop.set()


def _no_room() -> OutputError:
    return OutputError(
        "there must be room for what is fetched, and importer.reserve_gib",
        value="the disk is full",
        fix="Free some space and give the command again: what was fetched is kept",
        where="importer",
    )


def _not_writable(error: OSError) -> OutputError:
    return OutputError(
        "the dataset's folder must be writable for the importer",
        value=os.strerror(error.errno or 0),
        fix="Give it to the importer's user",
        where="importer",
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
