"""What a study tells while it runs, for progress displays and logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedward_server.results import Round


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


@dataclass(frozen=True)
class SiteJoined:
    """A site was described and takes part from now on."""

    arm: str
    round: int
    site: str


@dataclass(frozen=True)
class SiteRefused:
    """A site does not take part, and why."""

    arm: str
    round: int
    site: str
    kind: str
    reason: str


@dataclass(frozen=True)
class SiteQuarantined:
    """A site's updates broke the rules again and again; it is asked no more."""

    arm: str
    round: int
    site: str
    reason: str


@dataclass(frozen=True)
class SiteWarned:
    """Something about a site that an operator should know; it takes part all the same."""

    arm: str
    round: int
    site: str
    reason: str


@dataclass(frozen=True)
class StudyPaused:
    """Too few sites; the study waits."""

    arm: str
    round: int
    reason: str


@dataclass(frozen=True)
class StudyResumed:
    """Enough sites again."""

    arm: str
    round: int


Event = (
    StudyStarted
    | SiteAnswered
    | RoundEnded
    | SiteJoined
    | SiteRefused
    | SiteQuarantined
    | SiteWarned
    | StudyPaused
    | StudyResumed
)
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that does nothing."""
