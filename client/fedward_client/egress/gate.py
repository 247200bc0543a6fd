"""The last look at what a site sends; it believes nothing of what made it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, Final, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.dp.accounting import calibrate, epsilon_spent, steps_per_round
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
)
from fedward.metrics import Counts, SegmentationCounts, counts_from_arrays
from fedward.metrics.private_counts import NoisyTables, PrivateCounts
from fedward.models.arrays import trainable_names
from fedward.models.registry import outline
from fedward.plan.schema import (
    MetricName,
    Modality,
    ModelName,
    Plan,
    Section,
    StrategyName,
)
from fedward.printable import printable
from fedward.protocol import EvaluateOutcome, Record, Refusal, RefusalKind, SiteFacts, TrainOutcome
from fedward.rule_codes import REASONS
from fedward_client.audit.entry import Event
from fedward_client.audit.log import AuditLog
from fedward_client.egress.disclosure import noise_for, release
from fedward_client.policy.decide import DatasetFacts
from fedward_client.policy.settings import Limits
from fedward_client.training.batches import count_steps

# The texts that may leave: fixed sentences, and values made of plan words and short numbers.
#
# Words of a plan come from outside. They are looked up in a set and never become part of a pattern,
# so that the time of a check is bounded by the length of the text alone.

# Four digits cannot hold a date, and no more than a count of patients would.
_NUMBER: Final = re.compile(r"-?[0-9]{1,4}(?:\.[0-9]{1,4})?(?:e[+-][0-9]{2})?")
# A row of short numbers would be a long one.
_ROW: Final = re.compile(r"\d[ ,:()]+-?\d")
_LONG_NUMBER: Final = re.compile(r"\d{5}")
_JOINTS: Final = (" ", ", ", ": ", " (", "), ")
# As long as a refusal's rule and value may be.
_LONGEST_RULE: Final = 500
_LONGEST_VALUE: Final = 200

FALLBACK: Final[dict[RefusalKind, str]] = {
    "policy": "the site's policy does not allow it",
    "pending": rule_codes.PENDING,
    "paused": rule_codes.PAUSED,
    "budget": "the study must stay within the site's privacy budget",
    "privacy": "the site cannot reach the privacy that the plan asks for",
    "data": "the site's data must be able to serve the plan",
    "protocol": "a message must be a known, valid record",
    "busy": "the site must be free to work",
    "error": "an unexpected error stopped the site",
    "arrays": "a site must hold the frozen arrays that an order names",
}

# `#` stands for a number, `@` for a word of the plan or of its schema; at most one `@` a sentence.
SENTENCES: Final = (
    *rule_codes.RULES,
    *FALLBACK.values(),
    *sorted(REASONS),
    rule_codes.MEMORY,
    rule_codes.STOPPED,
    rule_codes.GIVEN_UP,
    rule_codes.UNWRITTEN,
    rule_codes.STOPS_TRAINER,
    # training and evaluation
    "a site needs @ patients to be measured",
    "a site needs training patients",
    "a site must have images that can be used",
    "a site must have images",
    "a site must have patients to train on",
    "a site must have at least two patients to divide",
    "the dataset must hold images that the @ task can use",
    "the dataset must exist",
    "a prepared dataset must stay in its cache",
    "the cache of prepared images must be writable",
    "a cohort must be frozen before it is used",
    "a frozen cohort must not have changed",
    "a frozen cohort must have the task and classes of its dataset in site.toml",
    "the plan has rounds # to #",
    "a private round is trained once",
    "private training needs patients",
    "a private plan needs delta",
    "the cost of a study must be within what can be accounted",
    "the target must be reachable with finite noise",
    "probabilities must lie in # to #",
    "losses must be one finite number, # or more, for each image",
    "targets must be one class index for each image",
    "class indices must lie in # to #",
    # models, plans and records
    "the arrays must cover the whole model",
    "the model has no such array",
    "arrays must be float32",
    "arrays must be finite",
    "start weights must be finite",
    "every pattern must match a parameter of the model",
    "@ cannot take images of this size",
    "@ has four levels",
    "@ has fixed widths",
    "@ has no dropout",
    "the plan does not have the hash that came with it",
    "a plan on the wire must be canonical JSON",
    "a plan on the wire must be an object",
    "a message must carry an order",
    "an order must be signed by its coordinator",
    "an order must come with the task and the model that its coordinator signed",
    "a study is evaluated in the rounds that its plan names",
    "a round of a study is evaluated once, with one model",
    "an evaluation is tried a few times only",
    "an evaluation is answered once",
    "evaluations must stay within the site's budget for them",
    "the audit log must be whole",
    "the device must exist on this machine",
)
_PLAIN: Final = frozenset(one for one in SENTENCES if "@" not in one)
_AROUND_WORD: Final = tuple(tuple(one.split("@")) for one in SENTENCES if "@" in one)
_VALUE_WORDS: Final = (
    "limit",
    "million",
    "MiB",
    "missing",
    "patients",
    "patient",
    "cohort",
    "coordinator",
    "none",
    "for training",
    "no images",
    "epsilon",
    "delta",
    "noise",
    "steps at rate",
)


class AllowList:
    """What may be said about one plan.

    Parameters
    ----------
    plan : Plan or None
        Its own words may come back to the coordinator that wrote them.
    """

    def __init__(self, plan: Plan | None) -> None:
        own = set(_strings(plan.model_dump(mode="json"))) if plan else set()
        self._words = {*_schema_words(), *own, *REASONS} - {""}
        self._items = {*self._words, *_VALUE_WORDS, *_keys()}

    def rule(self, text: str) -> bool:
        """Whether it is one of the fixed sentences."""
        if len(text) > _LONGEST_RULE:
            return False
        if "#" not in text and _NUMBER.sub("#", text) in _PLAIN:
            return True
        return any(
            text.startswith(before)
            and text.endswith(after)
            and text[len(before) : len(text) - len(after)] in self._words
            for before, after in _AROUND_WORD
        )

    def value(self, text: str) -> bool:
        """Whether it is made of known words and short numbers only, joined by ``_JOINTS``."""
        if not text:
            return True
        if len(text) > _LONGEST_VALUE or _ROW.search(text):
            return False
        # Words may hold spaces, so every way to divide the text is followed, each place once.
        ends = [place for place in range(1, len(text)) if text[place] in " ,:)"] + [len(text)]
        starts = {0}
        for start in range(len(text)):
            if start not in starts:
                continue
            for end in ends:
                if end > start and self._is_item(text[start:end]):
                    if text[end:] in ("", ")"):
                        return True
                    starts.update(end + len(j) for j in _JOINTS if text.startswith(j, end))
        return False

    def _is_item(self, text: str) -> bool:
        return text in self._items or _NUMBER.fullmatch(text) is not None


def _strings(value: Any) -> Iterator[str]:
    """Class names and choices; not titles and other prose, nor digests."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("title", "intended_use", "initial_weights"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str) and not _LONG_NUMBER.search(value):
        yield value


