"""Ends a trainer that stopped answering, and remembers which order it had in hand then.

Native code that keeps the interpreter's lock (an endless regular expression, a loop in a library)
stops every thread of the process, the officer's included. :mod:`faulthandler` waits in a thread
that needs no lock: unless it is told every second that Python still runs, it writes where each
thread stands and ends the process, which the supervisor, systemd or the container's restart policy
starts again. It also writes when native code crashes. At the next start, a report says that the
order in hand stopped the trainer. That order is refused from then on, until the site's officer
approves its study again.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from fedward.errors import PolicyError
from fedward.files import write_private
from fedward.rule_codes import FIX, RuleCode

_LOG = logging.getLogger("fedward.trainer")
_BEAT_SECONDS: Final = 1.0
_MOST: Final = 1000
_MOST_TEXT: Final = 64


class OrderKey(NamedTuple):
    """What an order is recognised by; its round may differ when the study asks again."""

    what: str
    study: str
    plan: str


class OrdersInHand:
    """The orders that are being carried out, on disk, and those that stopped a trainer.

    Parameters
    ----------
    state : Path
        The site's state folder.

    Attributes
    ----------
    report : Path
        Where the watchdog writes; a file with content says that it ended the process.
    """

    def __init__(self, state: Path) -> None:
        self.report = state / "stopped.txt"
        self._folder, self._list = state / "in-hand", state / "stopped-orders.json"
        self._numbers = itertools.count()
        self._stopped = [OrderKey(*one) for one in _read_list(self._list)]

    def note_last_end(self) -> list[OrderKey]:
        """Whom the last end of a trainer is blamed on; call it once, at the start.

        Returns
        -------
        list of OrderKey
            Empty unless the watchdog or a crash ended the process. An order whose plan was being
            read comes before one that trains beside it.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        marks = sorted(self._folder.iterdir())
        blamed: list[OrderKey] = []
        with suppress(OSError):
            if self.report.stat().st_size:
                reading = [mark for mark in marks if mark.name.startswith("read")]
                blamed = sorted({key for mark in reading or marks for key in _read_key(mark)})
                self.report.replace(self.report.with_name("last-stop.txt"))
        self._remember([*(one for one in self._stopped if one not in blamed), *blamed])
        for mark in marks:
            mark.unlink(missing_ok=True)
        return blamed

    @contextmanager
    def order(self, what: str, record: Mapping[str, Any]) -> Iterator[OrderMark]:
        """Have an order in hand; while its plan is read and its answer is checked, it is marked.

        Raises
        ------
        PolicyError
            It stopped a trainer before.
        """
        key = OrderKey(what, *(str(record.get(k, ""))[:_MOST_TEXT] for k in ("study", "plan_hash")))
        if key in self._stopped:
            raise PolicyError(RuleCode.STOPS_TRAINER, fix=FIX)
        mark = OrderMark(self._folder, next(self._numbers), key)
        mark.write("read")
        try:
            yield mark
        finally:
            mark.write("")

    def forgive(self, study: str) -> None:
        """Carry out a study's orders again: its officer approved it anew."""
        self._remember([one for one in self._stopped if one.study != study])

    def _remember(self, keys: list[OrderKey]) -> None:
        if keys != self._stopped:
            self._stopped = keys[-_MOST:]
            write_private(self._list, json.dumps(self._stopped).encode())


class OrderMark:
    """One order's file in the folder; it has to outlive the process, not the machine."""

    def __init__(self, folder: Path, number: int, key: OrderKey) -> None:
        self._folder, self._number, self._key = folder, number, key
        self._now: Path | None = None

    def write(self, doing: str) -> None:
        """Say that it is being read (``read``) or worked on (``work``), or is not ("")."""
        # On a full disk an order is carried out unmarked; what leaves needs the disk anyway.
        with suppress(OSError):
            if self._now is not None:
                self._now.unlink(missing_ok=True)
            self._now = self._folder / f"{doing}-{self._number}" if doing else None
            if self._now is not None:
                handle = os.open(self._now, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(handle, "w") as file:
                    json.dump(self._key, file)


def watch(report: Path, seconds: float) -> Callable[[], None]:
    """Have this process end when Python does not get to run for so many seconds.

    Parameters
    ----------
    report : Path
        Where the threads' places in the code are written then.
    seconds : float
        Longest silence.

    Returns
    -------
    callable
        Ends the watch.
    """
    handle = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    faulthandler.enable(handle)
    ended = threading.Event()

    def beat() -> None:
        while not ended.is_set():
            faulthandler.dump_traceback_later(seconds, exit=True, file=handle)
            ended.wait(_BEAT_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    thread = threading.Thread(target=beat, daemon=True, name="watchdog")
    thread.start()

    def end() -> None:
        ended.set()
        thread.join()
        faulthandler.disable()
        os.close(handle)

    return end


def _read_list(path: Path) -> list[list[str]]:
    try:
        return list(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        _LOG.warning("the list of orders that stopped the trainer cannot be read; it starts anew")
        return []


def _read_key(mark: Path) -> list[OrderKey]:
    with suppress(OSError, ValueError, TypeError):
        return [OrderKey(*json.loads(mark.read_bytes()))]
    return []  # it ended before the mark was whole
