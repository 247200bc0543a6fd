"""The last look at what a site sends; it believes nothing of what made it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedward.compression import decompress
from fedward.dp.accounting import (
    calibrate,
    epsilon_spent,
    private_steps_in,
    private_steps_until,
    steps_in_round,
)
from fedward.errors import (
    BudgetError,
    DataError,
    EgressError,
    FedwardError,
    ModelError,
    PlanError,
    PolicyError,
    PrivacyError,
    ProtocolError,
    SchemaError,
)
from fedward.models.arrays import shared_names
from fedward.models.registry import outline
from fedward.plan.load import SCHEMA_VERSION
from fedward.plan.schema import Plan
from fedward.protocol import EvaluateOutcome, Record, Refusal, RefusalKind, SiteFacts, TrainOutcome
from fedward.rule_codes import FIX, GENERAL, REASONS, RuleCode, Values
from fedward.strategies import array_names
from fedward.tasks.base import Counts
from fedward.tasks.private_counts import NoisyTables, PrivateCounts
from fedward.tasks.registry import counts_from_arrays
from fedward_client.audit.entry import Event
from fedward_client.audit.log import AuditLog
from fedward_client.egress.disclosure import noise_for, release
from fedward_client.policy.decide import DatasetFacts
from fedward_client.policy.settings import Limits

# What an update says of its making follows from the plan and the patients; anything else stays.


def check_cost(plan: Plan, outcome: TrainOutcome) -> None:
    """Work out steps, noise, rate and ε again and compare: a free number could be anybody's.

    Raises
    ------
    EgressError
        One of them is another.
    """
    stated = (outcome.epsilon, outcome.delta, outcome.noise_multiplier, outcome.sampling_rate)
    if plan.privacy.on:
        _private(plan, outcome)
    elif any(value is not None for value in stated):
        raise _not_so(RuleCode.UPDATE_COST)
    elif outcome.steps != steps_in_round(plan, outcome.images, outcome.patients, outcome.round):
        raise _not_so(RuleCode.UPDATE_STEPS)


def _private(plan: Plan, outcome: TrainOutcome) -> None:
    try:
        mechanism = calibrate(plan, outcome.patients)
        each = private_steps_in(plan, mechanism.sampling_rate, outcome.round)
        spent = epsilon_spent(
            mechanism.noise_multiplier,
            mechanism.sampling_rate,
            private_steps_until(plan, mechanism.sampling_rate, outcome.round),
            plan.privacy.delta or 0.0,
        )
    except FedwardError:
        raise _not_so(RuleCode.UPDATE_ACCOUNTABLE) from None
    ran = (outcome.noise_multiplier, outcome.sampling_rate, outcome.delta, outcome.steps)
    if ran != (mechanism.noise_multiplier, mechanism.sampling_rate, plan.privacy.delta, each):
        raise _not_so(RuleCode.UPDATE_MECHANISM)
    if outcome.epsilon is not None and outcome.epsilon != spent:
        raise _not_so(RuleCode.UPDATE_EPSILON)


Arrays = Mapping[str, NDArray[Any]]
Expected = Mapping[str, tuple[tuple[int, ...], str]]
_R = TypeVar("_R", bound=Record)
_MIB: Final = 1 << 20
_LONGEST: Final = 30 * 24 * 3600.0
_MOST_LOSS: Final = 1e6
_MOST_LEFT_OUT: Final = 10_000_000
_MOST_ROUNDS: Final = 9999
_DIGITS: Final = 3
_PARTS: Final = ("train", "validation", "test")
_RECORDS: Final = (TrainOutcome, EvaluateOutcome, SiteFacts)
OTHER: Final = "other"
# What a site tells of its software.
_RUNS: Final = {"release": version("fedward"), "plan_schema": SCHEMA_VERSION}


def expected_arrays(plan: Plan, round_: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of the update of a round: what its stage trains, in order, and
    then what the plan's strategy declares to send besides."""
    model = outline(plan)
    names = set(shared_names(model, plan, round_))
    trained = {
        name: (tuple(tensor.shape), "float32")
        for name, tensor in model.state_dict().items()
        if name in names
    }
    besides = array_names(plan.strategy.spec.sent, trained)
    return trained | {name: trained[of] for name, (_, of) in besides.items()}


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
    dataset : str
        Its name, where the policy lets it be told.
    """

    def __init__(
        self,
        plan: Plan | None,
        limits: Limits,
        *,
        site: str,
        facts: DatasetFacts | None,
        max_upload_mib: float,
        audit: AuditLog | None = None,
        dataset: str = "",
    ) -> None:
        self._plan, self._limits, self._site, self._facts = plan, limits, site, facts
        self._max_bytes, self._audit = max_upload_mib * _MIB, audit
        self._dataset = dataset

    def check_update(
        self, arrays: Arrays, expected: Expected, outcome: TrainOutcome, round_: int
    ) -> TrainOutcome:
        """Check an update.

        Parameters
        ----------
        arrays : mapping
            What was trained, as it travels.
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
        self._arrays(self._decompressed(arrays, expected, round_), expected)
        return self._outcome(_again(outcome), round_)

    def _decompressed(self, arrays: Arrays, expected: Expected, round_: int) -> Arrays:
        """What the aggregator makes of a compressed update; any other as it is."""
        how = self._known_plan().compression_of(round_)
        if how is None:
            return arrays
        shapes = {name: shape for name, (shape, _) in expected.items()}
        try:
            return decompress(how, {n: _plain(one) for n, one in arrays.items()}, shapes)
        except ProtocolError:
            raise _not_so(RuleCode.UPDATE_COMPRESSED) from None

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
        noise = noise_for(plan, self._limits, outcome.part)
        if noise is not None:
            return self._noisy(arrays, outcome, noise)
        if (outcome.unit, outcome.noise, outcome.epsilon) != (None, None, None):
            raise _not_so(RuleCode.COUNTS_EXACT)
        try:
            counts = counts_from_arrays(plan.task, {k: _plain(v) for k, v in arrays.items()})
        except ProtocolError:
            raise _not_so(RuleCode.COUNTS_TASK) from None
        self._counted(counts, outcome.images)
        made, withheld = release(counts, self._limits)
        if withheld:
            self._tell("withheld", parts=list(withheld), round=round_)
        if not any(array.any() for array in made.values()):
            raise PolicyError(RuleCode.WITHHELD, fix=FIX)
        self._size(made)
        return made, outcome.model_copy(update={"seconds": self._seconds(outcome.seconds)})

    def _noisy(
        self, arrays: Arrays, outcome: EvaluateOutcome, noise: NoisyTables
    ) -> tuple[dict[str, NDArray[Any]], EvaluateOutcome]:
        """Tables with noise: those that plan and policy name, with the noise that they ask for."""
        plan = self._known_plan()
        epsilon = plan.evaluation_epsilon(outcome.part) if noise.by_patient else None
        stated = (outcome.unit, outcome.noise, outcome.epsilon)
        if stated != (noise.unit, float(noise.scale), epsilon):
            raise _not_so(RuleCode.COUNTS_NOISE)
        if set(arrays) != set(noise.parts):
            raise _not_so(RuleCode.COUNTS_TABLES)
        try:
            made = {name: _plain(array) for name, array in arrays.items()}
            PrivateCounts.from_arrays(plan.task, made, noise.unit, float(noise.scale))
        except ProtocolError:
            raise _not_so(RuleCode.COUNTS_TASK) from None
        _most(outcome.images, self._cohort().images, "images")
        self._size(made)
        # Weights can make a single patient's image slow to compute: the noise covers no time.
        return made, outcome.model_copy(update={"seconds": 0.0})

    def check_facts(self, facts: SiteFacts) -> SiteFacts:
        """Check what the site says of itself.

        Returns
        -------
        SiteFacts
            Without small counts of classes and of reasons; a reason that is not one of the fixed
            ones becomes "other". With the release that runs here and its schema version.

        Raises
        ------
        EgressError
            They are of another site, or cannot be true of the cohort.
        """
        facts, known = _again(facts), self._cohort()
        if facts.site != self._site:
            raise _not_so(RuleCode.REPLY_SITE)
        for kind, most in (("patients", known.patients), ("images", known.images)):
            parts = [getattr(facts, f"{part}_{kind}") for part in _PARTS]
            _most(max(sum(parts), getattr(facts, kind)), most, kind)
        if len(facts.class_counts) not in (0, len(self._known_plan().task.classes)):
            raise _not_so(RuleCode.COUNTS_CLASSES)
        _most(max(facts.class_counts, default=0), facts.train_images, "images of a class")
        told = {**_RUNS, "dataset": self._dataset}
        return facts.model_copy(update={**told, **self._classes(facts), **self._left_out(facts)})

    def check_refusal(self, refusal: Refusal) -> Refusal:
        """Give a refusal a code that may leave; it never raises, a silence would tell less.

        Codes that are none, and values that the code does not declare, are replaced by what the
        refusal's kind says in general.
        """
        kind = refusal.kind if refusal.kind in GENERAL else "error"
        last = self._plan.last_round if self._plan else _MOST_ROUNDS
        round_ = refusal.round if 0 <= refusal.round <= last else 0
        code, values = refusal.code, refusal.values
        try:
            code = RuleCode[code.name]
            values = code.checked(values)
        except (AttributeError, LookupError, TypeError, ValueError):
            code, values = GENERAL[kind], {}
            self._tell("replaced", parts=["code"], round=round_)
        runs: Mapping[str, Any] = _RUNS if kind == "schema" else {}
        return Refusal(site=self._site, round=round_, kind=kind, code=code, values=values, **runs)

    def _arrays(self, arrays: Arrays, expected: Expected) -> None:
        if list(arrays) != list(expected):
            raise _not_so(RuleCode.UPDATE_ARRAYS)
        for name, (shape, dtype) in expected.items():
            array = _plain(arrays[name])
            if array.shape != shape or array.dtype != np.dtype(dtype):
                raise _not_so(RuleCode.UPDATE_SHAPES)
            if not np.isfinite(array).all():
                raise _not_so(RuleCode.UPDATE_FINITE)
        self._size(arrays)

    def _size(self, arrays: Arrays) -> None:
        if sum(array.nbytes for array in arrays.values()) > self._max_bytes:
            size = sum(array.nbytes for array in arrays.values())
            values = {"asked": size / _MIB, "limit": self._max_bytes / _MIB}
            raise PolicyError(RuleCode.UPLOAD, values=values, fix=FIX)

    def _outcome(self, outcome: TrainOutcome, round_: int) -> TrainOutcome:
        self._same(outcome.site, outcome.round, round_)
        known = self._cohort()
        _most(outcome.patients, known.patients, "patients")
        _most(outcome.images, known.images, "images")
        check_cost(self._known_plan(), outcome)
        changes: dict[str, Any] = {
            "seconds": self._duration(outcome.seconds),
            "cpu_seconds": self._duration(outcome.cpu_seconds),
            "loss": self._loss(outcome),
        }
        return outcome.model_copy(update=changes)

    def _loss(self, outcome: TrainOutcome) -> float | None:
        if outcome.loss is None:
            return None
        # Exact, on training patients: a release that ε would not cover.
        private, limits = self._known_plan().privacy.on, self._limits
        few = outcome.patients < limits.minimum_count or outcome.images < limits.minimum_count
        if private or few or "loss" not in limits.metrics:
            self._tell("withheld", parts=["loss"], round=outcome.round)
            return None
        return round(min(max(outcome.loss, -_MOST_LOSS), _MOST_LOSS), limits.rounding)

    def _counted(self, counts: Counts, images: int) -> None:
        _most(images, self._cohort().images, "images")
        if not counts.are_of(images):
            raise _not_so(RuleCode.COUNTS_IMAGES)

    def _classes(self, facts: SiteFacts) -> dict[str, Any]:
        # The plan divides the patients: two plans that differ a little would tell a label.
        exact = self._limits.counts != "private"
        small = any(0 < count < self._limits.minimum_count for count in facts.class_counts)
        if not facts.class_counts or (exact and not small):
            return {}
        self._tell("withheld", parts=["class_counts"], round=0)
        return {"class_counts": ()}

    def _left_out(self, facts: SiteFacts) -> dict[str, Any]:
        totals: dict[str, int] = {}
        for reason, count in zip(facts.left_out_reasons, facts.left_out_counts, strict=False):
            fixed = reason if reason in REASONS else OTHER
            totals[fixed] = totals.get(fixed, 0) + count
        if OTHER in totals:
            self._tell("replaced", parts=["left_out_reasons"], round=0)
        kept = {name: n for name, n in totals.items() if n >= self._limits.minimum_count}
        _most(max(kept.values(), default=0), _MOST_LEFT_OUT, "left out")
        return {"left_out_reasons": tuple(kept), "left_out_counts": tuple(kept.values())}

    def _same(self, site: str, round_: int, asked: int) -> None:
        if site != self._site:
            raise _not_so(RuleCode.REPLY_SITE)
        if round_ != asked:
            raise _not_so(RuleCode.REPLY_ROUND)

    def _duration(self, value: float) -> float:
        """Seconds of training; whole ones where ε should cover what an update tells."""
        seconds = self._seconds(value)
        return float(math.ceil(seconds)) if self._known_plan().privacy.on else seconds

    def _seconds(self, value: float) -> float:
        _within(value, _LONGEST, "seconds")
        return round(value, min(self._limits.rounding, _DIGITS))

    def _known_plan(self) -> Plan:
        if self._plan is None:
            raise _not_so(RuleCode.REPLY_PLAN)
        return self._plan

    def _cohort(self) -> DatasetFacts:
        if self._facts is None:
            raise _not_so(RuleCode.REPLY_COHORT)
        return self._facts

    def _tell(self, event: Event, **fields: Any) -> None:
        if self._audit is not None:
            self._audit.append(event, **fields)


