"""Read what sites answered; what is not a valid record costs its site the round, not the study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from fedward.errors import FedwardError, ProtocolError
from fedward.metrics import Counts, counts_from_arrays
from fedward.plan.schema import Task
from fedward.protocol import EvaluateOutcome, Refusal, SiteFacts, TrainOutcome

Shapes = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Update:
    """A valid update of one site."""

    message: Message
    outcome: TrainOutcome
    size: int


@dataclass(frozen=True)
class Measured:
    """Valid counts of one site."""

    outcome: EvaluateOutcome
    counts: Counts


@dataclass(frozen=True)
class Bad:
    """A reply that does not count, and why, in words that name no file and no person."""

    reason: str


def read_facts(message: Message) -> SiteFacts | Bad:
    """What a site said of itself."""
    try:
        return SiteFacts.from_flat(_config(message, "facts"))
    except FedwardError as error:
        return Bad(str(error))


def read_update(message: Message, site: str, round_: int, expected: Shapes) -> Update | Bad:
    """Check an update: its site and round, its names, shapes, dtypes and values."""
    try:
        outcome = TrainOutcome.from_flat(_config(message, "outcome"))
        _same(outcome.site, site, outcome.round, round_)
        return Update(message, outcome, _check_arrays(_record(message, "arrays"), expected))
    except FedwardError as error:
        return Bad(str(error))


def read_counts(message: Message, site: str, task: Task) -> Measured | Bad:
    """Check the counts of an evaluation."""
    try:
        outcome = EvaluateOutcome.from_flat(_config(message, "outcome"))
        _same(outcome.site, site, 0, 0)
        record = _record(message, "counts")
        counts = counts_from_arrays(task, {name: record[name].numpy() for name in record})
        return Measured(outcome, counts)
    except FedwardError as error:
        return Bad(str(error))


def _config(message: Message, key: str) -> dict[str, Any]:
    if message.has_error():
        raise ProtocolError("the site's application failed", value=f"code {message.error.code}")
    content = message.content
    if "refusal" in content.config_records:
        refusal = Refusal.from_flat(dict(content.config_records["refusal"]))
        raise ProtocolError(refusal.rule, value=refusal.value or None)
    if key not in content.config_records:
        raise ProtocolError("a reply must carry its record", value=key)
    return dict(content.config_records[key])


def _record(message: Message, key: str) -> ArrayRecord:
    if key not in message.content.array_records:
        raise ProtocolError("a reply must carry its arrays", value=key)
    return message.content.array_records[key]


def _same(site: str, asked: str, round_: int, asked_round: int) -> None:
    if site != asked:
        raise ProtocolError("a reply must come from the site that was asked", value=site)
    if round_ != asked_round:
        raise ProtocolError("a reply must be for the round that was asked", value=round_)


def _check_arrays(record: ArrayRecord, expected: Shapes) -> int:
    if list(record.keys()) != list(expected.keys()):
        raise ProtocolError("an update must hold exactly the arrays that train, in their order")
    for name, reference in expected.items():
        array = record[name]
        if tuple(array.shape) != reference.shape or array.dtype != str(reference.dtype):
            raise ProtocolError(
                "an update's arrays must have the model's shapes and dtypes", value=name
            )
        if not np.isfinite(array.numpy()).all():
            raise ProtocolError("an update must be finite", value=name)
    return sum(len(array.data) for array in record.values())
