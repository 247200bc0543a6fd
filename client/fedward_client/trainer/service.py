"""From an order to a reply: policy, ledger, training, egress gate.

A hospital's trainer and a simulation carry out orders with the same :class:`OrderService`; what a
hospital holds an order against besides (signature, approval, hours) is in :class:`TrainerService`.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, Final

from fedward.errors import AuditError, FedwardError, PolicyError, ProtocolError, SchemaError
from fedward.models import describe
from fedward.plan.schema import Plan
from fedward.protocol import Refusal, RefusalKind, RoundOrder
from fedward.rule_codes import RuleCode
from fedward.signing import fingerprint, signed_bytes, verify_order
from fedward_client.audit.log import AuditLog
from fedward_client.egress.gate import refusal_for
from fedward_client.fair_queue import Cancelled, FairScheduler
from fedward_client.link.messages import TrainerMessage
from fedward_client.link.state import LinkState
from fedward_client.policy.approvals import Approvals
from fedward_client.policy.decide import Decision, StudyRequest, decide
from fedward_client.policy.hours import quiet_until
from fedward_client.trainer.executor import Executor
from fedward_client.trainer.status import StatusBoard
from fedward_client.trainer.study_context import Contexts, StudyContext, StudyContexts
from fedward_client.trainer.watchdog import OrderMark, OrdersInHand

_LOG = logging.getLogger("fedward.trainer")
# Refusals that stay the same until somebody acts; the aggregator asks again every few seconds.
_LASTING: Final = frozenset({"pending", "paused", "policy", "busy", "data", "budget", "schema"})
_MOST_REPEATED: Final = 10_000  # beyond that each is written down again
_DOING: Final = {"describe": "describing", "train": "training", "evaluate": "evaluating"}

# What status shouts, by whether site.toml allows it.
UNCONFINED: Final = {
    False: "the connector can read images: no order is carried out; see fedward-client doctor",
    True: "THE CONNECTOR CAN READ IMAGES and site.toml allows it",
}


STRANGER: Final = (
    "a study of a coordinator with the fingerprint {} was refused: policy.coordinators does not "
    "name it; compare it by telephone (fedward-server fingerprint), then add it"
)
_STRANGERS: Final = 5  # told of; who makes keys fills no screen


class Refused(FedwardError):
    """An error on its way to the coordinator, with whose turn it is."""

    def __init__(self, error: FedwardError, kind: RefusalKind) -> None:
        self.kind: RefusalKind = kind
        super().__init__(
            error.rule,
            value=error.value,
            fix=error.fix,
            where=error.where,
            code=error.code,
            values=error.values,
        )


CarryOut = Callable[[str, RoundOrder, StudyContext, TrainerMessage], TrainerMessage]


class OrderService(ABC):
    """Turns an order into a reply; a refusal is a reply too, and an exception never is.

    Parameters
    ----------
    contexts : Contexts
        The site's studies, its policy and its gate.
    executor : Executor
        Does what was allowed.
    """

    def __init__(self, contexts: Contexts, executor: Executor) -> None:
        self._contexts, self._executor = contexts, executor

    def answer(self, what: str, packet: TrainerMessage) -> TrainerMessage:
        """Answer an order: ``describe``, ``train`` or ``evaluate``."""
        return self._with_charge(what, packet, self._reply(what, packet, self._carry_out))

    def garbage(self, error: ProtocolError) -> TrainerMessage:
        """Refuse what was no order at all."""
        return self._refusal(error, 0, None)

    @abstractmethod
    def _coordinator(self, order: RoundOrder, what: str, packet: TrainerMessage) -> str:
        """Whose order it is, by the SHA-256 of a key; raises where it is nobody's."""

    @abstractmethod
    def _heard(self, request: StudyRequest, order: RoundOrder) -> None:
        """Note what is asked, before it is held against the policy."""

    @abstractmethod
    def _decided(self, order: RoundOrder, decision: Decision) -> None:
        """Note the policy's decision, before it holds."""

    @abstractmethod
    def _approved(self, request: StudyRequest, decision: Decision) -> None:
        """Raise where a person has to approve and has not."""

    def _refuse(self, error: BaseException, round_: int) -> Refusal:
        """What is said in place of a reply."""
        kind = error.kind if isinstance(error, Refused) else None
        return refusal_for(error, self._contexts.site, round_, kind)

    def _carry_out(
        self, what: str, order: RoundOrder, case: StudyContext, packet: TrainerMessage
    ) -> TrainerMessage:
        return self._executor.do(what, order, case, packet)

    def _reply(self, what: str, packet: TrainerMessage, carry_out: CarryOut) -> TrainerMessage:
        round_, study = 0, ""
        case: StudyContext | None = None
        try:
            order = self._order(packet)
            round_ = order.round
            coordinator = self._coordinator(order, what, packet)
            study = order.study  # somebody has signed it
            case = self._allowed(order, coordinator)
            return carry_out(what, order, case, packet)
        except FedwardError as error:
            return self._refusal(error, round_, case, study)
        except Exception as error:
            # What went wrong may quote a path or an identifier: the log stays here.
            _LOG.exception("an unexpected error stopped an order")
            return self._refusal(error, round_, case, study)

    def _with_charge(
        self, what: str, packet: TrainerMessage, made: TrainerMessage
    ) -> TrainerMessage:
        """A refusal says where the round that it refuses cost nothing."""
        if what == "train" and made.kind == "refusal" and not self._executor.charged(packet):
            return TrainerMessage("refusal", {**made.record, "charged": False})
        return made

    def _order(self, packet: TrainerMessage) -> RoundOrder:
        if packet.kind != "order":
            raise ProtocolError(RuleCode.ORDER, fix="Send a RoundOrder record")
        return RoundOrder.from_flat(packet.record)

    def _allowed(self, order: RoundOrder, coordinator: str) -> StudyContext:
        """Everything that must hold before an image is opened."""
        plan = self._plan(order, coordinator)
        case = self._contexts.of(order.study, plan)
        request = StudyRequest(
            study=order.study,
            plan=plan,
            plan_hash=order.plan_hash,
            coordinator=coordinator,
            parameters=describe(plan).parameters,
            facts=case.facts,
            sites=None if order.task == "evaluate" or order.evaluate_only else order.sites,
            evaluate_only=bool(order.evaluate_only),
        )
        self._heard(request, order)
        decision = decide(self._contexts.policy, request)
        self._decided(order, decision)
        decision.enforce()
        self._approved(request, decision)
        return case

    def _plan(self, order: RoundOrder, coordinator: str) -> Plan:
        try:
            return order.read_plan()
        except SchemaError:
            # The refusal tells the site's release: only to a coordinator that the site accepts.
            if not self._contexts.policy.accepts(coordinator):
                raise PolicyError(RuleCode.COORDINATOR) from None
            raise

    def _refusal(
        self, error: BaseException, round_: int, case: StudyContext | None, study: str = ""
    ) -> TrainerMessage:
        made = self._contexts.gate(case).check_refusal(self._refuse(error, round_))
        return TrainerMessage("refusal", dict(made.to_flat()))


