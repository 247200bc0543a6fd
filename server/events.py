"""What a study tells while it runs, for progress displays and logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from server.results import Round


@dataclass(frozen=True)
class StudyStarted:
    """The sites are known; the first round follows."""

    arm: str
    rounds: int
    sites: tuple[str, ...]


@dataclass(frozen=True)
class SiteAnswered:
    """A site's reply arrived."""

    arm: str
    round: int
    site: str
    what: str


@dataclass(frozen=True)
class RoundEnded:
    """A round is finished; its model stands."""

    arm: str
    result: Round
    rounds: int


Event = StudyStarted | SiteAnswered | RoundEnded
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that does nothing."""
