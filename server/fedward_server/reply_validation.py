"""Read what sites answered; what is not a valid record costs its site the round, not the study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from numpy.typing import NDArray

from fedward.compression import decompress, moved
from fedward.dp.accounting import steps_in_round
from fedward.errors import FedwardError, ProtocolError
from fedward.flower.errors import ErrorCode
from fedward.flower.grid import SharedArray
from fedward.plan.schema import Plan
from fedward.protocol import EvaluateOutcome, Refusal, SiteFacts, TrainOutcome
from fedward.rule_codes import RuleCode
from fedward.strategies import array_names
from fedward.tasks.base import agree
from fedward.tasks.private_counts import (
    MOST_COUNT_NOISE,
    AnyCounts,
    PrivateCounts,
    noise_scale,
)
from fedward.tasks.registry import counts_from_arrays
from fedward_strategies.contribution import Sketch

Shapes = Mapping[str, NDArray[Any]]
_PARTS: Final = ("train", "validation", "test")


@dataclass(frozen=True)
class Update:
    """A valid update of one site; ``message`` is None once its arrays are folded in.

    ``size`` is in bytes, ``norm`` the L2 norm of the difference to the model that was sent, and
    ``besides`` that of what the strategy has a site send besides the update. ``sketch`` is what is
    kept of that difference (see :mod:`fedward_strategies.contribution`), where it is asked for.
    """

    message: Message | None
    outcome: TrainOutcome
    size: int
    weight: float
    norm: float = 0.0
    besides: float = 0.0
    sketch: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class SiteEvaluation:
    """Valid counts of one site."""

    outcome: EvaluateOutcome
    counts: AnyCounts


@dataclass(frozen=True)
class InvalidReply:
    """A reply that does not count, and why, in words that name no file and no person.

    ``kind`` is the refusal's, or ``invalid`` for an answer that breaks a rule; ``outcome`` says
    what an update was made of that arrived and does not count; ``uncharged``, that the site's
    ledger holds no charge for the round. ``diverged`` tells of what training that diverges gives,
    at an honest site too: values that are not finite, or an update that is out of all proportion.
    ``release`` and ``plan_schema`` are those of a site whose release cannot read the plan.
    """

    reason: str
    kind: str = "invalid"
    outcome: TrainOutcome | None = None
    uncharged: bool = False
    diverged: bool = False
    release: str = ""
    plan_schema: int | None = None


_BESIDES: Final = "what is sent besides an update must be in proportion to the model"
# What a site refuses, or what is refused of it, where training diverged.
_TOO_FAR: Final = "an update must lie within a distance of the model"
_DIVERGED: Final = frozenset(
    {
        RuleCode.UPDATE_FINITE,
        RuleCode.ARRAYS_FINITE,
        RuleCode.LOSSES,
        RuleCode.PROBABILITIES,
        _BESIDES,
    }
)


def lacks_arrays(message: Message) -> bool:
    """Whether a site asks for the frozen arrays that an order only named."""
    if not message.has_content():
        return False
    refusal = message.content.config_records.get("refusal")
    return refusal is not None and refusal.get("kind") == "arrays"


def read_facts(message: Message) -> SiteFacts | InvalidReply:
    """What a site said of itself."""
    try:
        facts = SiteFacts.from_flat(_config(message, "facts"))
        for what in ("patients", "images"):
            parts = sum(getattr(facts, f"{part}_{what}") for part in _PARTS)
            if parts > getattr(facts, what):
                raise ProtocolError(
                    f"a site's parts must hold no more {what} than the site",
                    value=f"{parts} of {getattr(facts, what)}",
                )
        for part in _PARTS:
            images, patients = getattr(facts, f"{part}_images"), getattr(facts, f"{part}_patients")
            if images < patients:
                raise ProtocolError(
                    "a site's part must hold an image for each of its patients",
                    value=f"{images} of {patients} in {part}",
                )
        return facts
    except FedwardError as error:
        return _bad(error)


def read_update(
    message: Message,
    site: str,
    round_: int,
    expected: Shapes,
    plan: Plan | None = None,
    facts: SiteFacts | None = None,
    most_change: float = math.inf,
    sketch: Sketch | None = None,
) -> Update | InvalidReply:
    """Check an update.

    Its site and round, its weight, its steps, its names, shapes, dtypes and values; that it claims
    no more patients and images than the site described, and lies within a distance of the model.

    Parameters
    ----------
    message : Message
        The reply.
    site : str
        Who was asked.
    round_ : int
        For which round.
    expected : mapping
        The arrays that were sent.
    plan : Plan or None
        What a weight counts, how many steps there are, and what is sent besides the update; None:
        a weight counts patients or images, steps are any, and nothing is sent besides.
    facts : SiteFacts or None
        What the site said of itself.
    most_change : float
        Largest L2 norm of the change, in units of the model's own (at least 1).
    sketch : Sketch or None
        Takes the change in.
    """
    outcome = None
    try:
        told = TrainOutcome.from_flat(_config(message, "outcome"))
        _same(told.site, site, told.round, round_)
        outcome = told
        besides = plan.strategy.spec.sent if plan else {}
        names = array_names(besides, expected)
        size = _decompress(message, round_, expected, plan)
        record = _record(message, "arrays")
        norm, other = _check_arrays(record, expected, names, most_change, sketch)
        weight = _check_weight(message, outcome, plan.strategy.weighting if plan else None)
        if plan is not None:
            _check_steps(outcome, plan)
        _check_claims(outcome, facts)
        size = size or sum(value.nbytes for value in expected.values()) * (1 + len(besides))
        kept = None if sketch is None else sketch.kept()
        return Update(message, outcome, size, weight, norm, other, kept)
    except FedwardError as error:
        return replace(_bad(error), outcome=outcome)


def _decompress(message: Message, round_: int, expected: Shapes, plan: Plan | None) -> int:
    """Put the arrays that a compressed update stands for in its place; gives its bytes, or 0."""
    how = plan.compression_of(round_) if plan else None
    if how is None:
        return 0
    sent = {name: _decoded(array) for name, array in _record(message, "arrays").items()}
    shapes = {name: value.shape for name, value in expected.items()}
    arrays = moved(expected, decompress(how, sent, shapes))
    made = ArrayRecord()
    for name, value in arrays.items():
        made[name] = SharedArray(value)
    message.content["arrays"] = made
    return sum(value.nbytes for value in sent.values())


def read_counts(
    message: Message,
    site: str,
    round_: int,
    part: str,
    plan: Plan,
    facts: SiteFacts | None = None,
) -> SiteEvaluation | InvalidReply:
    """Check the counts of an evaluation; of no more images than the site described.

    Parameters
    ----------
    message : Message
        The reply.
    site, round_, part : str, int, str
        Who was asked, for which round, to measure on which part.
    plan : Plan
        What kind of counts there must be, and with which noise.
    facts : SiteFacts or None
        What the site said of itself.
    """
    try:
        outcome = EvaluateOutcome.from_flat(_config(message, "outcome"))
        _same(outcome.site, site, outcome.round, round_)
        if outcome.part != part:
            raise ProtocolError("a reply must be for the part that was asked", value=outcome.part)
        record = _record(message, "counts")
        arrays = {name: _decoded(array) for name, array in record.items()}
        counts: AnyCounts
        if outcome.unit is not None and outcome.noise is not None:
            _check_noise(outcome, plan, arrays)
            counts = PrivateCounts.from_arrays(
                plan.task, arrays, outcome.unit, outcome.noise, outcome.epsilon
            )
        else:
            counts = counts_from_arrays(plan.task, arrays)
        _check_counted(counts, part, facts)
        return SiteEvaluation(outcome, counts)
    except FedwardError as error:
        return _bad(error)


# What the link puts in place of an answer.
_NO_ANSWER: Final = {
    ErrorCode.MESSAGE_UNAVAILABLE: "no answer in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "an answer must arrive whole",
}


class _Refused(ProtocolError):
    """A site's refusal on its way to whoever asked."""

    kind = "error"
    uncharged = False
    release = ""
    plan_schema: int | None = None


