"""Charge the patients' privacy budget before a round is trained, once per round, for good.

A round is charged in full before it is trained, and its update leaves only after the charge was
committed with the update's digest. So whatever is released stands in the ledger; what was charged
and not released counts as spent all the same.

A patient is in every cohort that holds his pseudonym, however often a dataset is frozen and under
whichever name, and what all of them were charged for composes. An update tells about a patient only
if its cohort holds him: two cohorts without a common patient do not compose, though a third one may
overlap with both. A cohort has spent what the patient in it who was charged most has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.ledger.evaluations import Evaluations
from client.ledger.store import Store, digest_of_patients
from fedward.errors import BudgetError
from fedward.privacy import Mechanism, epsilon_composed


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
    """

    study: str
    plan_hash: str
    round: int
    cohort: str
    mechanism: Mechanism | None
    delta: float | None


@dataclass(frozen=True)
class Caps:
    """What may be spent.

    Attributes
    ----------
    study : float
        ε of one study at its δ.
    cohort : float
        ε of all studies together at ``delta``.
    delta : float
        δ of the latter.
    """

    study: float
    cohort: float
    delta: float


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
    folder : Path
        Where it lies; the site's state folder.
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
        self, folder: Path, *, read_only: bool = False, secret_id: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
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
            raise BudgetError("a cohort that is charged has patients", fix="Freeze it again")
        people = sorted(set(patients))
        digest = digest_of_patients(people)
        with self._turn:
            known = self._rows("SELECT patients FROM cohorts WHERE sha256 = ?", cohort)
            if known and known[0][0] != digest:
                raise BudgetError(
                    "a cohort keeps the patients that it was registered with", value=len(people),
                    fix="Freeze the dataset again",
                )  # fmt: skip
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
                request.study, request.round,
            )  # fmt: skip
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
                raise BudgetError("a charge is committed once", fix="Order the next round")
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
            if not self._mechanisms(study=request.study):
                self._within(request, total, caps)

    def epsilon_of_study(self, study: str, delta: float) -> float:
        """ε at δ that a study was charged, released or lost."""
        with self._turn:
            return epsilon_composed(self._mechanisms(study=study), delta)

    def epsilon_of_cohort(self, cohort: str, delta: float, more: Iterable[Mechanism] = ()) -> float:
        """ε at δ of whoever in a cohort was charged most, over all studies and cohorts.

        Parameters
        ----------
        more : iterable of Mechanism
            Charges that are only considered.
        """
        with self._turn:
            extra = list(more)
            return max(
                (
                    epsilon_composed([*self._mechanisms(cohorts=group), *extra], delta)
                    for group in self._groups(cohort)
                ),
                default=epsilon_composed(extra, delta),
            )

    def studies(self) -> list[dict[str, Any]]:
        """Each study's dataset, charges by state, and the δ and ε that it was charged."""
        with self._turn:
            rows = self._rows(
                "SELECT s.study, c.dataset, s.cohort, max(h.delta), count(h.id), "
                "sum(h.state = 'committed'), sum(h.state = 'lost'), max(h.round) FROM studies s "
                "JOIN cohorts c ON c.sha256 = s.cohort LEFT JOIN charges h ON h.study = s.study "
                "GROUP BY s.study ORDER BY min(h.id)"
            )
            return [
                {
                    "study": study, "dataset": dataset, "cohort": cohort[:12], "delta": delta,
                    "epsilon": self.epsilon_of_study(study, delta) if delta else None,
                    "charged": charged, "released": released or 0, "lost": lost or 0,
                    "last_round": last or 0,
                }
                for study, dataset, cohort, delta, charged, released, lost, last in rows
            ]  # fmt: skip

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
            what = "plan" if known[0][0] != request.plan_hash else "cohort"
            raise BudgetError(
                f"a study keeps the {what} that it began with",
                fix="Submit it as a new study; its budget is its own",
            )

    def _again(self, number: int, state: str, digest: str) -> Release:
        if state == "committed":
            return Release(str(digest))
        # Reserved and held by nobody: whoever asked for it was told that it could not be written.
        if state == "lost" or number not in self._live:
            raise BudgetError(
                "a round's charge was spent when the trainer stopped", fix="Order the next round"
            )
        raise RoundBusy("a round is trained once", fix="Wait for its update")

    def _in_order(self, request: RoundRequest) -> None:
        last = self._rows("SELECT max(round) FROM charges WHERE study = ?", request.study)[0][0]
        if last is not None and request.round < last:
            raise BudgetError(
                "a private round is trained in its turn", value=f"{request.round} after {last}",
                fix="Order the next round",
            )  # fmt: skip

    def _within(self, request: RoundRequest, more: Mechanism, caps: Caps) -> None:
        delta = request.delta or caps.delta
        own = epsilon_composed([*self._mechanisms(study=request.study), more], delta)
        if not own <= caps.study:
            raise _exceeded("study", own, caps.study)
        everything = self.epsilon_of_cohort(request.cohort, caps.delta, [more])
        if not everything <= caps.cohort:
            raise _exceeded("cohort", everything, caps.cohort)

    def _insert(self, request: RoundRequest) -> Charge:
        one = request.mechanism
        with self._store.writing() as sql:
            sql.execute(
                "INSERT INTO studies VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (request.study, request.plan_hash, request.cohort),
            )
            made = sql.execute(
                "INSERT INTO charges (study, round, noise, rate, steps, delta, state, made) "
                "VALUES (?, ?, ?, ?, ?, ?, 'reserved', ?)",
                (
                    request.study, request.round, one and one.noise_multiplier,
                    one and one.sampling_rate, one.steps if one else 0, request.delta,
                    self._clock(),
                ),
            )  # fmt: skip
            number = int(made.lastrowid or 0)
        self._live.add(number)
        return Charge(number)

    def _note_public(self, request: RoundRequest, known: list[Any]) -> Charge:
        """Rounds without privacy cost nothing that could be counted, but are written down."""
        if not known:
            return self._insert(request)
        if self._rows("SELECT 1 FROM charges WHERE id = ? AND noise IS NOT NULL", known[0][0]):
            raise BudgetError(
                "a private round stays private", value=request.round, fix="Order the next round"
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

    def _mechanisms(
        self, *, study: str | None = None, cohorts: Collection[str] | None = None
    ) -> list[Mechanism]:
        marks = ", ".join("?" * len(cohorts or ()))
        where = "h.study = ?" if study is not None else f"s.cohort IN ({marks})"
        rows = self._rows(
            "SELECT noise, rate, sum(steps) FROM charges h JOIN studies s USING (study) "
            f"WHERE noise IS NOT NULL AND {where} GROUP BY noise, rate",
            *([study] if study is not None else cohorts or ()),
        )
        return [Mechanism(noise, rate, steps) for noise, rate, steps in rows]


def _exceeded(what: str, value: float, cap: float) -> BudgetError:
    return BudgetError(
        f"a {what} must stay within its privacy budget", value=f"{value:.4g} of {cap:.4g}",
        fix="Plan fewer rounds or more noise, or ask the site to raise its cap",
        where=f"policy.max_epsilon_per_{what}",
    )  # fmt: skip
