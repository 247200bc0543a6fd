"""What the trainer is doing, for whoever asks."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Activity:
    """What a status tells; nothing in it names a person or a file.

    Attributes
    ----------
    doing : str
        ``idle``, ``describing``, ``training`` or ``evaluating``.
    study, round, step, steps : str, int, int, int
        Of what.
    since : float
        Seconds since the epoch.
    waiting : int
        Orders that wait for their turn.
    paused : bool
        Whether the site's officer paused it.
    connector : str
        What the attached connector found of the images, or "none attached".
    network : str
        What the trainer found of the network.
    walls : bool
        Whether the trainer proved that it has no network.
    last_error, last_error_at : str, float
        The last refusal that was no policy's, and when.
    recovered_at : float
        When an order was carried out after it; 0 while none was.
    last_refusal, last_refusal_at : str, float
        The last one that was, with its study, and when.
    warnings : list of str
        What the officer should know at once.
    """

    site: str
    doing: str = "idle"
    study: str = ""
    round: int = 0
    step: int = 0
    steps: int = 0
    since: float = field(default_factory=time.time)
    waiting: int = 0
    paused: bool = False
    connector: str = "none attached"
    network: str = ""
    walls: bool = False
    last_error: str = ""
    last_error_at: float = 0.0
    recovered_at: float = 0.0
    last_refusal: str = ""
    last_refusal_at: float = 0.0
    done: int = 0
    warnings: list[str] = field(default_factory=list)


class StatusBoard:
    """The activity, changed and read by several threads."""

    def __init__(self, site: str) -> None:
        self._now, self._news = Activity(site), threading.Condition()

    def set(self, **changes: Any) -> None:
        """Change some of it and tell who waits."""
        with self._news:
            if "doing" in changes and changes["doing"] != self._now.doing:
                self._now.since = time.time()
            for name, value in changes.items():
                setattr(self._now, name, value)
                if name in ("last_error", "last_refusal"):
                    setattr(self._now, f"{name}_at", time.time())
                if name == "last_error":
                    self._now.recovered_at = 0.0
            self._news.notify_all()

    def carried_out(self) -> None:
        """Count an order that was carried out; an error before it is over."""
        with self._news:
            self._now.done += 1
            if self._now.last_error and not self._now.recovered_at:
                self._now.recovered_at = time.time()
            self._news.notify_all()

    def get(self) -> dict[str, Any]:
        """All of it."""
        with self._news:
            return asdict(self._now)

    @property
    def paused(self) -> bool:
        """Whether the officer paused the site."""
        with self._news:
            return self._now.paused

    def wait(self, seconds: float) -> bool:
        """Wait for a change, at most so long."""
        with self._news:
            return self._news.wait(seconds)