def _bad(error: FedwardError) -> InvalidReply:
    diverged = error.code in _DIVERGED or error.rule == _TOO_FAR
    if not isinstance(error, _Refused):
        return InvalidReply(str(error), "invalid", diverged=diverged)
    silent = error.rule in _NO_ANSWER.values()
    reason = error.rule if silent else str(error)
    return InvalidReply(
        reason,
        error.kind,
        uncharged=error.uncharged,
        diverged=diverged,
        release=error.release,
        plan_schema=error.plan_schema,
    )


def _config(message: Message, key: str) -> dict[str, Any]:
    if message.has_error():
        known = _NO_ANSWER.get(message.error.code)
        failed = _Refused(
            known or "the site's application failed",
            value=None if known else f"code {message.error.code}",
        )
        failed.kind = "silent"
        raise failed
    content = message.content
    if "refusal" in content.config_records:
        refusal = Refusal.from_flat(dict(content.config_records["refusal"]))
        refused = _Refused(refusal.code, values=refusal.values)
        refused.kind, refused.uncharged = refusal.kind, refusal.charged is False
        refused.release, refused.plan_schema = refusal.release or "", refusal.plan_schema
        raise refused
    if key not in content.config_records:
        raise ProtocolError("a reply must carry its record", value=key)
    return dict(content.config_records[key])


def _record(message: Message, key: str) -> ArrayRecord:
    # Flower's strategies refuse the whole round when one reply carries a record too many.
    if list(message.content.array_records) != [key]:
        raise ProtocolError("a reply must carry its arrays, and only these", value=key)
    return message.content.array_records[key]


def _same(site: str, asked: str, round_: int, asked_round: int) -> None:
    if site != asked:
        raise ProtocolError("a reply must come from the site that was asked", value=site)
    if round_ != asked_round:
        raise ProtocolError("a reply must be for the round that was asked", value=round_)


