"""Who takes part in a study: described, refused, quarantined, back again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedward.errors import StudyError
from fedward.flower.study_grid import StudyGrid
from fedward.plan.versions import used
from fedward.protocol import SiteFacts
from fedward_server.events import SiteJoined, SiteQuarantined, SiteRefused, SiteWarned, StudyStarted
from fedward_server.job import Job, SizeLimit
from fedward_server.reply_validation import InvalidReply, read_facts

_LOG = logging.getLogger("fedward.server")
_QUARANTINE_AFTER: Final = 3
_PAUSE: Final = 0.05
_LAST_WORDS: Final = 1.0
# Seconds after which an operator hears of sites that are not connected at the start.
_SOON: Final = 3.0
NOT_HERE: Final = InvalidReply("not connected", "silent")
NO_ANSWER: Final = InvalidReply("no answer in time", "silent")
_ASKED: Final = InvalidReply("has not described itself yet", "silent")
PASSING: Final = frozenset({"pending", "paused", "busy", "error", "silent", "schema"})
"""Kinds of refusals that a person, a restart, an upgrade or time may end."""


class Participants:
    """The sites of one study.

    Parameters
    ----------
    job : Job
        The study; the facts of its sites are kept there.
    grid : Grid
        Flower's grid with everybody on it.
    order : callable
        Makes the record that asks a site to describe itself; with ``evaluate_only=True`` one that
        takes no part in training.

    Attributes
    ----------
    nodes, evaluators : dict
        Node ids and names of the sites that described themselves: those that train, and those
        that only evaluate.
    """

    def __init__(self, job: Job, grid: Grid, order: Callable[..., ConfigRecord]) -> None:
        self._job, self._everyone, self._order = job, grid, order
        self._needs = job.plan.participation
        self._refused: dict[str, tuple[float, str, str]] = {}
        self._out: set[str] = set()
        self._asked: dict[str, int] = {}
        known = {n: s for n, s in self._named.items() if s in job.facts}
        self.nodes = {n: s for n, s in known.items() if s not in job.evaluate_only}
        self.evaluators = {n: s for n, s in known.items() if s in job.evaluate_only}

    @property
    def _anyone(self) -> bool:
        """A simulation: its nodes come all at once, and say themselves who they are."""
        return self._job.members is None

    @property
    def _named(self) -> Mapping[int, str]:
        """The study's sites that may take part now."""
        return self._job.members or {}

    @property
    def grid(self) -> StudyGrid:
        """A grid with the study's sites alone."""
        return StudyGrid(self._everyone, self.everybody, self._job.stop)

    @property
    def everybody(self) -> dict[int, str]:
        """All that described themselves, whatever they do."""
        return {**self.nodes, **self.evaluators}

    @property
    def named_to_train(self) -> list[str]:
        """Names of the sites that may take part in training now, present or not."""
        names = (self.nodes if self._anyone else self._named).values()
        return [name for name in names if name not in self._job.evaluate_only]

    def enrol(self) -> None:
        """Wait for the sites of the study and have them describe themselves.

        Between hospitals a study begins when all have, or have refused for good, or at the
        deadline; with :attr:`least` sites in any case. A patient job hears soon that there are too
        few; it waits for them elsewhere.

        Raises
        ------
        StudyError
            Too few do.
        """
        began = time.monotonic()
        while not self._job.stop.is_set():
            seconds = time.monotonic() - began
            over = seconds - self._job.patience
            self.refresh(last=over > 0)
            ended = over > (_LAST_WORDS if self._asked else 0)
            if self._enough():
                if ended or self._all_are_in():
                    break
            elif ended or (not self._asked and self._no_more_come(seconds)):
                raise self.too_few()
            self._job.stop.wait(_PAUSE)
        if self._job.stop.is_set():
            return
        sites = tuple(sorted(self.nodes.values()))
        self._job.listen(StudyStarted(self._job.arm.name, self._job.plan.rounds, sites))

    def _no_more_come(self, seconds: float) -> bool:
        if self._anyone:
            return bool(self._refused)
        return self._all_are_in() or (self._job.patient and seconds > _SOON)

    def ask_again(self) -> None:
        """Ask also those now that refused a moment ago."""
        self._refused = {s: (0.0, why, kind) for s, (_, why, kind) in self._refused.items()}

    def refresh(self, *, last: bool = False) -> None:
        """Take what sites said of themselves, and ask those that are new; waits for nobody.

        A site that joins late prepares its images first: the others' round is not held up by it.
        """
        self._forget_who_left()
        grid = StudyGrid(self._everyone, self._reachable(), self._job.stop)
        for reply in grid.pull_messages(list(self._asked)) if self._asked else ():
            node = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                self._take(node, read_facts(reply))
        if new := self._undescribed(last=last):
            self._ask(grid, new)

    def _ask(self, grid: StudyGrid, nodes: list[int]) -> None:
        only = self._job.evaluate_only & set(self._named.values())
        trains = RecordDict({"config": self._order()})
        tests = RecordDict({"config": self._order(evaluate_only=True)}) if only else trains
        asked = [
            Message(tests if self._named.get(node) in only else trains, node, MessageType.QUERY)
            for node in nodes
        ]
        for message in asked:
            message.metadata.ttl = max(1.0, self._job.patience)
        told = zip(grid.push_messages(asked), nodes, strict=True)
        self._asked |= {identifier: node for identifier, node in told if identifier}

    def _forget_who_left(self) -> None:
        """Between hospitals members come and go: removed, quarantined, with another key."""
        if not self._anyone:
            members = self._named
            # An operator may lower what a site was enrolled with while the study runs.
            self.nodes, self.evaluators = (
                {
                    node: site
                    for node, site in there.items()
                    if node in members and not self._overclaims(self._job.facts[site])
                }
                for there in (self.nodes, self.evaluators)
            )
            self._asked = {key: node for key, node in self._asked.items() if node in members}
            # Whom the registry keeps out needs no note here; it may release them.
            self._out &= set(members.values())

    def _reachable(self) -> set[int]:
        return set(self._everyone.get_node_ids() if self._anyone else self._named)

    def note(self, site: str, bad: InvalidReply | None, what: str = "update") -> None:
        """Count what an answer of a site was worth; one bad over and over is put out.

        Only a valid answer of the same kind wipes the slate: silence and refusals do not, nor does
        a runner's restart.
        """
        mark, bad_ones = f"{what} of {site}", self._job.bad_answers
        if bad is None:
            bad_ones.pop(mark, None)
        elif bad.kind == "invalid":
            bad_ones[mark] = bad_ones.get(mark, 0) + 1
            if bad_ones[mark] >= _QUARANTINE_AFTER and not self._anyone:
                del bad_ones[mark]
                self._quarantine(site, bad.reason)

    def _quarantine(self, site: str, reason: str) -> None:
        self._out.add(site)
        self.nodes, self.evaluators = (
            {n: s for n, s in there.items() if s != site} for there in (self.nodes, self.evaluators)
        )
        self._job.listen(SiteQuarantined(self._job.arm.name, self._job.round, site, reason))

    def absent(self, *, training: bool = True) -> dict[str, InvalidReply]:
        """Sites of the study that take no part now, and why: refused, put out, or not there.

        Those that only evaluate are among them where it is not about training.
        """
        here = set(self.everybody.values()) | (self._job.evaluate_only if training else set())
        refused = {
            site: InvalidReply(reason, kind) for site, (_, reason, kind) in self._refused.items()
        }
        named = dict.fromkeys(self._named.values(), NOT_HERE)
        asked = {s: _ASKED for n, s in self._named.items() if n in self._asked.values()}
        known = {**named, **asked, **(named and refused), **self._job.left_out}
        return {site: bad for site, bad in known.items() if site not in here}

    def cut_off(self) -> set[int]:
        """Nodes of sites that were removed meanwhile, or have another key."""
        return set() if self._anyone else set(self.everybody) - set(self._named)

    def connected(self) -> int:
        """How many of the study's sites that train are there now."""
        return len(self._connected())

    def _connected(self) -> set[int]:
        return self.nodes.keys() & set(self._everyone.get_node_ids())

    def _refused_for_good(self) -> int:
        """Sites that no waiting brings in; whom a person or a restart may, are waited for."""
        return sum(
            kind not in PASSING and site not in self._job.evaluate_only
            for site, (_, _, kind) in self._refused.items()
        )

    def _all_are_in(self) -> bool:
        if self._anyone:
            return len(self.nodes) >= self._needs.sites and not self._asked
        return len(self.nodes) + self._refused_for_good() >= len(self.named_to_train)

    @property
    def _starts(self) -> bool:
        return not self._job.arm.rounds

    @property
    def least(self) -> int:
        """Sites without which the study does not start; after its first round, its quorum."""
        if self._anyone:
            return self._needs.sites
        needed = self._job.needed
        return max(self._needs.sites, needed) if self._starts else needed

    def _enough(self) -> bool:
        if len(self.nodes) < self.least:
            return False
        # Who described itself and left does not start a study.
        return self._anyone or not self._starts or self.connected() >= self.least

    def _undescribed(self, *, last: bool) -> list[int]:
        online = sorted(self._everyone.get_node_ids())
        if self._anyone:
            ready = last or len(online) >= self._needs.sites
            fresh = not (self.nodes or self._refused or self._asked)
            return online if ready and fresh else []
        now, named = time.monotonic(), self._named
        return [
            node
            for node in online
            if node not in self.everybody
            and (site := named.get(node)) is not None
            and site not in self._out
            and node not in self._asked.values()
            and self._refused.get(site, (0.0, "", ""))[0] <= now
        ]

    def _take(self, node: int, facts: SiteFacts | InvalidReply) -> None:
        known = self._named.get(node, "")
        if too_old := self._too_old(facts):
            kind, reason = "schema", too_old
        elif isinstance(facts, InvalidReply):
            kind, reason = facts.kind, facts.reason
        else:
            kind, reason = "invalid", self._objection(facts, known)
        if isinstance(facts, InvalidReply) or reason:
            self._refuse(known or f"a site ({len(self._refused) + 1})", kind, reason)
            return
        self._refused.pop(facts.site, None)
        there = self.evaluators if facts.site in self._job.evaluate_only else self.nodes
        there[node] = facts.site
        self._job.facts[facts.site] = facts
        if not self._anyone:
            self._job.listen(SiteJoined(self._job.arm.name, self._job.round, facts.site))
            self._warn_unchecked(facts)

    def _warn_unchecked(self, facts: SiteFacts) -> None:
        limit = self._job.limits.get(facts.site, SizeLimit())
        claims = [
            f"{getattr(facts, what):,} {what}"
            for what in ("patients", "images")
            if getattr(limit, what) is None
        ]
        if claims:
            reason = (
                f"no enrolled size for {facts.site}: its claim of {' and '.join(claims)} is not "
                f"checked. See `fedward-server site limit`."
            )
            self._job.listen(SiteWarned(self._job.arm.name, self._job.round, facts.site, reason))

    def _overclaims(self, facts: SiteFacts) -> str:
        limit = self._job.limits.get(facts.site, SizeLimit())
        for what in ("patients", "images"):
            claimed, most = getattr(facts, what), getattr(limit, what)
            if most is not None and claimed > most:
                return (
                    f"a site must not claim more {what} than it was enrolled with (got {claimed:,} "
                    f"of {most:,}). Ask the hospital; if it has grown, raise --max-{what} with "
                    f"`fedward-server site limit`."
                )
        return ""

    def _too_old(self, said: SiteFacts | InvalidReply) -> str:
        """Why a site's release cannot serve the plan; "" where it can, or says nothing of it."""
        known, newer = said.plan_schema, used(self._job.plan)
        needed = max(newer.values(), default=1)
        if known is None or known >= needed:
            return ""
        keys = ", ".join(sorted(key for key, version in newer.items() if version > known))
        release = f" (release {said.release})" if said.release else ""
        return (
            f"it supports plan schema {known}{release}, this plan needs {needed} because of "
            f"{keys}. Upgrade the site, or leave out {keys}."
        )

    def _refuse(self, site: str, kind: str, reason: str) -> None:
        again = self._job.ask_again_seconds
        told = self._refused.get(site, (0.0, "", ""))[1] == reason
        self._refused[site] = (time.monotonic() + again, reason, kind)
        if self._anyone:
            _LOG.warning("a site cannot take part: %s", reason)
        elif not told:
            name = self._job.arm.name
            self._job.listen(SiteRefused(name, self._job.round, site, kind, reason))

    def _objection(self, facts: SiteFacts, known: str) -> str:
        if known and facts.site != known:
            return "a site must have the name that it was enrolled with"
        if facts.site in self.everybody.values():
            return "two sites of one study cannot have the same name"
        if overclaims := self._overclaims(facts):
            return overclaims
        least = self._needs.minimum_patients
        return f"a site needs {least} patients" if facts.patients < least else ""

    def too_few(self) -> StudyError:
        """The error that names who is missing, and why."""
        if self._anyone:
            refused = sorted({reason for _, reason, _ in self._refused.values()})
            return StudyError(
                "a study needs the planned number of sites",
                value=f"{len(self.nodes)} of {self.least}"
                + (f"; refused: {'; '.join(refused)}" if refused else ""),
                fix="Bring more sites, or lower participation.sites",
                where="participation.sites",
            )
        here = self._connected()
        gone = {site: NOT_HERE for node, site in self.nodes.items() if node not in here}
        return StudyError(
            "a study starts with the sites that its plan needs"
            if self._starts
            else "a study goes on with its quorum of sites",
            value=f"{len(here)} of {self.least}; {named(self.absent() | gone)}",
            fix="It goes on by itself when they take part, and `study resume` asks them at once; "
            "or submit the plan again with other sites or a lower participation.sites",
            where="participation.sites" if self._starts else "participation.quorum",
        )


def named(missing: Mapping[str, InvalidReply]) -> str:
    """Sites and why each is missing, for people."""
    return "; ".join(
        f"{site} ({bad.kind}): {bad.reason.rstrip('.')}" for site, bad in sorted(missing.items())
    )
