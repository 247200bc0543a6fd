"""Studies, their rounds and what happened in them; the runner writes through this."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, func, insert, select, update

from fedward.errors import PlanError, StudyError
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan
from fedward_server.registry.database import reading
from fedward_server.registry.records import FINAL, NEXT, Event, State, Study, Wanted
from fedward_server.registry.schema import events, now, quarantines, rounds, studies
from fedward_server.results import Round, StudyResults


class StudyStore:
    """All studies of one aggregator.

    Every method is one transaction.

    Parameters
    ----------
    engine : Engine
        The registry's database.
    coordinator : str
        Base64 of the coordinator's public key, noted with each study.
    """

    def __init__(self, engine: Engine, coordinator: str) -> None:
        self._engine, self._coordinator = engine, coordinator

    def submit(
        self,
        plan: Plan,
        sites: Sequence[str],
        quorum: int | None = None,
        deadline: float | None = None,
        seed: int = 0,
        request: str | None = None,
        evaluate_only: Sequence[str] = (),
    ) -> Study:
        """Enter a study, signed, in state ``submitted``.

        Parameters
        ----------
        plan : Plan
            What to do.
        sites : sequence of str
            The sites that train; with those of `evaluate_only` the only ones that it will reach.
        quorum : int, optional
            Updates that make a round count; none: as the plan says.
        deadline : float, optional
            Seconds that a round waits; none: as the plan says.
        seed : int
            Of the initial model and of the division of patients.
        request : str, optional
            The caller's own mark; with one that was used before, that study is given back.
        evaluate_only : sequence of str
            Sites that take no part in training and evaluate the delivered model.

        Raises
        ------
        PlanError
            Sites, quorum or deadline do not fit the plan.
        """
        values = self._values(plan, sorted(set(sites)), quorum, deadline, seed, request)
        only = sorted(set(evaluate_only))
        if both := sorted(set(only) & set(sites)):
            raise PlanError(
                "a site trains, or only evaluates",
                value=", ".join(both),
                fix="Name it in --sites or in --evaluate-only",
                where="--evaluate-only",
            )
        values["evaluate_only"] = json.dumps(only)
        with self._engine.begin() as connection:
            same = studies.c.request == request
            if request and (row := connection.execute(select(studies).where(same)).one_or_none()):
                return _study(row)
            connection.execute(insert(studies).values(values))
            _add_event(
                connection, values["id"], "submitted", {"sites": json.loads(values["sites"])}
            )
            return _study(_locked(connection, values["id"]))

    def _values(
        self,
        plan: Plan,
        sites: list[str],
        quorum: int | None,
        deadline: float | None,
        seed: int,
        request: str | None,
    ) -> dict[str, Any]:
        quorum = plan.participation.needed if quorum is None else quorum
        deadline = plan.participation.deadline if deadline is None else deadline
        _check(plan, sites, quorum, deadline)
        mark, identity, at = plan_hash(plan), _new_id(plan.study.name), now()
        return {
            "id": identity,
            "name": plan.study.name,
            "plan": canonical(plan),
            "plan_sha256": mark,
            "coordinator": self._coordinator,
            "signature": "",  # each order has its own
            "sites": json.dumps(sites),
            "quorum": quorum,
            "deadline": deadline,
            "seed": seed,
            "state": "submitted",
            "wanted": "run",
            "round": 0,
            "request": request,
            "created": at,
            "updated": at,
        }

    def find(self, study: str) -> Study | None:
        """A study by its id."""
        with reading(self._engine) as connection:
            row = connection.execute(select(studies).where(studies.c.id == study)).one_or_none()
        return None if row is None else _study(row)

    def get(self, study: str) -> Study:
        """A study by its id.

        Raises
        ------
        StudyError
            There is none.
        """
        found = self.find(study)
        if found is None:
            raise _unknown(study)
        return found

    def list(self, *states: State) -> list[Study]:
        """Studies, oldest first; of these states only, when any is given."""
        query = select(studies).order_by(studies.c.created)
        if states:
            query = query.where(studies.c.state.in_(states))
        with reading(self._engine) as connection:
            return [_study(row) for row in connection.execute(query).all()]

    def set_state(self, study: str, state: State, reason: str = "") -> Study:
        """Say where a study stands; the same state again only changes the reason.

        Raises
        ------
        StudyError
            There is no such study, the step is not one of ``NEXT``, or an operator wants the study
            to stand still and the new state is ``running``.
        """
        with self._engine.begin() as connection:
            row = _locked(connection, study)
            if state != row.state and state not in NEXT[row.state]:
                raise StudyError(
                    f"a study that is {row.state} cannot become {state}",
                    value=study,
                    fix="See fedward-server study show",
                    where="state",
                )
            if state == "running" and row.wanted != "run":
                raise StudyError(
                    f"an operator wants this study to {row.wanted}",
                    value=study,
                    fix="Resume it first",
                    where="state",
                )
            return _set_state(connection, row, state, reason)

    def want(self, study: str, wanted: Wanted, by: str) -> Study:
        """An operator's wish: ``run`` (resume), ``pause`` or ``stop``; it holds at once.

        Raises
        ------
        StudyError
            There is no such study, or it has ended.
        """
        with self._engine.begin() as connection:
            row = _locked(connection, study)
            if row.state in FINAL and not (wanted == row.wanted == "stop"):
                raise StudyError(
                    f"a study that is {row.state} stays so",
                    value=study,
                    fix="Submit the plan again",
                    where="state",
                )
            connection.execute(update(studies).where(studies.c.id == study).values(wanted=wanted))
            return _set_state(connection, row, *_wish(row, wanted, by))

    def add_event(self, study: str, kind: str, payload: Mapping[str, Any]) -> int:
        """Append an event for those who watch; gives its number.

        Raises
        ------
        StudyError
            There is no such study.
        """
        with self._engine.begin() as connection:
            _locked(connection, study)
            return _add_event(connection, study, kind, payload)

    def events_after(self, study: str, seq: int = 0, limit: int = 1000) -> Sequence[Event]:
        """Events with a number above `seq`, in order."""
        after = (events.c.study == study) & (events.c.seq > seq)
        query = select(events).where(after).order_by(events.c.seq).limit(limit)
        with reading(self._engine) as connection:
            return [_event(row) for row in connection.execute(query).all()]

    def save_round(self, study: str, result: Round) -> None:
        """Keep a round's result, and tell it as an event ``round`` the first time.

        A round that is saved again, after a crash, takes the place of what was there.

        Raises
        ------
        StudyError
            There is no such study.
        """
        text, at = result.model_dump_json(), now()
        here = (rounds.c.study == study) & (rounds.c.round == result.round)
        with self._engine.begin() as connection:
            row = _locked(connection, study)
            changed = connection.execute(update(rounds).where(here).values(result=text, saved=at))
            if not changed.rowcount:
                connection.execute(
                    insert(rounds).values(study=study, round=result.round, result=text, saved=at)
                )
                _add_event(connection, study, "round", result.model_dump(mode="json"))
            reached = max(row.round, result.round)
            connection.execute(
                update(studies).where(studies.c.id == study).values(round=reached, updated=at)
            )

    def quarantine(self, study: str, site: str, reason: str) -> None:
        """Leave a site out of a study's rounds until it is released; other studies go on."""
        values = {"study": study, "site": site, "reason": reason, "at": now()}
        with self._engine.begin() as connection:
            _locked(connection, study)
            connection.execute(delete(quarantines).where(_quarantine(study, site)))
            connection.execute(insert(quarantines).values(values))

    def release(self, site: str, study: str | None = None) -> Sequence[str]:
        """End a site's quarantine in a study, or in all; gives the studies where it had one."""
        there = _quarantine(study, site)
        with self._engine.begin() as connection:
            query = select(quarantines.c.study).where(there).order_by(quarantines.c.study)
            found = list(connection.execute(query).scalars().all())
            connection.execute(delete(quarantines).where(there))
            for one in found:
                _locked(connection, one)
                _add_event(connection, one, "released", {"site": site})
        return found

    def quarantined(self, study: str) -> dict[str, str]:
        """The sites that are put out of a study, and why."""
        query = select(quarantines.c.site, quarantines.c.reason).where(quarantines.c.study == study)
        with reading(self._engine) as connection:
            return {row.site: row.reason for row in connection.execute(query).all()}

    def rounds(self, study: str) -> Sequence[Round]:
        """The results of the rounds that are finished, in order."""
        query = select(rounds.c.result).where(rounds.c.study == study).order_by(rounds.c.round)
        with reading(self._engine) as connection:
            found = connection.execute(query).scalars().all()
        return [Round.model_validate_json(text) for text in found]

    def save_results(self, study: str, results: StudyResults) -> None:
        """Keep what the report is made of: sites, test figures, privacy (see :meth:`get`)."""
        with self._engine.begin() as connection:
            _locked(connection, study)
            connection.execute(
                update(studies)
                .where(studies.c.id == study)
                .values(results=results.model_dump_json(), updated=now())
            )

    def results(self, study: str) -> StudyResults | None:
        """What :meth:`save_results` kept."""
        query = select(studies.c.results).where(studies.c.id == study)
        with reading(self._engine) as connection:
            text = connection.execute(query).scalar_one_or_none()
        return StudyResults.model_validate_json(text) if text else None


