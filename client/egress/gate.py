"""The last look at what a site sends; it believes nothing of what made it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from client.audit.entry import Event
from client.audit.log import AuditLog
from client.data.reasons import REASONS
from client.egress.counts import release
from client.egress.words import FALLBACK, Vocabulary
from client.policy import words
from client.policy.decide import DatasetFacts
from client.policy.settings import Limits
from fedward.errors import EgressError, PolicyError, ProtocolError
from fedward.metrics import counts_from_arrays
from fedward.models import trainable_names
from fedward.models.registry import outline
from fedward.plan.schema import Plan
from fedward.protocol import EvaluateOutcome, Record, Refusal, SiteFacts, TrainOutcome

Arrays = Mapping[str, NDArray[Any]]
Expected = Mapping[str, tuple[tuple[int, ...], str]]
_R = TypeVar("_R", bound=Record)
_MIB: Final = 1 << 20
_SLACK: Final = 1.01  # ε is found by bisection
_LONGEST: Final = 30 * 24 * 3600.0
_FIX: Final = "Nothing was sent; report it"


def expected_arrays(plan: Plan, round_: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of the update of a round: what its stage trains, in order."""
    model = outline(plan)
    names = set(trainable_names(model, plan.stage_of(round_)[0].train))
    every = names == {name for name, _ in model.named_parameters()}
    return {
        name: (tuple(tensor.shape), "float32")
        for name, tensor in model.state_dict().items()
        if every or name in names
    }


