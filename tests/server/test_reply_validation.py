"""What a site answers is not trusted: bytes, weights and records of every wrong kind."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedward.flower import identity
from fedward.plan.schema import Plan, Task
from fedward.protocol import EvaluateOutcome, SiteFacts, TrainOutcome
from fedward.tasks.classification import ClassificationCounts
from fedward_server.reply_validation import (
    InvalidReply,
    SiteEvaluation,
    Update,
    read_counts,
    read_update,
)

Make = Callable[..., Any]
EXPECTED = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
SIZES = {
    f"{part}{kind}"
    for part in ("", "train_", "validation_", "test_")
    for kind in ("images", "patients")
}
OUTCOME = TrainOutcome(site="x", round=1, patients=5, images=9, steps=2, seconds=0.1)


@pytest.fixture(autouse=True)
def _identity() -> None:
    identity.become_server()


def reply(**changes: Any) -> Message:
    content: dict[str, Any] = {
        "arrays": ArrayRecord({name: Array(value) for name, value in EXPECTED.items()}),
        "metrics": MetricRecord({"num-examples": 9}),
        "outcome": ConfigRecord(OUTCOME.to_flat()),  # type: ignore[arg-type]
        **changes,
    }
    records = {name: record for name, record in content.items() if record is not None}
    return Message(RecordDict(records), 1, "train")


def with_bytes(data: bytes, shape: tuple[int, ...] = (2, 3), stype: str = "numpy.ndarray") -> Any:
    record = ArrayRecord({name: Array(value) for name, value in EXPECTED.items()})
    record["a"] = Array("float32", shape, stype, data)
    return record


def saved(value: Any, *, archive: bool = False) -> bytes:
    file = BytesIO()
    if archive:
        np.savez(file, value)
    else:
        np.save(file, value)
    return file.getvalue()


def test_a_right_update_is_taken() -> None:
    update = read_update(reply(), "x", 1, EXPECTED)
    assert isinstance(update, Update)
    assert update.outcome == OUTCOME


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b"\x93NUMPY",
        b"PK\x03\x04",
        saved(EXPECTED["a"])[:-3],
        saved(EXPECTED["a"], archive=True),
        saved(np.ones((3, 2), np.float32)),
        saved(np.ones((2, 3))),
        saved(np.array(["x"])),
        saved(np.full((2, 3), np.inf, np.float32)),
        saved(EXPECTED["a"]).replace(b"(2, 3)", b"(9, 9)"),
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    ],
)
def test_bytes_that_are_not_what_the_record_says_are_refused(data: bytes) -> None:
    assert isinstance(read_update(reply(arrays=with_bytes(data)), "x", 1, EXPECTED), InvalidReply)


@pytest.mark.parametrize(
    "changes",
    [
        {"arrays": None},
        {"metrics": None},
        {"outcome": None},
        {"more": ArrayRecord({"a": Array(EXPECTED["a"])})},
        {"more": MetricRecord({"num-examples": 1})},
        {"metrics": MetricRecord({"num-examples": 0})},
        {"metrics": MetricRecord({"num-examples": -9})},
        {"metrics": MetricRecord({"num-examples": float("nan")})},
        {"metrics": MetricRecord({"num-examples": float("inf")})},
        {"metrics": MetricRecord({"num-examples": 10**9})},
        {"metrics": MetricRecord({"num-examples": [9, 9]})},
        {"metrics": MetricRecord({"num-examples": 9, "accuracy": 1.0})},
        {"metrics": MetricRecord({"other": 9})},
        {"outcome": ConfigRecord({"site": "x"})},
        {"outcome": ConfigRecord({**OUTCOME.to_flat(), "path": "/data"})},
        {"arrays": with_bytes(saved(EXPECTED["a"]), stype="torch")},
    ],
)
def test_records_that_would_spoil_the_round_are_refused(changes: dict[str, Any]) -> None:
    bad = read_update(reply(**changes), "x", 1, EXPECTED)
    assert isinstance(bad, InvalidReply)
    assert "/data" not in bad.reason


def counts_reply(part: str = "test", round_: int = 0, site: str = "x", **arrays: Any) -> Message:
    scores, truth = np.array([[0.2, 0.8], [0.7, 0.3]]), np.array([1, 0])
    counts = ClassificationCounts.from_scores(scores, truth)
    outcome = EvaluateOutcome.model_validate(
        {"site": site, "round": round_, "part": part, "images": 2, "seconds": 0.0}
    )
    named = {**counts.to_arrays(), **arrays}
    record = ArrayRecord({n: v if isinstance(v, Array) else Array(v) for n, v in named.items()})
    content = {"counts": record, "outcome": ConfigRecord(outcome.to_flat())}  # type: ignore[arg-type]
    return Message(RecordDict(content), 1, "evaluate")  # type: ignore[arg-type]


def plan_of(make_plan: Make, task: Task) -> Plan:
    made: Plan = make_plan()
    return made.model_copy(update={"task": task})


def test_counts_are_held_against_what_was_asked(make_plan: Make) -> None:
    task = plan_of(make_plan, Task(kind="classification", classes=("no", "yes")))
    assert isinstance(read_counts(counts_reply(), "x", 0, "test", task), SiteEvaluation)
    three = plan_of(make_plan, Task(kind="classification", classes=("a", "b", "c")))
    junk = Array("float64", (2,), "numpy.ndarray", b"junk")
    for message, site, round_, part, for_task in (
        (counts_reply(), "y", 0, "test", task),
        (counts_reply(), "x", 1, "test", task),
        (counts_reply(), "x", 0, "validation", task),
        (counts_reply(), "x", 0, "test", three),
        (counts_reply(loss=junk), "x", 0, "test", task),
        (counts_reply(loss=np.array([np.nan, 2.0])), "x", 0, "test", task),
        (counts_reply(more=np.zeros(2)), "x", 0, "test", task),
    ):
        assert isinstance(read_counts(message, site, round_, part, for_task), InvalidReply)


def facts(**images: int) -> SiteFacts:
    sizes = dict.fromkeys(SIZES, 2)
    return SiteFacts.model_validate({"site": "x", **sizes, **images})


@pytest.mark.parametrize("part", ["validation", "test"])
def test_counts_are_of_no_more_images_than_the_site_described(part: str, make_plan: Make) -> None:
    task = plan_of(make_plan, Task(kind="classification", classes=("no", "yes")))
    honest = ClassificationCounts.from_scores(np.array([[0.2, 0.8]]), np.array([1]))
    swollen = {name: np.asarray(value) * 10**6 for name, value in honest.to_arrays().items()}
    message = counts_reply(part, **swollen)
    bad = read_counts(message, "x", 0, part, task, facts())
    assert isinstance(bad, InvalidReply)
    assert bad.reason.startswith("counts must be of no more images than the site described")
    assert (bad.kind, "1000000 of 2" in bad.reason) == ("invalid", True)
    assert isinstance(read_counts(counts_reply(part), "x", 0, part, task, facts()), SiteEvaluation)
    one = facts(**{f"{part}_images": 1})
    assert isinstance(read_counts(counts_reply(part), "x", 0, part, task, one), InvalidReply)


def test_sums_of_masks_are_of_no_more_images_than_the_site_described(make_plan: Make) -> None:
    task = plan_of(make_plan, Task(kind="segmentation", classes=("lesion",)))
    counts = np.array([[1], [1], [0]], np.int64) * 10**6
    sums = counts.astype(np.float64)
    arrays = {"counts": counts, "sums": sums, "squares": sums, "loss": np.zeros(2)}
    outcome = EvaluateOutcome(site="x", round=0, part="test", images=1, seconds=0.0)
    record = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    content = {"counts": record, "outcome": ConfigRecord(outcome.to_flat())}  # type: ignore[arg-type]
    message = Message(RecordDict(content), 1, "evaluate")  # type: ignore[arg-type]
    assert isinstance(read_counts(message, "x", 0, "test", task, facts()), InvalidReply)
    assert isinstance(read_counts(message, "x", 0, "test", task), SiteEvaluation)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (ErrorCode.MESSAGE_UNAVAILABLE, "no answer in time"),
        (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "an answer must arrive whole"),
        (ErrorCode.CLIENT_APP_CRASHED, "the site's application failed (got code 8)."),
    ],
)
def test_what_the_link_puts_in_place_of_an_answer_is_said_in_words(code: int, reason: str) -> None:
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    update = read_update(Message(Error(code, "x"), reply_to=asked), "north", 1, {})
    assert isinstance(update, InvalidReply)
    assert (update.reason, update.kind) == (reason, "silent")


def test_an_outcome_of_a_later_release_counts_without_what_it_calls_optional() -> None:
    later = {**OUTCOME.to_flat(), "later": "/data", "optional": ["later"]}
    update = read_update(reply(outcome=ConfigRecord(later)), "x", 1, EXPECTED)
    assert isinstance(update, Update)
    assert update.outcome == OUTCOME
