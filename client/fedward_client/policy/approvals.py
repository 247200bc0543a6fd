"""Approvals and denials of plans by a person at the site, durable across crashes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedward.errors import ConfigError, FedwardError, PlanError, PolicyError
from fedward.files import locked, write_private
from fedward.plan.load import canonical, from_canonical, plan_hash
from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode
from fedward_client.policy.decide import StudyRequest

State = Literal["pending", "allowed", "approved", "denied"]
_NAME: Final = "approvals.json"
# A coordinator that sends ever new plans fills no disk and buries no other study.
MOST_PENDING: Final = 100
_MOST_ALLOWED: Final = 200


class Approval(BaseModel):
    """A plan that was seen, and what became of it.

    Attributes
    ----------
    study, plan_hash, coordinator : str
        What the approval is bound to: another plan or another coordinator needs its own.
    name : str
        The study's name in its plan.
    evaluate_only : bool
        Whether it is only about the evaluation of the delivered model; training needs another.
    state : str
        Where it stands; ``allowed`` is what went ahead within the policy, without a person.
    seen, settled : str
        When, ISO 8601 in UTC; ``settled`` is "" while it is pending.
    by : str
        Who settled it, as the machine knows them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    study: str
    plan_hash: str
    coordinator: str
    name: str
    evaluate_only: bool = False
    state: State = "pending"
    seen: str
    settled: str = ""
    by: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is bound to."""
        return self.study, self.plan_hash, self.coordinator

    def enforce(self) -> None:
        """Raise PolicyError unless it may go ahead."""
        if self.state not in ("approved", "allowed"):
            rule = RuleCode.DENIED if self.state == "denied" else RuleCode.PENDING
            raise PolicyError(rule, fix="fedward-client approve, at the site")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: Literal[1] = 1
    paused: bool = False
    approvals: list[Approval] = Field(default_factory=list)


class Approvals:
    """The store, ``approvals.json`` in the site's state folder, readable by its owner only.

    Several processes may use it at once.

    Parameters
    ----------
    state : Path
        The site's state folder.
    now : callable
        Gives the time, for tests.
    """

    def __init__(
        self, state: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path, self._plans, self._now = state / _NAME, state / "plans", now
        state.mkdir(mode=0o700, parents=True, exist_ok=True)

    def all(self) -> list[Approval]:
        """Every plan that was seen, oldest first."""
        return self._read().approvals

    def pending(self) -> list[Approval]:
        """Those that wait for a person."""
        return [one for one in self.all() if one.state == "pending"]

    def see(self, request: StudyRequest, *, manual: bool = True) -> Approval:
        """Where a plan stands; one that nobody settled is pending, or allowed by the policy.

        Parameters
        ----------
        request : StudyRequest
            The plan, its study and who asks.
        manual : bool
            Whether a person has to approve.

        Raises
        ------
        PolicyError
            Too many others are pending.
        """
        with locked(self._path):
            file = self._read()
            key = (request.study, request.plan_hash, request.coordinator)
            wanted: State = "pending" if manual else "allowed"
            known = next((one for one in file.approvals if one.key == key), None)
            # Who approved an evaluation has not approved training.
            wider = known is not None and known.evaluate_only and not request.evaluate_only
            settled = {"denied", *(() if wider else ("approved", wanted))}
            if known is not None and known.state in settled:
                self._keep(request, known.state)
                return known
            # A denial is of the study, whatever plan its coordinator sends next.
            if any(
                (one.study, one.coordinator, one.state) == (*key[::2], "denied")
                for one in file.approvals
            ):
                wanted = "denied"
            others = [one for one in file.approvals if one.key != key]
            made = Approval(
                study=request.study,
                plan_hash=request.plan_hash,
                coordinator=request.coordinator,
                name=request.plan.study.name,
                evaluate_only=request.evaluate_only,
                state=wanted,
                seen=self._time(),
            )
            kept = [*_with_room(others, wanted), made]
            self._keep(request, wanted)
            self._write(file.model_copy(update={"approvals": kept}))
            self._forget({one.plan_hash for one in kept if one.state != "denied"})
            return made

    def plan(self, approval: Approval) -> Plan | None:
        """The plan that an approval is about; None where it was not kept.

        What another release wrote and this one cannot read counts as not kept.
        """
        try:
            plan = from_canonical((self._plans / f"{approval.plan_hash}.json").read_text("utf-8"))
        except (OSError, UnicodeDecodeError, PlanError):
            return None
        return plan if plan_hash(plan) == approval.plan_hash else None

    def _keep(self, request: StudyRequest, state: State) -> None:
        """Keep the plan itself: what was approved can be read later, whoever sent it."""
        path = self._plans / f"{request.plan_hash}.json"
        if state != "denied" and not path.exists():
            self._plans.mkdir(mode=0o700, exist_ok=True)
            write_private(path, canonical(request.plan).encode())

    def _forget(self, known: set[str]) -> None:
        for path in self._plans.glob("*.json"):
            if path.stem not in known:
                path.unlink(missing_ok=True)

    def find(self, study: str, plan: str = "") -> Approval:
        """The one plan of a study whose hash begins so; raises ConfigError for none and several."""
        return _one([one for one in self.all() if one.study == study], plan)

    def settle(
        self, study: str, state: Literal["approved", "denied"], by: str, plan: str = ""
    ) -> Approval:
        """Approve or deny a plan of a study; what was settled may be settled anew.

        Parameters
        ----------
        study : str
            The study's id.
        state : str
            What it shall be.
        by : str
            Who says so.
        plan : str
            The start of the plan's hash; needed where several plans of the study were seen.

        Raises
        ------
        ConfigError
            There is no such plan, or more than one.
        OutputError
            It cannot be written.
        """
        with locked(self._path):
            file = self._read()
            old = _one([one for one in file.approvals if one.study == study], plan)
            new = old.model_copy(update={"state": state, "settled": self._time(), "by": by[:64]})
            others = [new if one.key == old.key else one for one in file.approvals]
            self._write(file.model_copy(update={"approvals": others}))
            return new

    def denied(self, study: str, plan_hash: str, coordinator: str) -> bool:
        """Whether the officer ended this coordinator's study."""
        key = (study, plan_hash, coordinator)
        return any(one.key == key and one.state == "denied" for one in self.all())

    @property
    def paused(self) -> bool:
        """Whether the officer paused the site; a restart does not undo that."""
        return self._read().paused

    def pause(self, *, paused: bool) -> None:
        """Pause the site, or let it go on.

        Raises
        ------
        OutputError
            It cannot be written.
        """
        with locked(self._path):
            self._write(self._read().model_copy(update={"paused": paused}))

    def _time(self) -> str:
        return self._now().isoformat(timespec="seconds")

    def _read(self) -> _File:
        try:
            return _File.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _File()
        except (OSError, ValidationError):
            # To start anew would forget what was denied.
            raise _broken(
                "the approvals must be a readable file of this release",
                "Restore approvals.json, or move it away and approve again",
            ) from None

    def _write(self, file: _File) -> None:
        write_private(self._path, file.model_dump_json(indent=1).encode())


def _with_room(others: list[Approval], state: State) -> list[Approval]:
    """Room for one more: pending ones are never forgotten, the oldest allowed ones are."""
    same = [one for one in others if one.state == state]
    if state == "pending" and len(same) >= MOST_PENDING:
        raise PolicyError(RuleCode.PENDING, fix="Approve or deny what is pending")
    if state == "allowed" and len(same) >= _MOST_ALLOWED:
        return [one for one in others if one is not same[0]]
    return others


def _one(found: list[Approval], plan: str) -> Approval:
    fitting = [one for one in found if one.plan_hash.startswith(plan)]
    if not fitting:
        raise _broken("the study must have asked to be approved", "See fedward-client pending")
    if len(fitting) > 1:
        raise _broken("a study with several plans needs the plan's hash", "Give its start too")
    return fitting[0]


def _broken(rule: str, fix: str) -> FedwardError:
    return ConfigError(rule, fix=fix, where="approvals")