def _again(record: _R) -> _R:
    """The record, validated anew, and no subclass of it."""
    try:
        kind: type[_R] = next(k for k in _RECORDS if isinstance(record, k))  # type: ignore[assignment]
        return kind.from_flat({k: v for k, v in vars(record).items() if v is not None})
    except (ProtocolError, StopIteration, AttributeError):
        raise _not_so(RuleCode.REPLY_RECORD) from None


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """A plain array of numbers: a dtype may carry names, a subclass anything."""
    if type(array) is not np.ndarray or array.dtype.kind not in "iuf" or array.dtype.metadata:
        raise _not_so(RuleCode.UPDATE_PLAIN)
    return array


def _most(value: int, most: int, what: str) -> None:
    if not 0 <= value <= most:
        raise _not_so(RuleCode.REPLY_MOST, {"what": what})


def _within(value: float, most: float, what: str) -> None:
    if not (math.isfinite(value) and 0 <= value <= most):
        raise _not_so(RuleCode.REPLY_POSSIBLE, {"what": what})


def _not_so(code: RuleCode, values: Values | None = None) -> EgressError:
    # Without what was found: this error may be on its way out itself.
    return EgressError(code, values=values, fix="Nothing was sent; report it")


# From an error to the refusal that a site may send.

_KINDS: Final[tuple[tuple[type[FedwardError], RefusalKind], ...]] = (
    (PolicyError, "policy"),
    (BudgetError, "budget"),
    (PrivacyError, "privacy"),
    (DataError, "data"),
    (ProtocolError, "protocol"),
    (SchemaError, "schema"),
    (PlanError, "protocol"),
    (ModelError, "protocol"),
)


def refusal_for(
    error: BaseException, site: str, round_: int, kind: RefusalKind | None = None
) -> Refusal:
    """What a site says in place of a reply; give it to :meth:`Gate.check_refusal`.

    Parameters
    ----------
    error : BaseException
        What stopped it. Only what was raised on purpose may have a code of its own.
    site, round_ : str, int
        Whose refusal it is, and in which round (0 outside rounds).
    kind : str, optional
        Whose turn it is; by default that follows from the kind of error.
    """
    if not isinstance(error, FedwardError):
        return Refusal(site=site, round=round_, kind=kind or "error", code=RuleCode.ERROR)
    by_error: RefusalKind = next((k for of, k in _KINDS if isinstance(error, of)), "error")
    return Refusal.of(error, site=site, round_=round_, kind=kind or by_error)