def _quarantine(study: str | None, site: str) -> Any:
    at = quarantines.c.site == site
    return at if study is None else at & (quarantines.c.study == study)


def _check(plan: Plan, sites: list[str], quorum: int, deadline: float) -> None:
    least = plan.participation.sites
    if len(sites) < least:
        raise PlanError(
            f"the study needs {least} sites",
            value=len(sites),
            fix="Name more sites",
            where="participation.sites",
        )
    if not 1 <= quorum <= len(sites):
        raise PlanError(
            f"the quorum must be from 1 to the {len(sites)} sites",
            value=quorum,
            fix="Change --quorum or participation.quorum",
            where="participation.quorum",
        )
    need = plan.strategy.spec.updates_needed(int(plan.strategy.settings.get("malicious", 0)))
    if quorum < need:
        raise PlanError(
            f"{plan.strategy.name} needs {need} updates",
            value=quorum,
            fix="Change --quorum",
            where="participation.quorum",
        )
    if not 0 < deadline < float("inf"):
        raise PlanError(
            "the deadline must be a number of seconds above 0",
            value=deadline,
            fix="Change --deadline",
            where="participation.deadline",
        )


def _new_id(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48].strip("-")
    return f"{slug or 'study'}-{secrets.token_hex(4)}"


def _wish(row: Row[Any], wanted: Wanted, by: str) -> tuple[State, str]:
    if wanted == "pause":
        return "paused", f"paused by {by}"
    if wanted == "stop":
        return "stopped", row.reason if row.state == "stopped" else f"stopped by {by}"
    # What runs goes on; anything else waits for its runner.
    return ("running", "") if row.state == "running" else ("submitted", f"resumed by {by}")