def _schema_words() -> set[str]:
    choices = (ModelName, StrategyName, MetricName, Modality)
    words = {word for kind in choices for word in get_args(kind)}
    return {*words, "train", "validation", "test", "classification", "segmentation", "dp-sgd"}


def _keys(model: type[Section] = Plan, prefix: str = "") -> Iterator[str]:
    """Every key of a plan, ``section.key``."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _keys(inner, f"{prefix}{name}.")


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
        raise _wrong("an update without privacy must not state its cost")
    elif outcome.steps != _steps(plan, outcome.images):
        raise _wrong("an update must take the plan's steps")


def _private(plan: Plan, outcome: TrainOutcome) -> None:
    try:
        mechanism = calibrate(plan, outcome.patients)
        each = steps_per_round(plan, mechanism.sampling_rate)
        spent = epsilon_spent(
            mechanism.noise_multiplier,
            mechanism.sampling_rate,
            each * outcome.round,
            plan.privacy.delta or 0.0,
        )
    except FedwardError:
        raise _wrong("what an update cost must be accountable") from None
    ran = (outcome.noise_multiplier, outcome.sampling_rate, outcome.delta, outcome.steps)
    if ran != (mechanism.noise_multiplier, mechanism.sampling_rate, plan.privacy.delta, each):
        raise _wrong("a private update must come from the mechanism that its plan asks for")
    if outcome.epsilon is not None and outcome.epsilon != spent:
        raise _wrong("a private update must state what it cost")


def _steps(plan: Plan, images: int) -> int:
    training = plan.training
    return count_steps(
        images, training.batch_size, epochs=training.local_epochs, steps=training.local_steps
    )


def _wrong(rule: str) -> EgressError:
    return EgressError(rule, fix="Nothing was sent; report it")


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
_FIX: Final = "Nothing was sent; report it"


def expected_arrays(plan: Plan, round_: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of the update of a round: what its stage trains, in order."""
    model = outline(plan)
    names = set(trainable_names(model, plan.stage_of(round_)[0].train))
    return {
        name: (tuple(tensor.shape), "float32")
        for name, tensor in model.state_dict().items()
        if name in names
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
        self._words = AllowList(plan)

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
        noise = noise_for(plan, self._limits, outcome.part)
        if noise is not None:
            return self._noisy(arrays, outcome, noise)
        if (outcome.unit, outcome.noise, outcome.epsilon) != (None, None, None):
            raise _not_so("exact counts must not pass as noisy ones")
        try:
            counts = counts_from_arrays(plan.task, {k: _plain(v) for k, v in arrays.items()})
        except ProtocolError:
            raise _not_so("counts must be those of the plan's task") from None
        self._counted(counts, outcome.images)
        made, withheld = release(counts, self._limits)
        if withheld:
            self._tell("withheld", parts=list(withheld), round=round_)
        if not any(array.any() for array in made.values()):
            raise PolicyError(rule_codes.WITHHELD, fix=rule_codes.FIX)
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
            raise _not_so("counts must have the noise that plan and policy ask for")
        if set(arrays) != set(noise.parts):
            raise _not_so("counts must be the tables that plan and policy name")
        try:
            made = {name: _plain(array) for name, array in arrays.items()}
            PrivateCounts.from_arrays(plan.task, made, noise.unit, float(noise.scale))
        except ProtocolError:
            raise _not_so("counts must be those of the plan's task") from None
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
            ones becomes "other". With the release that runs here.

        Raises
        ------
        EgressError
            They are of another site, or cannot be true of the cohort.
        """
        facts, known = _again(facts), self._cohort()
        if facts.site != self._site:
            raise _not_so("a reply must be of this site")
        for kind, most in (("patients", known.patients), ("images", known.images)):
            parts = [getattr(facts, f"{part}_{kind}") for part in _PARTS]
            _most(max(sum(parts), getattr(facts, kind)), most, kind)
        if len(facts.class_counts) not in (0, len(self._known_plan().task.classes)):
            raise _not_so("a count of classes must be of the plan's classes")
        _most(max(facts.class_counts, default=0), facts.train_images, "images of a class")
        told = {"release": version("fedward"), "dataset": self._dataset}
        return facts.model_copy(update={**told, **self._classes(facts), **self._left_out(facts)})

    def check_refusal(self, refusal: Refusal) -> Refusal:
        """Give a refusal words that may leave; it never raises, a silence would tell less.

        What is not one of the fixed sentences, or holds anything but words of the plan and short
        numbers, is replaced.
        """
        rule, value, replaced = refusal.rule, refusal.value, list[str]()
        if not self._words.rule(rule):
            replaced.append("rule")
            rule, value = FALLBACK.get(refusal.kind, FALLBACK["error"]), ""
        if not self._words.value(value):
            replaced.append("value")
            value = ""
        kind = refusal.kind if refusal.kind in FALLBACK else "error"
        last = self._plan.rounds if self._plan else _MOST_ROUNDS
        round_ = refusal.round if 0 <= refusal.round <= last else 0
        if replaced:
            self._tell("replaced", parts=replaced, round=round_)
        return Refusal(site=self._site, round=round_, kind=kind, rule=rule, value=value)

    def _arrays(self, arrays: Arrays, expected: Expected) -> None:
        if list(arrays) != list(expected):
            raise _not_so("an update must hold exactly the arrays that train, in their order")
        for name, (shape, dtype) in expected.items():
            array = _plain(arrays[name])
            if array.shape != shape or array.dtype != np.dtype(dtype):
                raise _not_so("an update's arrays must have the model's shapes and dtypes")
            if not np.isfinite(array).all():
                raise _not_so("an update must be finite")
        self._size(arrays)

    def _size(self, arrays: Arrays) -> None:
        if sum(array.nbytes for array in arrays.values()) > self._max_bytes:
            limit = f"{self._max_bytes / _MIB:.4g} MiB"
            raise PolicyError(rule_codes.UPLOAD, value=f"limit {limit}", fix=rule_codes.FIX)

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
        if isinstance(counts, SegmentationCounts):
            _most(max(int(counts.counts.max()), int(counts.loss[1])), images, "counts")
        elif counts.images != images:
            raise _not_so("counts must be of the images that the outcome tells of")

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
            raise _not_so("a reply must be of this site")
        if round_ != asked:
            raise _not_so("a reply must be for the round that was asked")

    def _duration(self, value: float) -> float:
        """Seconds of training; whole ones where ε should cover what an update tells."""
        seconds = self._seconds(value)
        return float(math.ceil(seconds)) if self._known_plan().privacy.on else seconds

    def _seconds(self, value: float) -> float:
        _within(value, _LONGEST, "seconds")
        return round(value, min(self._limits.rounding, _DIGITS))

    def _known_plan(self) -> Plan:
        if self._plan is None:
            raise _not_so("without a plan only a refusal can leave")
        return self._plan

    def _cohort(self) -> DatasetFacts:
        if self._facts is None:
            raise _not_so("without a frozen cohort only a refusal can leave")
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
        raise _not_so("a reply must be a valid record") from None


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """A plain array of numbers: a dtype may carry names, a subclass anything."""
    if type(array) is not np.ndarray or array.dtype.kind not in "iuf" or array.dtype.metadata:
        raise _not_so("what is sent must be plain arrays of numbers")
    return array


def _most(value: int, most: int, what: str) -> None:
    if not 0 <= value <= most:
        raise _not_so(f"a reply must not tell of more {what} than there are")


def _within(value: float, most: float, what: str) -> None:
    if not (math.isfinite(value) and 0 <= value <= most):
        raise _not_so(f"a reply must tell of a possible {what}")


def _not_so(rule: str) -> EgressError:
    # Without the value: this error may be on its way out itself.
    return EgressError(rule, fix=_FIX)


# From an error to the refusal that a site may send.

_KINDS: Final[tuple[tuple[type[FedwardError], RefusalKind], ...]] = (
    (PolicyError, "policy"),
    (BudgetError, "budget"),
    (PrivacyError, "privacy"),
    (DataError, "data"),
    (ProtocolError, "protocol"),
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
        What stopped it. Only what was raised on purpose has words of its own.
    site, round_ : str, int
        Whose refusal it is, and in which round (0 outside rounds).
    kind : str, optional
        Whose turn it is; by default that follows from the kind of error.
    """
    if not isinstance(error, FedwardError):
        return Refusal(site=site, round=round_, kind=kind or "error", rule=FALLBACK["error"])
    by_error: RefusalKind = next((k for of, k in _KINDS if isinstance(error, of)), "error")
    chosen = kind or by_error
    value = error.where if error.value is None else str(error.value)
    rule, value = printable(error.rule)[:500], printable(value)[:200]
    return Refusal(site=site, round=round_, kind=chosen, rule=rule, value=value)
