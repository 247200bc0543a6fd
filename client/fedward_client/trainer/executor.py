"""What an allowed order sets going: prepare, charge, train, keep, let out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from fedward.dp.accounting import Mechanism, calibrate, private_steps_in
from fedward.errors import ProtocolError
from fedward.protocol import EvaluateOutcome, RoundOrder, TrainOutcome
from fedward.rule_codes import RuleCode
from fedward.tensors import Arrays, PackedArrays, pack_bytes
from fedward_client.audit.log import AuditLog
from fedward_client.egress.disclosure import noise_for
from fedward_client.egress.gate import expected_arrays
from fedward_client.ledger import Charge, Ledger, Release, RoundRequest
from fedward_client.ledger.evaluations import EvaluationRequest
from fedward_client.ledger.ledger import Caps
from fedward_client.link.messages import TrainerMessage
from fedward_client.trainer.study_context import Contexts, StudyContext
from fedward_client.training.trainer import Trainer

_T = TypeVar("_T")


class RunningRequest(Protocol):
    """Raises what ends an order."""

    def __call__(self, *, done: bool = False) -> None:
        """Return where it goes on."""


class Trainers(Protocol):
    """The trainers of the studies that are served."""

    def get(self, case: StudyContext) -> Trainer:
        """The study's trainer, as its last order left it; the ledger knows its cohort then."""

    def use(self, case: StudyContext, act: Callable[[Trainer], _T]) -> _T:
        """Do something with it."""

    def keep(
        self, case: StudyContext, order: RoundOrder, shared: Mapping[str, NDArray[Any]]
    ) -> None:
        """Keep the model that was tested, for the hospital's use."""

    def drop(self, case: StudyContext) -> None:
        """Forget what a round that broke off left in a trainer."""

    def end(self, study: str) -> None:
        """Remove what the strategy of a study that has ended kept here."""


class KeptUpdates(Protocol):
    """Released updates, kept so that a repeated order gets the same update."""

    def keep(self, study: str, round_: int, content: bytes) -> str:
        """Keep an update; gives its SHA-256."""

    def again(self, study: str, round_: int, digest: str) -> bytes:
        """The update that was released."""


def _goes_on(*, done: bool = False) -> None:
    """Nothing ends the order."""