def _set_state(connection: Connection, row: Row[Any], state: State, reason: str) -> Study:
    if (row.state, row.reason) != (state, reason):
        connection.execute(
            update(studies)
            .where(studies.c.id == row.id)
            .values(state=state, reason=reason, updated=now())
        )
        _add_event(connection, row.id, "state", {"state": state, "reason": reason})
    return _study(_locked(connection, row.id))


def _add_event(connection: Connection, study: str, kind: str, payload: Mapping[str, Any]) -> int:
    last = select(func.coalesce(func.max(events.c.seq), 0)).where(events.c.study == study)
    seq = int(connection.execute(last).scalar_one()) + 1
    text = json.dumps(dict(payload), ensure_ascii=False, sort_keys=True, allow_nan=False)
    connection.execute(
        insert(events).values(study=study, seq=seq, at=now(), kind=kind, payload=text)
    )
    return seq


def _locked(connection: Connection, study: str) -> Row[Any]:
    query = select(studies).where(studies.c.id == study).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        raise _unknown(study)
    return row


def _unknown(study: str) -> StudyError:
    return StudyError(
        "the study must exist", value=study, fix="See fedward-server study list", where="study"
    )


def _study(row: Row[Any]) -> Study:
    named = {key: tuple(json.loads(getattr(row, key))) for key in ("sites", "evaluate_only")}
    return Study.model_validate({**row._mapping, **named})


def _event(row: Row[Any]) -> Event:
    return Event.model_validate({**row._mapping, "payload": json.loads(row.payload)})
