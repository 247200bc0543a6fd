"""Charge the patients' privacy budget before a round is trained, permanently, once per round.

A round is charged in full before it is trained, and its update leaves only after the charge was
committed with the update's digest. So whatever is released stands in the ledger; what was charged
and not released counts as spent all the same.

A patient is in every cohort that holds his pseudonym, however often a dataset is frozen and under
whichever name, and what all of them were charged for composes. An update tells about a patient only
if its cohort holds him: two cohorts without a common patient do not compose, though a third one may
overlap with both. A cohort has spent what the patient in it who was charged most has.

Everything about a cohort is counted at one δ, the policy's or the one that its size asks for. One
study on a patient, whose settings were fixed before it began, is composed by the tight accountant.
As soon as a second study joins, its settings may have been chosen by the results of the first:
then the sum of both is held by a Rényi filter. A study that leaves the filter no room under the cap
has its patients for itself: whichever way its results go, no other study follows.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedward.dp.accounting import Mechanism, default_delta, epsilon_composed, epsilon_filtered
from fedward.errors import BudgetError
from fedward.rule_codes import RuleCode
from fedward_client.ledger.evaluations import Evaluations
from fedward_client.ledger.store import Store, digest_of_patients


@dataclass(frozen=True)
class RoundRequest:
    """A round that is to be trained.

    Attributes
    ----------
    study, plan_hash : str
        Whose.
    round : int
        From 1.
    cohort : str
        SHA-256 of the frozen cohort.
    mechanism : Mechanism or None
        Noise, rate and the steps of this round; None: without privacy.
    delta : float or None
        The plan's δ.
    planned : int
        Private steps of all rounds of the plan; at least what is charged is assumed.
    """

    study: str
    plan_hash: str
    round: int
    cohort: str
    mechanism: Mechanism | None
    delta: float | None
    planned: int = 0


@dataclass(frozen=True)
class Caps:
    """What may be spent.

    Attributes
    ----------
    study, cohort : float
        ε of one study, and of all studies on a patient together.
    delta : float or None
        At which δ both are held; None: see :meth:`Ledger.delta_of`.
    """

    study: float
    cohort: float
    delta: float | None


@dataclass(frozen=True)
class BudgetStatus:
    """What a cohort's patients have spent, and what is left.

    Attributes
    ----------
    delta : float
        δ of both ε.
    spent : float
        ε of the patient who was charged most, rounds without privacy left out.
    left : float
        ε that the cap leaves for a further study.
    unbounded_studies, unbounded_rounds : int
        Trained without privacy, on the patient with most of such rounds: no ε bounds them.
    """

    delta: float
    spent: float
    left: float
    unbounded_studies: int
    unbounded_rounds: int


@dataclass(frozen=True)
class Charge:
    """A round that is paid and may be trained now, once."""

    id: int


@dataclass(frozen=True)
class Release:
    """A round whose update was released: the same one is to be given again."""

    digest: str


class RoundBusy(BudgetError):
    """The round is being trained right now."""


class Ledger:
    """The ledger of a site; one process has it open for writing.

    Parameters
    ----------
    folder : Path or None
        Where it lies; the site's state folder. None: in memory, for a simulation.
    read_only : bool
        To look at it while a trainer has it open.
    secret_id : str
        Stands for the secret under which patients are pseudonymised: with another one the same
        patients would look new, and unspent.
    clock : callable
        Gives the time; only noted, never relied on.

    Raises
    ------
    BudgetError
        It is damaged, older than what was charged, in use, or begun with another secret.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        read_only: bool = False,
        secret_id: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = Store(folder, read_only=read_only, secret_id=secret_id)
        self._clock, self._turn = clock, threading.RLock()
        self.evaluations = Evaluations(self._store, self._turn, self._groups)
        self._live: set[int] = set()  # charges that somebody here holds
        if not read_only:
            # Whoever reserved these is gone, and nobody knows how far it came.
            with self._store.writing() as sql:
                sql.execute("UPDATE charges SET state = 'lost' WHERE state = 'reserved'")

    def register(self, cohort: str, dataset: str, patients: Collection[str]) -> None:
        """Tell which patients a frozen cohort holds, by pseudonym; known cohorts stay as they are.

        Raises
        ------
        BudgetError
            It has no patients, was registered with others, or cannot be written.
        """
        if not patients:
            raise BudgetError(RuleCode.COHORT_PATIENTS, fix="Freeze it again")
        people = sorted(set(patients))
        digest = digest_of_patients(people)
        with self._turn:
            known = self._rows("SELECT patients FROM cohorts WHERE sha256 = ?", cohort)
            if known and known[0][0] != digest:
                raise BudgetError(
                    RuleCode.COHORT_KEEPS_PATIENTS,
                    value=len(people),
                    fix="Freeze the dataset again",
                )
            if known:
                return
            with self._store.writing() as sql:
                sql.execute(
                    "INSERT INTO cohorts VALUES (?, ?, ?, ?)",
                    (cohort, dataset, len(people), digest),
                )
                sql.executemany(
                    "INSERT INTO members VALUES (?, ?)", ((one, cohort) for one in people)
                )

    def reserve(self, request: RoundRequest, caps: Caps) -> Charge | Release:
        """Charge a round before anything of it is done.

        Returns
        -------
        Charge or Release
            Leave to train it; or, of a private round that was released already, what was.

        Raises
        ------
        BudgetError
            It would exceed a cap; its charge was lost; it is earlier than one that was charged;
            the study was charged for another plan or cohort before.
        RoundBusy
            It is being trained now.
        """
        with self._turn:
            self._same_study(request)
            known = self._rows(
                "SELECT id, state, digest FROM charges WHERE study = ? AND round = ?",
                request.study,
                request.round,
            )
            if request.mechanism is None:
                return self._note_public(request, known)
            if known:
                return self._again(*known[0])
            self._in_order(request)
            self._within(request, request.mechanism, caps)
            return self._insert(request)

    def commit(self, charge: Charge, digest: str) -> None:
        """A round's update is safe on the disk and may leave.

        Raises
        ------
        BudgetError
            The charge is not open, or it cannot be written; then the update must not leave.
        """
        with self._turn, self._store.writing() as sql:
            done = sql.execute(
                "UPDATE charges SET state = 'committed', digest = ? WHERE id = ? AND "
                "state = 'reserved'",
                (digest, charge.id),
            ).rowcount
            if done != 1:
                raise BudgetError(RuleCode.CHARGE_COMMITTED, fix="Order the next round")
            self._live.discard(charge.id)

    def lose(self, charge: Charge) -> None:
        """A round failed after it was charged; it stays charged."""
        with self._turn:
            # Even where that cannot be written: nobody holds it any more.
            self._live.discard(charge.id)
            with self._store.writing() as sql:
                sql.execute(
                    "UPDATE charges SET state = 'lost' WHERE id = ? AND state = 'reserved'",
                    (charge.id,),
                )

    def check_study(self, request: RoundRequest, total: Mechanism, caps: Caps) -> None:
        """Whether a whole study would fit into what is left, before its first round.

        Raises
        ------
        BudgetError
            It would not.
        """
        with self._turn:
            self._same_study(request)
            if not self._studies(study=request.study):
                self._within(request, total, caps)

    def delta_of(self, cohort: str, delta: float | None) -> float:
        """δ at which everything about a cohort's patients is counted.

        Parameters
        ----------
        delta : float or None
            The policy's; None: what the largest cohort that shares a patient asks for.
        """
        if delta is not None:
            return delta
        with self._turn:
            ((largest,),) = self._rows(
                "SELECT max(number) FROM cohorts WHERE sha256 IN (SELECT cohort FROM members "
                "WHERE patient IN (SELECT patient FROM members WHERE cohort = ?))",
                cohort,
            )
        return default_delta(largest or 0)

    def epsilon_of_study(self, study: str, delta: float) -> float:
        """ε at δ that a study was charged, released or lost."""
        with self._turn:
            return _cost(self._studies(study=study), delta, math.inf)

    def standing(self, cohort: str, caps: Caps) -> BudgetStatus:
        """What was spent on a cohort over all studies and cohorts, and what its cap leaves."""
        delta, cap = self.delta_of(cohort, caps.delta), caps.cohort
        spent = used = 0.0
        open_rounds = (0, 0)
        with self._turn:
            for group in self._groups(cohort):
                found = self._studies(cohorts=group)
                spent = max(spent, _cost(found, delta, cap))
                used = max(used, _cost_if_joined(found, delta, cap))
                open_rounds = max(open_rounds, self._without_privacy(group))
        return BudgetStatus(delta, spent, max(0.0, cap - used), open_rounds[1], open_rounds[0])

    def studies(self, delta: float | None = None) -> list[dict[str, Any]]:
        """Each study's dataset, its charges by state, and the ε that it was charged.

        Parameters
        ----------
        delta : float or None
            The policy's δ. ``epsilon`` is at the study's own ``delta``, ``site_epsilon`` at the
            ``site_delta`` of its cohort; None where the study has no privacy.
        """
        with self._turn:
            rows = self._rows(
                "SELECT s.study, c.dataset, s.cohort, max(h.delta), count(h.id), "
                "sum(h.state = 'committed'), sum(h.state = 'lost'), max(h.round), "
                "sum(h.id IS NOT NULL AND h.noise IS NULL) FROM studies s "
                "JOIN cohorts c ON c.sha256 = s.cohort LEFT JOIN charges h ON h.study = s.study "
                "GROUP BY s.study ORDER BY min(h.id)"
            )
            made = []
            for study, dataset, cohort, own, charged, released, lost, last, unbounded in rows:
                here, own = self.delta_of(cohort, delta), own if charged > unbounded else None
                made.append(
                    {
                        "study": study,
                        "dataset": dataset,
                        "cohort": cohort[:12],
                        "delta": own,
                        "epsilon": self.epsilon_of_study(study, own) if own else None,
                        "site_delta": here,
                        "site_epsilon": self.epsilon_of_study(study, here) if own else None,
                        "unbounded_rounds": unbounded or 0,
                        "charged": charged,
                        "released": released or 0,
                        "lost": lost or 0,
                        "last_round": last or 0,
                    }
                )
            return made

    def charged(self, study: str, round_: int) -> bool:
        """Whether a round was ever charged, whatever became of it."""
        with self._turn:
            return bool(
                self._rows("SELECT 1 FROM charges WHERE study = ? AND round = ?", study, round_)
            )

    def cohorts(self) -> list[tuple[str, str, int]]:
        """Hash, dataset and number of patients of every cohort that was ever used."""
        with self._turn:
            return [
                (str(sha), str(name), int(n))
                for sha, name, n in self._rows("SELECT sha256, dataset, number FROM cohorts")
            ]

    def accepted(self) -> int:
        """How often somebody went on with an older copy of it; see `accept_older`."""
        with self._turn:
            return int(self._store.meta("accepted"))

    def close(self) -> None:
        """Let go of the files."""
        self._store.close()

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        return self._store.connection.execute(sql, values).fetchall()

    def _same_study(self, request: RoundRequest) -> None:
        known = self._rows("SELECT plan_hash, cohort FROM studies WHERE study = ?", request.study)
        if known and known[0] != (request.plan_hash, request.cohort):
            raise BudgetError(
                RuleCode.STUDY_COHORT if known[0][0] == request.plan_hash else RuleCode.STUDY_PLAN,
                fix="Submit it as a new study; its budget is its own",
            )

    def _again(self, number: int, state: str, digest: str) -> Release:
        if state == "committed":
            return Release(str(digest))
        # Reserved and held by nobody: whoever asked for it was told that it could not be written.
        if state == "lost" or number not in self._live:
            raise BudgetError(RuleCode.CHARGE_SPENT, fix="Order the next round")
        raise RoundBusy(RuleCode.ROUND_BUSY, fix="Wait for its update")

    def _in_order(self, request: RoundRequest) -> None:
        last = self._rows("SELECT max(round) FROM charges WHERE study = ?", request.study)[0][0]
        if last is not None and request.round < last:
            raise BudgetError(
                RuleCode.ROUND_IN_TURN,
                values={"round": request.round, "last": last},
                fix="Order the next round",
            )

    def _within(self, request: RoundRequest, more: Mechanism, caps: Caps) -> None:
        if math.inf == caps.study == caps.cohort:
            return  # a simulation without a cap: what each round costs is accounted elsewhere
        delta = self.delta_of(request.cohort, caps.delta)
        own = _cost(_joined(self._studies(study=request.study), request, more), delta, caps.study)
        if not own <= caps.study:
            raise _exceeded("study", own, caps.study, delta)
        for group in self._groups(request.cohort) or [(request.cohort,)]:
            found = _joined(self._studies(cohorts=group), request, more)
            alone = len(found) == 1
            everything = (_cost if alone else _cost_if_joined)(found, delta, caps.cohort)
            if not everything <= caps.cohort:
                raise _exceeded("cohort", everything, caps.cohort, delta)

    def _insert(self, request: RoundRequest) -> Charge:
        one = request.mechanism
        with self._store.writing() as sql:
            sql.execute(
                "INSERT INTO studies (study, plan_hash, cohort, planned) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO NOTHING",
                (request.study, request.plan_hash, request.cohort, request.planned),
            )
            made = sql.execute(
                "INSERT INTO charges (study, round, noise, rate, steps, delta, state, made) "
                "VALUES (?, ?, ?, ?, ?, ?, 'reserved', ?)",
                (
                    request.study,
                    request.round,
                    one and one.noise_multiplier,
                    one and one.sampling_rate,
                    one.steps if one else 0,
                    request.delta,
                    self._clock(),
                ),
            )
            number = int(made.lastrowid or 0)
        self._live.add(number)
        return Charge(number)

    def _note_public(self, request: RoundRequest, known: list[Any]) -> Charge:
        """Rounds without privacy cost nothing that could be counted, but are written down."""
        if not known:
            return self._insert(request)
        if self._rows("SELECT 1 FROM charges WHERE id = ? AND noise IS NOT NULL", known[0][0]):
            raise BudgetError(
                RuleCode.ROUND_STAYS_PRIVATE,
                values={"round": request.round},
                fix="Order the next round",
            )
        with self._store.writing() as sql:
            sql.execute("UPDATE charges SET state = 'reserved' WHERE id = ?", (known[0][0],))
        self._live.add(known[0][0])
        return Charge(int(known[0][0]))

    def _groups(self, cohort: str) -> list[tuple[str, ...]]:
        """The sets of cohorts that patients of this one are in, without those within another."""
        rows = self._rows(
            "SELECT DISTINCT held FROM (SELECT group_concat(cohort, ' ') AS held FROM "
            "(SELECT patient, cohort FROM members WHERE patient IN "
            "(SELECT patient FROM members WHERE cohort = ?) ORDER BY patient, cohort) "
            "GROUP BY patient)",
            cohort,
        )
        sets = sorted((frozenset(str(held).split(" ")) for (held,) in rows), key=len, reverse=True)
        largest: list[frozenset[str]] = []
        for one in sets:
            if not any(one <= other for other in largest):
                largest.append(one)
        return [tuple(sorted(one)) for one in largest]

    def _studies(
        self, *, study: str | None = None, cohorts: Collection[str] | None = None
    ) -> list[_Charged]:
        """What each study was charged with privacy, in the order of their first charges."""
        marks = ", ".join("?" * len(cohorts or ()))
        where = "h.study = ?" if study is not None else f"s.cohort IN ({marks})"
        rows = self._rows(
            "SELECT study, planned, noise, rate, sum(steps) FROM charges h "
            f"JOIN studies s USING (study) WHERE noise IS NOT NULL AND {where} "
            "GROUP BY study, noise, rate ORDER BY min(h.id)",
            *([study] if study is not None else cohorts or ()),
        )
        found: dict[str, _Charged] = {}
        for name, planned, noise, rate, steps in rows:
            one = found.setdefault(name, _Charged(name, planned))
            one.parts.append(Mechanism(noise, rate, steps))
        return list(found.values())

    def _without_privacy(self, cohorts: Collection[str]) -> tuple[int, int]:
        """Rounds without privacy on these cohorts, and how many studies had them."""
        marks = ", ".join("?" * len(cohorts))
        ((rounds, studies),) = self._rows(
            "SELECT count(*), count(DISTINCT study) FROM charges JOIN studies USING (study) "
            f"WHERE noise IS NULL AND cohort IN ({marks})",
            *cohorts,
        )
        return int(rounds), int(studies)


