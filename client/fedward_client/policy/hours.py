"""Quiet hours: local times at which no training runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Final

from fedward.plan.messages import rule_error

DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_DAY: Final = "|".join(DAYS)
_FORM: Final = re.compile(
    rf"(?:(?P<days>(?:{_DAY})(?:-(?:{_DAY}))?(?:,(?:{_DAY})(?:-(?:{_DAY}))?)*) )?"
    r"(?P<start>\d\d:\d\d)-(?P<end>\d\d:\d\d)"
)
_DAY_MINUTES: Final = 24 * 60


@dataclass(frozen=True)
class QuietHours:
    """One entry; past midnight it belongs to the day on which it began.

    Attributes
    ----------
    days : frozenset of int
        0 for Monday.
    start, end : int
        Minutes after midnight; an end that is not after the start lies on the next day.
    """

    days: frozenset[int]
    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> QuietHours:
        """Read ``"Mon-Fri 07:00-18:00"``, ``"Sat,Sun 00:00-24:00"`` or ``"22:00-06:00"``.

        Raises
        ------
        PydanticCustomError
            It is written otherwise.
        """
        match = _FORM.fullmatch(text)
        start, end = (_minutes(match[name]) for name in ("start", "end")) if match else (None, None)
        if match is None or start is None or end is None or start in (end, _DAY_MINUTES):
            raise rule_error(
                [("", 'quiet hours must look like "Mon-Fri 07:00-18:00"; write them so')]
            )
        return cls(_days(match["days"]), start, end if end > start else end + _DAY_MINUTES)

    def until(self, now: datetime) -> datetime | None:
        """When they end, if `now` (local, without a zone) lies within them."""
        for back in (0, 1):
            midnight = datetime.combine(now.date() - timedelta(days=back), time())
            begin, end = (midnight + timedelta(minutes=m) for m in (self.start, self.end))
            if midnight.weekday() in self.days and begin <= now < end:
                return end
        return None


def quiet_until(entries: Iterable[str], now: datetime) -> datetime | None:
    """When training may go on, None when it may now.

    Parameters
    ----------
    entries : iterable of str
        As :meth:`QuietHours.parse` reads them.
    now : datetime
        Local time without a zone.
    """
    hours, moment = [QuietHours.parse(one) for one in entries], now
    # Entries may follow each other without a gap; a week of them has no end.
    while moment - now <= timedelta(days=8):
        ends = [end for one in hours if (end := one.until(moment)) is not None]
        if not ends:
            return moment if moment > now else None
        moment = max(ends)
    return moment


def _minutes(text: str) -> int | None:
    hours, minutes = (int(part) for part in text.split(":"))
    total = hours * 60 + minutes
    return total if minutes < 60 and total <= _DAY_MINUTES else None


def _days(text: str | None) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        begin = DAYS.index(first)
        length = (DAYS.index(last) - begin) % 7 if last else 0
        found |= {(begin + step) % 7 for step in range(length + 1)}
    return frozenset(found)
