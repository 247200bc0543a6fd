"""What was not taken: told to the hospital it belongs to, and named on this machine alone."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedward_client.data.sample import LeftOut, PreparedSite

FILE = "left-out.csv"


@dataclass(frozen=True)
class Missed:
    """A file or row that was not taken.

    Attributes
    ----------
    site : str
        Whose it was; "" for what was not given to any site.
    reason : str
        One of the fixed reasons.
    name : str
        The file, or the row of a table; for the owner of this machine.
    """

    site: str
    reason: str
    name: str


def by_site(left_out: Iterable[LeftOut], sites: Iterable[str]) -> list[Missed]:
    """What the reader left out; with its site where its sub-folder is one."""
    known, found = set(sites), []
    for one in left_out:
        site = one.name.partition("/")[0]
        found.append(Missed(site if site in known else "", one.reason, one.name))
    return found


def counted(missed: Iterable[Missed]) -> dict[str, int]:
    """Reason and count, the reasons in order."""
    return dict(sorted(Counter(one.reason for one in missed).items()))


def summary(missed: Sequence[Missed]) -> str:
    """One line for the terminal."""
    parts = ", ".join(f"{reason}: {count:,}" for reason, count in counted(missed).items())
    return f"left out: {len(missed):,} ({parts}); {FILE} names them"


def with_missed(site: PreparedSite, missed: Iterable[Missed]) -> PreparedSite:
    """The site with what was left out of its folder beside what could not be prepared."""
    own = counted(one for one in missed if one.site == site.name)
    return replace(site, left_out=dict(Counter(site.left_out) + Counter(own)))


def write_left_out(missed: Sequence[Missed], path: Path) -> None:
    """Write the table; without any, an earlier one is removed."""
    if not missed:
        path.unlink(missing_ok=True)
        return
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["site", "reason", "name"])
        table.writerows([one.site, one.reason, one.name] for one in missed)