def _check_weight(message: Message, outcome: TrainOutcome, weighting: str | None) -> float:
    records = {name: dict(record) for name, record in message.content.metric_records.items()}
    weight = records.get("metrics", {}).get("num-examples")
    if list(records) != ["metrics"] or list(records["metrics"]) != ["num-examples"]:
        raise ProtocolError("an update must carry its weight, and nothing else to average")
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
        raise ProtocolError("an update's weight must be a number above 0")
    counted = [getattr(outcome, one) for one in ("patients", "images") if weighting in (None, one)]
    if weight not in counted:
        raise ProtocolError("an update's weight must be what it was made of")
    return float(weight)


def _check_steps(outcome: TrainOutcome, plan: Plan) -> None:
    """A strategy that divides an update by its steps would count one that claims few for many."""
    asked = steps_in_round(plan, outcome.images, outcome.patients, outcome.round)
    if outcome.steps != asked:
        raise ProtocolError(
            "an update must be made of the steps that the plan asks for",
            value=f"{outcome.steps} in place of {asked}",
        )


def _check_claims(outcome: TrainOutcome, facts: SiteFacts | None) -> None:
    if facts is None:
        return
    for what in ("patients", "images"):
        claimed, described = getattr(outcome, what), getattr(facts, f"train_{what}")
        if claimed > described:
            raise ProtocolError(
                f"an update must not claim more {what} than its site described",
                value=f"{claimed} of {described}",
            )


def _check_noise(outcome: EvaluateOutcome, plan: Plan, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Hold what a site says of its noise against the plan: what is believed of it is believed of
    how many images there may be, and how far off the figures are."""
    images = plan.metrics.images_per_patient if outcome.epsilon is not None else 1
    spec = plan.task.spec
    unit, known = spec.unit * images, set(arrays) <= set(spec.table_shapes(plan.task))
    agree(known and outcome.unit == unit, "counts must have the unit that the plan asks for")
    if outcome.epsilon is None:
        most = MOST_COUNT_NOISE * unit * spec.sensitivity(plan.task, arrays)
        agree((outcome.noise or 0.0) <= most, "counts must have a noise that a policy can ask for")
        return
    asked = plan.evaluation_epsilon(outcome.part)
    scale = float(noise_scale(plan.task, arrays, unit, asked)) if arrays else 0.0
    same = (outcome.epsilon, outcome.noise) == (asked, scale)
    agree(same, "counts must have the noise that the plan asks for")


def _check_counted(counts: AnyCounts, part: str, facts: SiteFacts | None) -> None:
    described = getattr(facts, f"{part}_images", counts.images)
    slack = counts.images_deviation * 8 if isinstance(counts, PrivateCounts) else 0.0
    if counts.images > described + slack:
        raise ProtocolError(
            "counts must be of no more images than the site described",
            value=f"{counts.images} of {described}",
        )


def _check_arrays(
    record: ArrayRecord,
    expected: Shapes,
    besides: Mapping[str, tuple[str, str]],
    most_change: float,
    sketch: Sketch | None,
) -> tuple[float, float]:
    if list(record.keys()) != [*expected, *besides]:
        raise ProtocolError("an update must hold exactly the arrays that train, in their order")
    change = size = other = 0.0
    shapes = dict(expected) | {name: expected[of] for name, (_, of) in besides.items()}
    for name, reference in shapes.items():
        value = _decoded(record[name])
        if value.shape != reference.shape or value.dtype != reference.dtype:
            raise ProtocolError(
                "an update's arrays must have the model's shapes and dtypes", value=name
            )
        if not np.isfinite(value).all():
            raise ProtocolError(RuleCode.UPDATE_FINITE, value=name)
        if name in besides:
            other += _square(value.astype(np.float64))
            continue
        moved = np.subtract(value, reference, dtype=np.float64)
        change += _square(moved)
        if sketch is not None:
            sketch.add(moved)
        size += _square(reference.astype(np.float64))
    if math.sqrt(change) > most_change * max(1.0, math.sqrt(size)):
        raise ProtocolError(
            _TOO_FAR,
            value=f"{math.sqrt(change) / max(1.0, math.sqrt(size)):.3g} times the model's norm",
        )
    if math.sqrt(other) > most_change * max(1.0, math.sqrt(size)):
        raise ProtocolError(_BESIDES)
    return math.sqrt(change), math.sqrt(other)


def _square(values: NDArray[np.float64]) -> float:
    return float(np.vdot(values, values))


def _decoded(array: Array) -> NDArray[Any]:
    try:
        value: object = array.numpy()
    except Exception as error:  # bytes from outside break this parser in undocumented ways
        raise ProtocolError("an array must be readable", value=type(error).__name__) from error
    if not isinstance(value, np.ndarray):
        raise ProtocolError("an array must be readable", value="an archive")
    return value