@dataclass
class _Charged:
    """What one study was charged: its mechanisms, with the steps that were charged of each."""

    study: str
    planned: int
    parts: list[Mechanism] = field(default_factory=list)

    @property
    def whole(self) -> list[Mechanism]:
        """What it was going to run when it began, as far as that is known."""
        if len(self.parts) != 1:
            return self.parts
        return [replace(self.parts[0], steps=max(self.planned, self.parts[0].steps))]


def _joined(found: list[_Charged], request: RoundRequest, more: Mechanism) -> list[_Charged]:
    """The same, and a further charge of a study."""
    own = next((one for one in found if one.study == request.study), None)
    if own is None:
        return [*found, _Charged(request.study, request.planned, [more])]
    total = Counter({(one.noise_multiplier, one.sampling_rate): one.steps for one in own.parts})
    total[more.noise_multiplier, more.sampling_rate] += more.steps
    own.parts = [Mechanism(*kind, steps) for kind, steps in total.items()]
    return found


def _cost(found: list[_Charged], delta: float, cap: float) -> float:
    """ε at δ of what was charged; the tight accountant holds where one study is alone.

    Its noise and rate are fixed before it begins, and only how many of its steps are taken may
    depend on results: a cap on them all, whichever they are, bounds each such choice.
    """
    parts = [part for one in found for part in one.parts]
    if len(found) <= 1 and len(parts) <= 1:
        return epsilon_composed(parts, delta)
    return epsilon_filtered(parts, delta, cap)


def _cost_if_joined(found: list[_Charged], delta: float, cap: float) -> float:
    """ε at δ by the filter, when there is a study beside the first.

    Whether the filter or the tight accountant holds for a patient must not depend on results. So it
    is settled when the first study begins: if all of that study fits under the cap by the filter,
    the filter holds from there on; else no other study may follow, also where the first one stops
    early.
    """
    parts = [part for one in found for part in one.parts]
    first = found[0].whole if found else []
    return max(epsilon_filtered(parts, delta, cap), epsilon_filtered(first, delta, cap))


def _exceeded(what: str, value: float, cap: float, delta: float) -> BudgetError:
    return BudgetError(
        RuleCode.STUDY_BUDGET if what == "study" else RuleCode.COHORT_BUDGET,
        value=f"{value:.4g} of {cap:.4g} at δ {delta:.2g}",
        fix="Plan fewer rounds or more noise, or ask the site to raise its cap",
        where=f"policy.max_epsilon_per_{what}",
    )
