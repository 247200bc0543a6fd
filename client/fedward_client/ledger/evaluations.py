"""Evaluations in the ledger: one answer per study, round, part and model.

An answer tells about validation or test patients, who are not in the training budget. So it has a
budget of its own. It is charged before the model sees an image, and the answer is kept before it
leaves: the same question gets the same answer again, byte for byte, and another question about the
same round is refused. ε of pure differential privacy adds up, also where later studies are chosen
in view of earlier answers (Rogers et al., 2016, "Privacy odometers and filters", section 3).
"""

from __future__ import annotations

import hashlib
import threading
import time
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from fedward.errors import BudgetError
from fedward.rule_codes import RuleCode
from fedward_client.ledger.store import Store

# Nothing leaves before an answer is kept, so an evaluation that a stop or a crash ended may be
# tried again. The bound is for what could be read off a long row of failures.
ATTEMPTS: Final = 3
_ROUNDING: Final = 1e-9


@dataclass(frozen=True)
class EvaluationRequest:
    """An evaluation that is asked for.

    Attributes
    ----------
    study, cohort : str
        The study, and the SHA-256 of its frozen cohort.
    plan_hash : str
        SHA-256 of the plan.
    round, part : int, str
        Which of the plan's evaluations.
    arrays : str
        Digest of the model.
    epsilon : float or None
        What it costs each patient of the part; None where exact counts leave, which has no bound.
    """

    study: str
    plan_hash: str
    cohort: str
    round: int
    part: str
    arrays: str
    epsilon: float | None


