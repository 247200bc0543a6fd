"""Predict images as they arrive in a folder, and have the answers stored.

Nothing of what is to be done is kept but what was done: whatever ends the process, the next one
looks at the folder and goes on. An input that cannot be predicted, or that ended the process again
and again, gets a note in ``dead-letter``; without that note, or with other files, it is tried anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from fedward.errors import DataError, OutputError
from fedward.files import hold, write_private
from fedward.rule_codes import RuleCode
from fedward_client.data.files import walk
from fedward_client.predict.inputs import Found, Source, stem_of
from fedward_client.predict.run import Results, Wish, write_tables
from fedward_client.training.runtime import Runtime

DEAD: Final = "dead-letter"
_TRYING: Final = "trying.json"
_LOCK: Final = "watch.lock"
_TRIES: Final = 3
_LONGEST: Final = 900.0  # seconds between two tries
_LOOK: Final = 5.0  # seconds between two looks at the folder, at most
Step = Callable[[], tuple[bool, dict[str, str]]]
"""Fetches or stores: whether it came to its end, and files that will never be taken, with why."""


@dataclass
class Backoff:
    """When something is tried again: each failure after another doubles the pause.

    Attributes
    ----------
    pause : float
        Seconds after the first failure.
    due : float
        Monotonic time of the next try.
    failures : int
        One after another.
    """

    pause: float
    due: float = 0.0
    failures: int = 0

    def failed(self) -> None:
        """Wait longer than the last time."""
        self.due = time.monotonic() + min(_LONGEST, self.pause * 2.0**self.failures)
        self.failures += 1

    def worked(self, pause: float = 0.0) -> None:
        """Begin anew."""
        self.due, self.failures = time.monotonic() + pause, 0


@dataclass
class Count:
    """What became of the inputs, numbers only.

    Attributes
    ----------
    predicted, dead, waiting : int
        Inputs that are predicted, have a note in the dead-letter folder, and are still coming or
        are tried again.
    failing : int
        Whether fetching failed at last, and whether storing did.
    """

    predicted: int = 0
    dead: int = 0
    waiting: int = 0
    failing: int = 0


@dataclass
class Watch:
    """One folder that is looked at.

    Attributes
    ----------
    wish : Wish
        Model, folder and choices.
    look : callable
        Finds the inputs, and gives the wish with what tables say of them.
    runtime : Runtime
        The machine.
    every : float
        Seconds between two fetches, and before something that failed is tried again.
    settle : float
        Seconds in which an input must not change before it is predicted.
    fetch, store : callable or None
        See :data:`Step`.
    tell : callable
        Hears what happens, in words without identifiers.
    """

    wish: Wish
    look: Callable[[], tuple[Found, Wish]]
    runtime: Runtime
    every: float = 60.0
    settle: float = 30.0
    fetch: Step | None = None
    store: Step | None = None
    tell: Callable[[str], None] = lambda text: None
    count: Count = field(default_factory=Count)
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)
    _tries: dict[str, Backoff] = field(default_factory=dict)
    _before: object = None  # what lay there at the last look
    _next: float = 0.0  # when an input is due that waits
    _deaths: dict[str, int] = field(default_factory=dict)
    _owing: bool = True  # something may be unstored

    def run(self, *, once: bool = False) -> Count:
        """Watch until interrupted; with `once` until nothing is left to do.

        Raises
        ------
        OutputError
            The folder of the results cannot be written, or another process watches for it.
        KeyboardInterrupt
            The process shall end; what was done is kept.
        """
        results = Results(self.wish, self.runtime)
        handle = self._alone()
        self._recall()
        fetching, storing = Backoff(self.every), Backoff(self.every)
        try:
            while True:
                if self.fetch and time.monotonic() >= fetching.due:
                    self._step(self.fetch, fetching)
                    fetching.due = max(fetching.due, time.monotonic() + self.every)
                self._look(results)
                if self.store and self._owing and time.monotonic() >= storing.due:
                    self._owing = not self._step(self.store, storing)
                failures = [fetching.failures, storing.failures]
                if once and not self.count.waiting and not any(0 < n < _TRIES for n in failures):
                    return replace(self.count, failing=sum(n > 0 for n in failures))
                self._wait(fetching, storing)
        finally:
            os.close(handle)

    def _step(self, step: Step, backoff: Backoff) -> bool:
        worked, refused = step()
        for name, reason in refused.items():
            self._bury(name, "", f"the PACS does not take it: {reason}")
        if worked:
            backoff.worked()
        else:
            backoff.failed()
            pause = backoff.due - time.monotonic()
            self.tell(f"the PACS is tried again in {pause:.0f} s")
        return worked

    def _wait(self, *steps: Backoff) -> None:
        moments = [self._next, *(one.due for one in steps if one.failures)]
        pause = min(moments) - time.monotonic()
        time.sleep(min(_LOOK, self.every, max(0.05, pause)))

    def _look(self, results: Results) -> None:
        """Predict what has settled and is not done."""
        # A look into headers costs; where no file came, went or changed there is nothing to see.
        now = [*_listing(self.wish.path), *_listing(self.wish.out / DEAD)]
        if now == self._before and time.monotonic() < self._next:
            return
        self._before, self._next = now, float("inf")
        try:
            found, results.wish = self.look()
        except DataError as error:
            if error.code not in (RuleCode.DATASET, RuleCode.DATASET_IMAGES):
                raise
            found = Found((), ())  # no image is there yet
        count, ready = Count(), []
        for source in found.sources:
            if results.known(source) is not None:
                count.predicted += 1
            elif self._is_dead(source.name, key := results.wish.identity(source)):
                count.dead += 1
            elif self._ready(source.name, key):
                ready.append((source, key))
            else:
                count.waiting += 1
        for one in found.left_out:
            if self._ready(one.name, one.reason):
                self._bury(one.name, one.reason, one.reason)
                count.dead += 1
            else:
                count.waiting += 1
        self.count = count
        self._predict(results, ready)

    def _predict(self, results: Results, ready: list[tuple[Source, str]]) -> None:
        try:
            for number, (source, key) in enumerate(ready, start=1):
                self.tell(f"predicting {number} of {len(ready)}")
                self._one(results, source, key)
        finally:
            if ready:
                write_tables(results.wish, results.records())
                self.tell(
                    f"{self.count.predicted} predicted, {self.count.waiting} waiting, "
                    f"{self.count.dead} in {DEAD}"
                )

    def _one(self, results: Results, source: Source, key: str) -> None:
        if (deaths := self._deaths.pop(key, 0)) >= _TRIES:
            self._note(None)
            self._bury(source.name, key, f"the process ended {deaths} times while it predicted it")
            self.count.dead += 1
            return
        if deaths:
            self._deaths[key] = deaths
        self._note(key)
        try:
            record = results.of(source)
            self._deaths.pop(key, None)
        finally:
            self._note(None)
        if record["state"] != "refused":
            self.count.predicted += 1
            self._owing = True
            self._tries.pop(source.name, None)
            return
        backoff = self._tries.setdefault(source.name, Backoff(self.every))
        backoff.failed()
        if backoff.failures < _TRIES:
            self._next = min(self._next, backoff.due)
            self.count.waiting += 1
            return
        del self._tries[source.name]
        self._bury(source.name, key, record["reason"])
        self.count.dead += 1

    def _ready(self, name: str, key: str) -> bool:
        """Whether an input looks as it did a while ago, by this process's clock, and is due."""
        now = time.monotonic()
        if self._seen.get(name, ("", 0.0))[0] != key:
            self._seen[name] = (key, now)
            self._tries.pop(name, None)
        due = self._seen[name][1] + self.settle
        if name in self._tries:
            due = max(due, self._tries[name].due)
        if now < due:
            self._next = min(self._next, due)
        return now >= due

    # What cannot be done.

    def _recall(self) -> None:
        """How often each input was at work when the process ended."""
        with suppress(OSError, ValueError):
            told = json.loads((self.wish.out / _TRYING).read_text("utf-8"))
            self._deaths = dict(told["deaths"])
            if (key := told["now"]) is not None:
                self._deaths[key] = self._deaths.get(key, 0) + 1

    def _note(self, key: str | None) -> None:
        """Write down which input is at work, which may end the process."""
        told = {"now": key, "deaths": self._deaths}
        write_private(self.wish.out / _TRYING, json.dumps(told).encode())

    def _is_dead(self, name: str, key: str) -> bool:
        with suppress(OSError, ValueError):
            told = json.loads(self._note_of(name).read_text("utf-8"))
            return bool(told.get("key") == key)
        return False

    def _bury(self, name: str, key: str, reason: str) -> None:
        path = self._note_of(name)
        if path.is_file() and self._is_dead(name, key):
            return
        moment = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        told = {"input": name, "reason": reason, "key": key, "at": moment}
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise OutputError(
                "the folder of the predictions must be writable",
                value=error.strerror,
                fix="Choose another, or free some space",
                where="--out",
            ) from None
        write_private(path, (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode())

    def _note_of(self, name: str) -> Path:
        return self.wish.out / DEAD / f"{stem_of(name)}.json"

    def _alone(self) -> int:
        try:
            return hold(self.wish.out / _LOCK, wait=False)
        except BlockingIOError:
            raise OutputError(
                "one process at a time may watch for a folder of predictions",
                fix="End the other one, or choose another folder",
                where="--out",
            ) from None


def _listing(path: Path) -> list[tuple[str, int, int]]:
    """What lies there, as it shows without a look into a file."""
    found = []
    for file in walk(path) if path.is_dir() else []:
        with suppress(OSError):
            info = file.stat()
            found.append((str(file), info.st_size, info.st_mtime_ns))
    return found
