"""One aggregator at a time on one state folder: two would run every study twice."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from fedward.errors import OutputError, ServiceError

_LOOK: Final = 0.2
Holder = Literal["run", "service"]


@contextmanager
def alone(state: Path, holder: Holder, patience: float = 0.0) -> Iterator[None]:
    """Hold a state folder as long as this process lives; the lock ends with it, however it ends.

    Parameters
    ----------
    state : Path
        The folder.
    holder : str
        ``run`` keeps the SuperLink and the service, ``service`` the studies.
    patience : float
        Seconds to wait for a process that is about to end.

    Raises
    ------
    ServiceError
        Another process holds it.
    OutputError
        The folder cannot be written.
    """
    try:
        file = (state / f"{holder}.lock").open("ab")
    except OSError as error:
        raise OutputError(
            "the state folder must be writable",
            value=error.strerror,
            where="server.state",
            fix="See its owner, and free some space",
        ) from None
    with file:
        _take(file.fileno(), state.name, time.monotonic() + patience)
        yield


def _take(handle: int, name: str, end: float) -> None:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise _taken(name) from None
        time.sleep(_LOOK)


def _taken(name: str) -> ServiceError:
    return ServiceError(
        "one aggregator at a time may use a state folder",
        value=name,
        where="server.state",
        fix="Stop the `fedward-server run` that uses it",
    )