class Evaluations:
    """The evaluations of a ledger.

    Parameters
    ----------
    store : Store
        The ledger's tables.
    turn : threading.RLock
        The ledger's.
    groups : callable
        A cohort to the sets of cohorts that its patients are in.
    """

    def __init__(
        self,
        store: Store,
        turn: threading.RLock,
        groups: Callable[[str], Collection[Collection[str]]],
    ) -> None:
        self._store, self._turn, self._groups = store, turn, groups

    def reserve(self, request: EvaluationRequest, cap: float) -> bytes | None:
        """Charge an evaluation before anything of it is done.

        Parameters
        ----------
        cap : float
            ε of all evaluations that a patient of the cohort may be in.

        Returns
        -------
        bytes or None
            The answer, where it was given before; None: go on.

        Raises
        ------
        BudgetError
            The round was evaluated with another model, failed too often, or exceeds the cap.
        """
        with self._turn:
            self._same_study(request)
            row = self._find(request)
            if row is None:
                self.check(request, cap)
                self._insert(request)
                return None
            number, arrays, attempts, digest = row
            if arrays != request.arrays:
                raise BudgetError(
                    RuleCode.EVALUATED_ONCE,
                    values={"round": request.round},
                    fix="Evaluate in the next round",
                )
            if digest:
                return self._answer(number, digest)
            if attempts >= ATTEMPTS:
                raise BudgetError(
                    RuleCode.EVALUATION_TRIES,
                    values={"attempts": attempts},
                    fix="Evaluate in the next round",
                )
            with self._store.writing() as sql:
                sql.execute(
                    "UPDATE evaluations SET attempts = attempts + 1 WHERE id = ?", (number,)
                )
            return None

    def commit(self, request: EvaluationRequest, answer: bytes) -> None:
        """Keep the answer; only then it may leave.

        Raises
        ------
        BudgetError
            There is an answer already, or it cannot be written.
        """
        digest = hashlib.sha256(answer).hexdigest()
        with self._turn, self._store.writing() as sql:
            row = self._find(request)
            if row is None or row[3]:
                raise BudgetError(RuleCode.EVALUATION_ANSWERED, fix="Evaluate the next round")
            sql.execute("UPDATE evaluations SET digest = ? WHERE id = ?", (digest, row[0]))
            sql.execute("INSERT INTO answers VALUES (?, ?)", (row[0], zlib.compress(answer)))

    def check(self, request: EvaluationRequest, cap: float) -> None:
        """Raise BudgetError where a charge would exceed the cap of its cohort."""
        total = self.epsilon_of_cohort(request.cohort, request)
        if total > cap + _ROUNDING:
            raise BudgetError(
                RuleCode.EVALUATION_BUDGET,
                value=f"{total:.4g} of {cap:.4g}",
                fix="Lower metrics.epsilon, or ask the site to raise its cap",
                where="policy.max_evaluation_epsilon_per_cohort",
            )

    def check_study(self, request: EvaluationRequest, cap: float) -> None:
        """Whether all evaluations of a study would fit, before the first one; see :meth:`check`."""
        with self._turn:
            if not self._rows("SELECT 1 FROM evaluations WHERE study = ?", request.study):
                self.check(request, cap)

    def epsilon_of_study(self, study: str) -> float | None:
        """ε that a study's evaluations were charged; None where exact counts left."""
        with self._turn:
            rows = self._rows(
                "SELECT part, epsilon FROM evaluations WHERE study = ? ORDER BY id", study
            )
        if any(epsilon is None for _, epsilon in rows):
            return None
        return _of_study(rows)

    def epsilon_of_cohort(self, cohort: str, more: EvaluationRequest | None = None) -> float:
        """ε of the patient of a cohort who was evaluated most, over all studies and cohorts.

        Exact counts have no ε and are left out; see :meth:`without_bound`.

        Parameters
        ----------
        more : EvaluationRequest, optional
            A charge that is only considered.
        """
        with self._turn:
            groups = list(self._groups(cohort)) or [(cohort,)]
            return max(self._epsilon_of(group, more) for group in groups)

    def without_bound(self, cohort: str) -> list[str]:
        """Studies on patients of a cohort whose evaluations left as exact counts."""
        with self._turn:
            found: set[str] = set()
            for group in list(self._groups(cohort)) or [(cohort,)]:
                marks = ", ".join("?" * len(group))
                found |= {
                    str(study)
                    for (study,) in self._rows(
                        "SELECT DISTINCT study FROM evaluations "
                        f"WHERE epsilon IS NULL AND cohort IN ({marks})",
                        *group,
                    )
                }
            return sorted(found)

    def _epsilon_of(self, cohorts: Collection[str], more: EvaluationRequest | None) -> float:
        marks = ", ".join("?" * len(cohorts))
        rows = self._rows(
            "SELECT study, part, epsilon FROM evaluations "
            f"WHERE epsilon IS NOT NULL AND cohort IN ({marks})",
            *cohorts,
        )
        by_study: dict[str, list[tuple[str, float]]] = {}
        for study, part, epsilon in rows:
            by_study.setdefault(study, []).append((part, epsilon))
        if more is not None and more.epsilon is not None:
            by_study.setdefault(more.study, []).append((more.part, more.epsilon))
        return sum(_of_study(own) for own in by_study.values())

    def _insert(self, request: EvaluationRequest) -> None:
        with self._store.writing() as sql:
            sql.execute(
                "INSERT INTO evaluations "
                "(study, plan_hash, cohort, round, part, arrays, epsilon, attempts, made) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 1, ?)",
                (
                    request.study,
                    request.plan_hash,
                    request.cohort,
                    request.round,
                    request.part,
                    request.arrays,
                    request.epsilon,
                    time.time(),
                ),
            )

    def _same_study(self, request: EvaluationRequest) -> None:
        known = self._rows(
            "SELECT plan_hash, cohort FROM evaluations WHERE study = ?1 "
            "UNION SELECT plan_hash, cohort FROM studies WHERE study = ?1",
            request.study,
        )
        if any(one != (request.plan_hash, request.cohort) for one in known):
            raise BudgetError(
                RuleCode.STUDY_PLAN_AND_COHORT,
                fix="Submit it as a new study; its budget is its own",
            )

    def _find(self, request: EvaluationRequest) -> tuple[int, str, int, str] | None:
        rows = self._rows(
            "SELECT id, arrays, attempts, digest FROM evaluations "
            "WHERE study = ? AND round = ? AND part = ?",
            request.study,
            request.round,
            request.part,
        )
        return rows[0] if rows else None

    def _answer(self, number: int, digest: str) -> bytes:
        rows = self._rows("SELECT content FROM answers WHERE evaluation = ?", number)
        content = zlib.decompress(rows[0][0]) if rows else b""
        if hashlib.sha256(content).hexdigest() != digest:
            raise BudgetError(
                RuleCode.ANSWER_KEPT,
                fix="Evaluate in the next round",
            )
        return content

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        return self._store.connection.execute(sql, values).fetchall()


def _of_study(rows: Collection[tuple[str, float]]) -> float:
    """ε of a study: a patient is in one part of its division only."""
    parts: dict[str, float] = {}
    for part, epsilon in rows:
        parts[part] = parts.get(part, 0.0) + epsilon
    return max(parts.values(), default=0.0)