class TrainerService(OrderService):
    """Answers the connector's orders, one study at a time.

    Parameters
    ----------
    contexts : StudyContexts
        The site's datasets and policy.
    executor : Executor
        Does what was allowed.
    audit : AuditLog
        Hears of everything.
    approvals : Approvals
        What the officer said.
    board : StatusBoard
        What is going on.
    in_hand : OrdersInHand
        Remembers an order that stops the trainer.
    now : callable
        Local time.
    """

    def __init__(
        self,
        contexts: StudyContexts,
        executor: Executor,
        audit: AuditLog,
        approvals: Approvals,
        board: StatusBoard,
        in_hand: OrdersInHand,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        super().__init__(contexts, executor)
        self._studies, self._audit = contexts, audit
        self._approvals, self._board, self._now = approvals, board, now
        self._in_hand, self._exposed = in_hand, False
        self._turns, self._told = FairScheduler(), set[tuple[str, ...]]()
        self._repeated: set[tuple[str, int, str, str]] = set()
        self.link: dict[str, Any] = {}
        board.set(paused=approvals.paused)

    def answer(self, what: str, packet: TrainerMessage) -> TrainerMessage:
        """Answer an order; one that stopped the trainer before is refused unread."""
        return self._with_charge(what, packet, self._in_hand_answer(what, packet))

    def _in_hand_answer(self, what: str, packet: TrainerMessage) -> TrainerMessage:
        try:
            with self._in_hand.order(what, packet.record) as mark:
                return self._reply(what, packet, partial(self._in_turn, mark))
        except PolicyError as error:
            return self._refusal(error, 0, None)

    def attached(self, isolation: str) -> None:
        """A connector came; what it found of the images is written down, and shouted if bad."""
        hidden = isolation == "hidden"
        allowed = self._studies.allow_unconfined_connector
        self._audit.append("isolation", process="connector", holds=hidden, allowed_anyway=allowed)
        self._exposed = not hidden
        others = [one for one in self._board.get()["warnings"] if one not in UNCONFINED.values()]
        self._board.set(
            connector="hidden" if hidden else "can read images",
            warnings=others if hidden else [*others, UNCONFINED[allowed]],
        )

    def detached(self) -> None:
        """It left."""
        self._board.set(connector="none attached")
        self.link = {}

    def told(self, link: LinkState) -> None:
        """The connector told how its link is."""
        self.link = link.model_dump()

    def forgive(self, study: str) -> None:
        """Carry out a study's orders again, also one that stopped the trainer."""
        self._in_hand.forgive(study)

    def cancel(self, study: str) -> int:
        """Give up a study's orders."""
        return self._turns.give_up(study)

    def end(self, study: str) -> None:
        """Remove what the strategy of a study that is denied kept here."""
        self._executor.end(study)

    def status(self) -> dict[str, Any]:
        """What the connector may know."""
        self._board.set(waiting=self._turns.waiting())
        return self._board.get()

    def wait_for_news(self, seconds: float) -> bool:
        """Whether something changed."""
        return self._board.wait(seconds)

    def pause(self, *, paused: bool) -> None:
        """The officer pauses the site or lets it go on.

        What stops it holds at once; what lets it go on is written down first.
        """
        self._board.set(paused=self._board.paused or paused)
        if paused:
            self._approvals.pause(paused=True)
        self._audit.append("paused" if paused else "resumed")
        if not paused:
            self._approvals.pause(paused=False)
        self._board.set(paused=paused)

    def close(self) -> None:
        """Give up everything, promptly."""
        self._turns.close()

    def _coordinator(self, order: RoundOrder, what: str, packet: TrainerMessage) -> str:
        return verify_order(order, what, packet.arrays)

    def _heard(self, request: StudyRequest, order: RoundOrder) -> None:
        name = request.plan.study.name
        self._once("plan", order.study, order.plan_hash, request.coordinator, name=name)
        self._keep_signed(order)
        if not self._contexts.policy.accepts(request.coordinator):
            self._tell_stranger(request.coordinator)

    def _tell_stranger(self, coordinator: str) -> None:
        """Log and status name a coordinator whose studies are refused for its key alone.

        It may be the right one, with a wrong fingerprint in the policy.
        """
        text = STRANGER.format(coordinator)
        warnings = self._board.get()["warnings"]
        if text in warnings or sum(one.startswith(STRANGER[:40]) for one in warnings) >= _STRANGERS:
            return
        _LOG.warning("a coordinator that the policy does not name was refused: %s", coordinator)
        self._board.set(warnings=[*warnings, text])

    def _approved(self, request: StudyRequest, decision: Decision) -> None:
        state = self._approvals.see(request, manual=decision.approval == "manual").state
        if state == "pending":
            raise Refused(PolicyError(RuleCode.PENDING), "pending")
        if state == "denied":
            raise PolicyError(RuleCode.DENIED)

    def _in_turn(
        self,
        mark: OrderMark,
        what: str,
        order: RoundOrder,
        case: StudyContext,
        packet: TrainerMessage,
    ) -> TrainerMessage:
        self._ready(what)
        mark.write("")
        try:
            with self._turns.turn(order.study) as given_up:
                mark.write("work")
                answer = self._do(what, order, case, packet, given_up)
        except Cancelled:
            raise self._ended() from None
        self._repeated = {key for key in self._repeated if key[0] != order.study}
        return answer

    def _do(
        self,
        what: str,
        order: RoundOrder,
        case: StudyContext,
        packet: TrainerMessage,
        given_up: threading.Event,
    ) -> TrainerMessage:
        self._ready(what)
        self._board.set(
            doing=_DOING[what],
            study=order.study,
            round=order.round,
            step=0,
            steps=0,
            waiting=self._turns.waiting(),
        )

        def going(*, done: bool = False) -> None:
            if given_up.is_set() or done:
                self._check_denied(order)
            if given_up.is_set() and not done:
                raise Cancelled

        try:
            going(done=True)
            answer = self._executor.do(what, order, case, packet, going)
            self._board.carried_out()
            return answer
        finally:
            self._board.set(doing="idle", waiting=self._turns.waiting())

    def _check_denied(self, order: RoundOrder) -> None:
        coordinator = fingerprint(base64.b64decode(order.coordinator))
        if self._approvals.denied(order.study, order.plan_hash, coordinator):
            raise PolicyError(RuleCode.DENIED)

    def _ended(self) -> Refused:
        """Who stops is asked again; who gave an order up knows why."""
        if self._turns.closed:
            return Refused(PolicyError(RuleCode.STOPPED), "busy")
        return Refused(PolicyError(RuleCode.GIVEN_UP), "busy")

    def _ready(self, what: str) -> None:
        if self._exposed and not self._studies.allow_unconfined_connector:
            raise PolicyError(RuleCode.CONNECTOR, fix="See fedward-client doctor, at the site")
        # The officer's command wrote it down itself where the trainer did not answer.
        if self._board.paused or self._approvals.paused:
            raise Refused(PolicyError(RuleCode.PAUSED), "paused")
        policy = self._contexts.policy
        if what == "train" and quiet_until(policy.quiet_hours, policy.local_time(self._now())):
            raise Refused(PolicyError(RuleCode.QUIET), "paused")

    def _refusal(
        self, error: BaseException, round_: int, case: StudyContext | None, study: str = ""
    ) -> TrainerMessage:
        said = self._refuse(error, round_)
        try:
            made = self._contexts.gate(case).check_refusal(said)
            self._tell_refusal(made, study)
        except AuditError:
            site = self._contexts.site
            made = Refusal(site=site, round=round_, kind="error", code=RuleCode.UNWRITTEN)
        if made.kind in ("error", "data", "protocol", "schema"):
            self._board.set(last_error=made.rule)
        elif study and made.kind in ("policy", "budget"):
            self._board.set(last_refusal=f"{study}: {made.rule}")
        return TrainerMessage("refusal", dict(made.to_flat()))

    def _tell_refusal(self, made: Refusal, study: str) -> None:
        """Write a refusal down; of a study that asks again and again and gets the same, once."""
        key = (study, made.round, made.kind, made.rule)
        # Whether the log can be written is seen each time: without it nothing leaves.
        self._audit.append(
            "refused",
            repeated=key in self._repeated,
            kind=made.kind,
            rule=made.rule,
            round=made.round,
            study=study,
        )
        if study and made.kind in _LASTING and len(self._repeated) < _MOST_REPEATED:
            self._repeated.add(key)

    def _keep_signed(self, order: RoundOrder) -> None:
        """Write down what the coordinator signed, the number of sites included: it can be held to
        that later, with its public key alone."""
        if ("order", order.signature) not in self._told:
            self._audit.append(
                "order",
                study=order.study,
                round=order.round,
                task=order.task,
                sites=order.sites,
                signed=signed_bytes(order).decode(),
                signature=order.signature,
            )
            self._told.add(("order", order.signature))

    def _once(self, event: Any, *key: str, **fields: Any) -> None:
        if (event, *key) not in self._told:
            study, plan, coordinator = key
            self._audit.append(event, study=study, plan=plan, coordinator=coordinator, **fields)
            self._told.add((event, *key))

    def _decided(self, order: RoundOrder, decision: Decision) -> None:
        found = "; ".join(f"{one.key}: {one.rule}" for one in decision.violations)
        key = ("decision", order.study, order.plan_hash, hashlib.sha256(found.encode()).hexdigest())
        if key not in self._told:
            self._audit.append(
                "decision",
                study=order.study,
                plan=order.plan_hash,
                allowed=decision.allowed,
                violations=[f"{one.key}: {one.rule}" for one in decision.violations],
            )
            self._told.add(key)
