"""The trainer that a connector works for, and what it is told of the link."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedward.errors import FedwardError
from fedward_client.link.client import TrainerClient, TrainerGone, TrainerTaken
from fedward_client.link.state import MOST_TEXT, LinkState, link_file, write_state

_LOG = logging.getLogger("fedward.connector")
# A trainer that starts imports a lot, and opens ledger and audit log.
_TRAINER_SECONDS: Final = 120.0
_AGAIN_SECONDS: Final = 0.2


class TrainerSession:
    """Keeps one trainer at hand, through its restarts.

    Parameters
    ----------
    socket : Path
        The trainer's.
    version, isolation : str
        What it is told of this connector: its release, and what it found of the images.
    folder : Path
        Where the state of the link is kept.
    stop : threading.Event
        Ends every wait.

    Attributes
    ----------
    state : LinkState
        What is told of the link.
    """

    def __init__(
        self, socket: Path, version: str, isolation: str, folder: Path, stop: threading.Event
    ) -> None:
        self._socket, self._version, self._isolation = socket, version, isolation
        self._stop, self._lock = stop, threading.Lock()
        self._caller: TrainerClient | None = None
        self._again: threading.Thread | None = None
        self.file = link_file(folder)
        self.state = LinkState(isolation=isolation[:MOST_TEXT], since=time.time())

    @property
    def stopping(self) -> bool:
        """Whether nothing is waited for any more."""
        return self._stop.is_set()

    def caller(self) -> TrainerClient:
        """The trainer, waited for while it starts.

        Raises
        ------
        TrainerGone, TrainerTaken
            It does not come, or another connector has it.
        """
        with self._lock:
            end = time.monotonic() + _TRAINER_SECONDS
            while self._caller is None or self._caller.gone.is_set():
                try:
                    self._caller = TrainerClient(self._socket, self._version, self._isolation)
                    self.state.trainer = "attached"
                    self._caller.tell(self.state)
                except (TrainerGone, TrainerTaken) as error:
                    self.state.trainer = "gone"
                    # Not there yet: so looks every start.
                    starts = isinstance(error, TrainerGone)
                    self.tell("waiting for the trainer", None if starts else error)
                    if time.monotonic() > end or self._stop.wait(_AGAIN_SECONDS):
                        raise
            return self._caller

    def look(self, quiet: threading.Event) -> None:
        """Have a trainer that started again hear of the link now, and not with the next order.

        Parameters
        ----------
        quiet : threading.Event
            The link has ended meanwhile.
        """
        gone = self._caller is not None and self._caller.gone.is_set()
        if gone and not (self._again and self._again.is_alive()):
            self._again = threading.Thread(target=self._attach, args=(quiet,), daemon=True)
            self._again.start()

    def tell(self, state: str, error: FedwardError | None = None) -> None:
        """Say how the link is: in the log, in the file, to the trainer."""
        if state != self.state.state:
            self.state.since = time.time()
            if error:
                _LOG.warning("%s", error)
            else:
                _LOG.info("the link is %s", state)
        self.state.state = state
        if error:
            self.state.last_error = str(error)[:MOST_TEXT]
            self.state.last_error_at = time.time()
            self.state.recovered_at = 0.0
        elif state == "online" and self.state.last_error and not self.state.recovered_at:
            self.state.recovered_at = time.time()
        write_state(self.file, self.state)
        if self._caller and not self._caller.gone.is_set():
            with suppress(TrainerGone):
                self._caller.tell(self.state)

    def close(self) -> None:
        """Let go of the trainer."""
        if self._caller:
            self._caller.close()

    def _attach(self, quiet: threading.Event) -> None:
        with suppress(FedwardError):
            self.caller()
            if not quiet.is_set():
                self.tell("online")