class Executor:
    """Does what was allowed, one order at a time.

    Parameters
    ----------
    contexts : Contexts
        For policy and gate.
    trainers : Trainers
        Prepare the images and train.
    ledger : Ledger
        Charged before a round is trained; preparing images releases nothing.
    releases : KeptUpdates
        Where private updates are kept.
    audit : AuditLog or None
        Hears of charges and of what is sent, before it is; None in a simulation.
    """

    def __init__(
        self,
        contexts: Contexts,
        trainers: Trainers,
        ledger: Ledger,
        releases: KeptUpdates,
        audit: AuditLog | None,
    ) -> None:
        self._contexts, self._trainers = contexts, trainers
        self._ledger, self._releases, self._audit = ledger, releases, audit
        self._going: RunningRequest = _goes_on

    def check_going(self) -> None:
        """Raise what ends the order in hand; for who is in the midst of it."""
        self._going()

    def do(
        self,
        what: str,
        order: RoundOrder,
        case: StudyContext,
        packet: TrainerMessage,
        going: RunningRequest = _goes_on,
    ) -> TrainerMessage:
        """Carry out an order.

        Parameters
        ----------
        going : callable
            Raises what ends the order, whenever it is asked; with ``done``, only what ends one
            that is done.
        """
        self._going = going
        act: dict[str, Callable[[RoundOrder, StudyContext, TrainerMessage], TrainerMessage]] = {
            "describe": self._describe,
            "train": self._train,
            "evaluate": self._evaluate,
        }
        answer = act[what](order, case, packet)
        going(done=True)
        self._tell_sent(what, order, answer)
        return answer

    def end(self, study: str) -> None:
        """Remove what the strategy of a study that is denied kept here."""
        self._trainers.end(study)

    def charged(self, packet: TrainerMessage) -> bool:
        """Whether the ledger may hold a charge for the round that an order, valid or not, names."""
        try:
            return self._ledger.charged(packet.record["study"], packet.record["round"])
        except Exception:  # no such words, no number, or a ledger that is closed: nobody knows
            return True

    def _describe(
        self, order: RoundOrder, case: StudyContext, packet: TrainerMessage
    ) -> TrainerMessage:
        trainer = self._trainers.get(case)
        if case.limits.counts == "private":
            test = order.model_copy(update={"part": "test"})
            whole = self._evaluation(test, case, trainer)
            if not order.evaluate_only:
                # All validations cost a patient as much as all tests: the plan's ε of evaluations.
                whole = replace(whole, epsilon=case.plan.metrics.epsilon)
            self._ledger.evaluations.check_study(
                whole,
                self._contexts.policy.max_evaluation_epsilon_per_cohort,
            )
        if case.plan.privacy.on and not order.evaluate_only:
            request, total = self._request(order, case, trainer)
            self._ledger.check_study(request, total, self._caps(case))
        facts = self._contexts.gate(case).check_facts(trainer.describe())
        return TrainerMessage("facts", dict(facts.to_flat()))

    def _train(
        self, order: RoundOrder, case: StudyContext, packet: TrainerMessage
    ) -> TrainerMessage:
        if order.evaluate_only:
            raise ProtocolError(RuleCode.EVALUATE_ONLY, fix="Submit the study with the site")
        if not 1 <= order.round <= case.plan.last_trained_round:
            raise ProtocolError(
                RuleCode.ROUNDS,
                values={"rounds": case.plan.last_trained_round, "round": order.round},
                fix="Order one of these",
            )
        trainer = self._trainers.get(case)
        request, _ = self._request(order, case, trainer)
        self._going()
        charge = self._ledger.reserve(request, self._caps(case))
        if isinstance(charge, Release):
            return self._again(order, charge)
        try:
            self._tell_charge(order, case, request)
            arrays, outcome = self._trainers.use(case, lambda one: one.train(packet.arrays, order))
            outcome = self._contexts.gate(case).check_update(
                arrays, expected_arrays(case.plan, order.round), outcome, order.round
            )
            return self._release(order, case, charge, arrays, outcome)
        except BaseException:
            self._ledger.lose(charge)
            # What trained until it broke must not be where the next round goes on.
            self._trainers.drop(case)
            raise

    def _release(
        self,
        order: RoundOrder,
        case: StudyContext,
        charge: Charge,
        arrays: Arrays,
        outcome: TrainOutcome,
    ) -> TrainerMessage:
        digest = ""
        sent: Mapping[str, NDArray[Any]] = arrays
        if case.plan.privacy.on:
            sent = PackedArrays.of(arrays)  # once: what is kept is what is sent
            digest = self._releases.keep(order.study, order.round, _kept(outcome, sent))
        self._ledger.commit(charge, digest)
        return TrainerMessage("update", dict(outcome.to_flat()), sent)

    def _again(self, order: RoundOrder, release: Release) -> TrainerMessage:
        """The update that was released for this round, byte for byte."""
        content = self._releases.again(order.study, order.round, release.digest)
        return _restored(content, "update", TrainOutcome)

    def _evaluate(
        self, order: RoundOrder, case: StudyContext, packet: TrainerMessage
    ) -> TrainerMessage:
        """Answer one of the plan's evaluations, once; a repeated order gets the kept answer."""
        if order.evaluate_only and (order.round, order.part) != (0, "test"):
            # That one test is what policy, budget and officer were asked about.
            raise ProtocolError(RuleCode.EVALUATE_ONLY, fix="Submit the study with the site")
        if not case.plan.is_evaluated(order.round, order.part):
            raise ProtocolError(
                RuleCode.EVALUATED_ROUNDS,
                values={"round": order.round},
                fix="Order one of these",
            )
        noise = noise_for(case.plan, case.limits, order.part)
        request = self._evaluation(order, case, self._trainers.get(case))
        self._going()
        kept = self._ledger.evaluations.reserve(
            request, self._contexts.policy.max_evaluation_epsilon_per_cohort
        )
        if kept is not None:
            return _restored(kept, "counts", EvaluateOutcome)
        self._tell_evaluation(request)
        counts, outcome = self._trainers.use(
            case, lambda one: one.evaluate(packet.arrays, order, noise)
        )
        made, outcome = self._contexts.gate(case).check_counts(counts, outcome, order.round)
        if order.part == "test":
            # Before the answer is kept: an evaluation that broke off here is done again.
            self._trainers.keep(case, order, packet.arrays)
        self._ledger.evaluations.commit(request, _kept(outcome, made))
        last = 0 if order.evaluate_only else case.plan.tests[-1]
        if order.part == "test" and order.round == last:
            self._trainers.end(order.study)  # the last evaluation of a study
        return TrainerMessage("counts", dict(outcome.to_flat()), made)

    def _evaluation(
        self, order: RoundOrder, case: StudyContext, trainer: Trainer
    ) -> EvaluationRequest:
        private = case.limits.counts == "private"
        return EvaluationRequest(
            order.study,
            order.plan_hash,
            trainer.site.cohort,
            order.round,
            order.part,
            order.arrays,
            case.plan.evaluation_epsilon(order.part) if private else None,
        )

    def _request(
        self, order: RoundOrder, case: StudyContext, trainer: Trainer
    ) -> tuple[RoundRequest, Mechanism]:
        """What the order's round is charged; all rounds where it names none."""
        mechanism, planned = None, 0
        if case.plan.privacy.on:
            whole = calibrate(case.plan, trainer.site.patients_in("train"))
            mechanism, planned = whole, whole.steps
            if order.round:
                steps = private_steps_in(case.plan, whole.sampling_rate, order.round)
                mechanism = replace(whole, steps=steps)
        request = RoundRequest(
            order.study,
            order.plan_hash,
            order.round,
            trainer.site.cohort,
            mechanism,
            case.plan.privacy.delta,
            planned,
        )
        return request, mechanism or Mechanism(1.0, 0.0, 0)

    def _caps(self, case: StudyContext) -> Caps:
        limits = case.limits
        return Caps(
            limits.max_epsilon_per_study,
            self._contexts.policy.max_epsilon_per_cohort,
            self._contexts.policy.max_delta,
        )

    def _tell_evaluation(self, request: EvaluationRequest) -> None:
        if self._audit is None:
            return
        self._audit.append(
            "evaluation",
            study=request.study,
            round=request.round,
            part=request.part,
            epsilon=request.epsilon or 0.0,
            private=request.epsilon is not None,
        )

    def _tell_charge(self, order: RoundOrder, case: StudyContext, request: RoundRequest) -> None:
        if self._audit is None:
            return
        fields: dict[str, Any] = {"study": order.study, "round": order.round, "private": False}
        if request.mechanism is not None and case.plan.privacy.delta is not None:
            delta = case.plan.privacy.delta
            fields |= {
                "private": True,
                "delta": delta,
                "epsilon_of_study": round(self._ledger.epsilon_of_study(order.study, delta), 4),
            }
        self._audit.append("charge", **fields)

    def _tell_sent(self, what: str, order: RoundOrder, answer: TrainerMessage) -> None:
        """Written before the socket sees a byte; what cannot be written is not sent."""
        if self._audit is None:
            return
        digest = hashlib.sha256()
        size = 0
        for name, value in answer.arrays.items():
            digest.update(name.encode() + value.tobytes())
            size += value.nbytes
        self._audit.append(
            "sent",
            study=order.study,
            round=order.round,
            what=what,
            tensors=len(answer.arrays),
            bytes=size,
            sha256=digest.hexdigest(),
        )


def _kept(outcome: TrainOutcome | EvaluateOutcome, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """What is kept of an answer, to be given again."""
    # A byte of text that JSON never holds divides the record from the tensors.
    return outcome.model_dump_json().encode() + b"\0" + pack_bytes(arrays)


def _restored(
    content: bytes, kind: str, outcome: type[TrainOutcome] | type[EvaluateOutcome]
) -> TrainerMessage:
    record, _, tensors = content.partition(b"\0")
    told = outcome.model_validate_json(record)
    return TrainerMessage(kind, dict(told.to_flat()), PackedArrays(tensors))