class Gate:
    """Lets out what a plan names and the policy allows; raises, and audits, for anything else.

    Parameters
    ----------
    plan : Plan or None
        The study; None before one is known, when only refusals can leave.
    limits : Limits
        What the policy holds the study to.
    site : str
        The site's name, as studies know it.
    facts : DatasetFacts or None
        Of the frozen cohort: no count can pass it.
    max_upload_mib : float
        Largest reply, MiB of tensors.
    audit : AuditLog, optional
        Told of what was withheld or replaced, never of the text itself.
    """

    def __init__(
        self, plan: Plan | None, limits: Limits, *, site: str, facts: DatasetFacts | None,
        max_upload_mib: float, audit: AuditLog | None = None,
    ) -> None:  # fmt: skip
        self._plan, self._limits, self._site, self._facts = plan, limits, site, facts
        self._max_bytes, self._audit = max_upload_mib * _MIB, audit
        self._words = Vocabulary(plan)

    def check_update(
        self, arrays: Arrays, expected: Expected, outcome: TrainOutcome, round_: int
    ) -> TrainOutcome:
        """Check an update.

        Parameters
        ----------
        arrays : mapping
            What was trained.
        expected : mapping
            Name to shape and dtype, in order (see :func:`expected_arrays`).
        outcome : TrainOutcome
            What the update was made of.
        round_ : int
            The round that was ordered.

        Returns
        -------
        TrainOutcome
            The outcome as it may leave: rounded, without a loss that the policy or privacy
            forbids.

        Raises
        ------
        EgressError
            Other arrays, or an outcome that cannot be true of plan and cohort.
        PolicyError
            It is larger than the policy allows.
        """
        self._arrays(arrays, expected)
        return self._outcome(_again(outcome), round_)

    def check_counts(
        self, arrays: Arrays, outcome: EvaluateOutcome, round_: int
    ) -> tuple[dict[str, NDArray[Any]], EvaluateOutcome]:
        """Check the counts of an evaluation.

        Returns
        -------
        tuple
            Counts in which what may not leave is 0, and the outcome rounded.

        Raises
        ------
        EgressError
            They are no counts of the plan's task, or more than the cohort's images.
        PolicyError
            Nothing of them may leave.
        """
        plan, outcome = self._known_plan(), _again(outcome)
        self._same(outcome.site, outcome.round, round_)
        try:
            counts = counts_from_arrays(plan.task, {k: _plain(v) for k, v in arrays.items()})
        except ProtocolError:
            raise _not_so("counts must be those of the plan's task") from None
        self._at_most(outcome.images, self._facts.images if self._facts else 0, "images")
        _within(outcome.seconds, _LONGEST, "seconds")
        self._at_most(int(counts.to_arrays()["loss"][1]), outcome.images, "images")
        made, withheld = release(counts, self._limits)
        if withheld:
            self._tell("withheld", parts=list(withheld), round=round_)
        if not any(array.any() for array in made.values()):
            raise PolicyError(words.WITHHELD, fix=words.FIX)
        self._size(made)
        return made, outcome.model_copy(update={"seconds": self._rounded(outcome.seconds)})

    def check_facts(self, facts: SiteFacts) -> SiteFacts:
        """Check what a site says of itself.

        Returns
        -------
        SiteFacts
            The facts without classes that are too small to be told, and with known reasons only.

        Raises
        ------
        EgressError
            They are of another site, or count more than the cohort holds.
        """
        plan, facts = self._known_plan(), _again(facts)
        if facts.site != self._site:
            raise _not_so("a site must speak of itself")
        if self._facts is not None:
            self._at_most(facts.patients, self._facts.patients, "patients")
            self._at_most(facts.images, self._facts.images, "images")
        changes: dict[str, Any] = {}
        least = self._limits.minimum_count
        if facts.class_counts:
            if len(facts.class_counts) != len(plan.task.classes):
                raise _not_so("class counts must be those of the plan's classes")
            if any(0 < count < least for count in facts.class_counts):
                changes["class_counts"] = ()
                self._tell("withheld", parts=["class_counts"], round=0)
        pairs = list(zip(facts.left_out_reasons, facts.left_out_counts, strict=False))
        known = [(reason, count) for reason, count in pairs if reason in REASONS]
        if len(known) != len(facts.left_out_reasons):
            changes["left_out_reasons"] = tuple(reason for reason, _ in known)
            changes["left_out_counts"] = tuple(count for _, count in known)
            self._tell("replaced", parts=["left_out_reasons"], round=0)
        return facts.model_copy(update=changes)

    def check_refusal(self, refusal: Refusal) -> Refusal:
        """A refusal in words that may leave; any others are replaced by fixed ones."""
        changes: dict[str, Any] = {}
        if refusal.site != self._site:
            changes["site"] = self._site
        if not self._words.rule(refusal.rule):
            changes |= {"rule": FALLBACK[refusal.kind], "value": ""}
        elif not self._words.value(refusal.value):
            changes["value"] = ""
        if changes:
            self._tell("replaced", parts=sorted(changes), round=refusal.round)
        return refusal.model_copy(update=changes)

    def _arrays(self, arrays: Arrays, expected: Expected) -> None:
        if list(arrays) != list(expected):
            raise _not_so("an update must hold exactly the arrays that train, in their order")
        for name, (shape, dtype) in expected.items():
            value = _plain(arrays[name])
            if value.shape != shape or str(value.dtype) != dtype:
                raise _not_so("an update's arrays must have the model's shapes and dtypes")
            if not np.isfinite(value).all():
                raise _not_so("an update must be finite")
        self._size(arrays)

    def _outcome(self, outcome: TrainOutcome, round_: int) -> TrainOutcome:
        plan = self._known_plan()
        self._same(outcome.site, outcome.round, round_)
        if self._facts is not None:
            self._at_most(outcome.patients, self._facts.patients, "patients")
            self._at_most(outcome.images, self._facts.images, "images")
        _within(outcome.seconds, _LONGEST, "seconds")
        _within(outcome.cpu_seconds, _LONGEST * 1024, "seconds")
        told = not plan.privacy.on and "loss" in self._limits.metrics
        loss = outcome.loss
        target = plan.privacy.epsilon or 0.0
        if outcome.epsilon is not None and outcome.epsilon > target * _SLACK:
            raise _not_so("the privacy that was spent must be within the plan's target")
        return outcome.model_copy(
            update={
                "loss": None if loss is None or not told else self._rounded(loss),
                "seconds": self._rounded(outcome.seconds),
                "cpu_seconds": self._rounded(outcome.cpu_seconds),
            }
        )

    def _known_plan(self) -> Plan:
        if self._plan is None:
            raise _not_so("only a refusal may leave before a plan is known")
        return self._plan

    def _same(self, site: str, round_: int, ordered: int) -> None:
        if site != self._site:
            raise _not_so("a site must speak of itself")
        if round_ != ordered:
            raise _not_so("a reply must be for the round that was ordered")

    def _at_most(self, count: int, limit: int, what: str) -> None:
        if self._facts is not None and count > limit:
            raise _not_so(f"{what} must not be more than the cohort has")

    def _size(self, arrays: Arrays) -> None:
        size = sum(value.nbytes for value in arrays.values())
        if size > self._max_bytes:
            raise PolicyError(
                words.UPLOAD, value=f"{size / _MIB:.4g} MiB (limit {self._max_bytes / _MIB:.4g})",
                fix=words.FIX,
            )  # fmt: skip

    def _rounded(self, value: float) -> float:
        return round(float(value), self._limits.rounding)

    def _tell(self, event: Event, **fields: Any) -> None:
        if self._audit is not None:
            self._audit.append(event, **fields)


def _again(record: _R) -> _R:
    """The record validated anew: what made it may have gone round its rules."""
    try:
        return type(record).from_flat({k: v for k, v in vars(record).items() if v is not None})
    except ProtocolError:
        raise _not_so("a record must be a known, valid one") from None


def _plain(value: object) -> NDArray[Any]:
    """An array of numbers and nothing else: no objects, no structures, no subclass."""
    if type(value) is not np.ndarray or value.dtype.kind not in "fiub":
        raise _not_so("arrays must hold numbers")
    return value


def _within(value: float, most: float, what: str) -> None:
    if not (math.isfinite(value) and 0 <= value <= most):
        raise _not_so(f"{what} must be a number that can be")


def _not_so(rule: str) -> EgressError:
    return EgressError(rule, fix=_FIX)
