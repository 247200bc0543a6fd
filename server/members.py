"""Who takes part in a study: described, refused, quarantined, back again."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedward.errors import StudyError
from fedward.protocol import SiteFacts
from server.events import SiteJoined, SiteQuarantined, SiteRefused, StudyStarted
from server.exchange import StudyGrid
from server.job import Job
from server.replies import Bad, read_facts

_LOG = logging.getLogger("fedward.server")
_QUARANTINE_AFTER: Final = 3
_PAUSE: Final = 0.05
_PASSING: Final = frozenset({"pending", "paused", "busy", "error", "silent"})


class Members:
    """The sites of one study.

    Parameters
    ----------
    job : Job
        The study; the facts of its sites are kept there.
    grid : Grid
        Flower's grid with everybody on it.
    order : callable
        Makes the record that asks a site to describe itself.
    """

    def __init__(self, job: Job, grid: Grid, order: Callable[[], ConfigRecord]) -> None:
        self._job, self._everyone, self._order = job, grid, order
        self._needs = job.plan.participation
        self._bad: Counter[str] = Counter()
        self._refused: dict[str, tuple[float, str, str]] = {}
        self._out: set[str] = set()
        self.nodes = {n: s for n, s in job.members.items() if s in job.facts}

    @property
    def grid(self) -> StudyGrid:
        """A grid with the study's sites alone."""
        return StudyGrid(self._everyone, self.nodes, self._job.stop)

    def enrol(self) -> None:
        """Wait for the sites of the study and have them describe themselves.

        Between hospitals a study begins when all have, or have refused for good, or at the
        deadline; with its quorum in any case.

        Raises
        ------
        StudyError
            Too few do.
        """
        end = time.monotonic() + self._job.patience
        wanted = len(self._job.members) or self._needs.sites
        while not self._job.stop.is_set():
            late = time.monotonic() > end
            self.refresh(end - time.monotonic(), last=late)
            answered = len(self.nodes) + self._refused_for_good()
            if (answered >= wanted and self._enough()) or (late and self._enough()):
                break
            if late or (not self._job.members and self._refused):
                raise self._too_few()
            self._job.stop.wait(_PAUSE)
        sites = tuple(sorted(self.nodes.values()))
        self._job.listen(StudyStarted(self._job.arm.name, self._job.plan.rounds, sites))

    def refresh(self, seconds: float, *, last: bool = False) -> None:
        """Describe sites that are connected and were not described yet."""
        new = self._undescribed(last=last)
        if not new:
            return
        record = RecordDict({"config": self._order()})
        asked = [Message(record, node, MessageType.QUERY) for node in new]
        limit = max(1.0, min(seconds, self._job.patience))
        for message in asked:
            message.metadata.ttl = limit
        grid = StudyGrid(self._everyone, new, self._job.stop)
        for node, reply in grid.replies(asked, limit, self.cut_off):
            self._take(node, read_facts(reply))

    def note(self, site: str, bad: Bad | None) -> None:
        """Count what a site's update was worth; one bad over and over is put out."""
        if bad is None or bad.kind != "invalid":
            self._bad[site] = 0
            return
        self._bad[site] += 1
        if self._bad[site] >= _QUARANTINE_AFTER and self._job.members:
            self._out.add(site)
            self.nodes = {n: s for n, s in self.nodes.items() if s != site}
            name = self._job.arm.name
            self._job.listen(SiteQuarantined(name, self._job.round, site, bad.reason))

    def cut_off(self) -> set[int]:
        """Nodes of sites that were removed meanwhile."""
        return {node for node, site in self.nodes.items() if site in self._job.removed}

    def connected(self) -> int:
        """How many of the study's sites are there now."""
        return len(self.grid.get_node_ids())

    def _refused_for_good(self) -> int:
        """Sites that no waiting brings in; whom a person or a restart may, are waited for."""
        return sum(kind not in _PASSING for _, _, kind in self._refused.values())

    def _enough(self) -> bool:
        least = self._job.needed if self._job.members else self._needs.sites
        return len(self.nodes) >= least

    def _undescribed(self, *, last: bool) -> list[int]:
        online = sorted(self._everyone.get_node_ids())
        if not self._job.members:
            # A simulation: all nodes come at once, and say themselves who they are.
            ready = last or len(online) >= self._needs.sites
            return online if ready and not self.nodes and not self._refused else []
        now = time.monotonic()
        return [
            node for node in online
            if node not in self.nodes
            and (site := self._job.members.get(node)) is not None
            and site not in self._out
            and site not in self._job.removed
            and self._refused.get(site, (0.0, "", ""))[0] <= now
        ]  # fmt: skip

    def _take(self, node: int, facts: SiteFacts | Bad) -> None:
        known = self._job.members.get(node, "")
        reason = facts.reason if isinstance(facts, Bad) else self._objection(facts, known)
        if isinstance(facts, Bad) or reason:
            kind = facts.kind if isinstance(facts, Bad) else "invalid"
            self._refuse(known or f"a site ({len(self._refused) + 1})", kind, reason)
            return
        self._refused.pop(facts.site, None)
        self.nodes[node] = facts.site
        self._job.facts[facts.site] = facts
        if self._job.members:
            self._job.listen(SiteJoined(self._job.arm.name, self._job.round, facts.site))

    def _refuse(self, site: str, kind: str, reason: str) -> None:
        again = self._job.ask_again_seconds
        told = self._refused.get(site, (0.0, "", ""))[1] == reason
        self._refused[site] = (time.monotonic() + again, reason, kind)
        if not self._job.members:
            _LOG.warning("a site cannot take part: %s", reason)
        elif not told:
            name = self._job.arm.name
            self._job.listen(SiteRefused(name, self._job.round, site, kind, reason))

    def _objection(self, facts: SiteFacts, known: str) -> str:
        if known and facts.site != known:
            return "a site must have the name that it was enrolled with"
        if facts.site in self.nodes.values():
            return "two sites of one study cannot have the same name"
        least = self._needs.minimum_patients
        return f"a site needs {least} patients" if facts.patients < least else ""

    def _too_few(self) -> StudyError:
        refused = sorted({reason for _, reason, _ in self._refused.values()})
        least = self._job.needed if self._job.members else self._needs.sites
        return StudyError(
            "a study needs the planned number of sites",
            value=f"{len(self.nodes)} of {least}"
            + (f"; refused: {'; '.join(refused)}" if refused else ""),
            fix="Wait for more sites, or lower participation.sites",
            where="participation.sites",
        )
