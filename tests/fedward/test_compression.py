"""Compressed updates against arithmetic of others: torch's bfloat16, whole numbers, a full sort."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedward.compression import (
    COMPRESSED,
    compress,
    compress_model,
    compressed_size,
    decompress,
    decompress_model,
    model_size,
    moved,
)
from fedward.errors import ModelError, ProtocolError
from fedward.plan.schema import Compression

SHAPES = {"conv.weight": (5, 3, 3), "conv.bias": (5,), "scale": ()}
SIZES = [45, 5, 1]
TOTAL = 51
Arrays = dict[str, NDArray[Any]]
METHODS = [
    Compression(method="bfloat16"),
    Compression(method="int8"),
    Compression(method="int6"),
    Compression(method="int5"),
    Compression(method="int3"),
    Compression(method="int4"),
    Compression(method="int4", rounding="stochastic"),
    Compression(method="top-k", share=0.1),
]
IDS = ["bfloat16", "int8", "int6", "int5", "int3", "int4", "int4 stochastic", "top-k"]
BFLOAT16, INT8, INT6, INT5, INT3, INT4, _, TOPK = METHODS
each = pytest.mark.parametrize("how", METHODS, ids=IDS)


def arrays(seed: int, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {n: np.asarray(scale * rng.normal(size=s), np.float32) for n, s in SHAPES.items()}


def flat(of: Arrays) -> NDArray[np.float32]:
    return np.concatenate([of[name].ravel() for name in SHAPES])


def sent(how: Compression, update: Arrays, model: Arrays | None = None) -> Arrays:
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    return compress(how, model or zeros, update, {}, np.random.default_rng(3))[0]


def got(how: Compression, content: bytes | NDArray[Any]) -> Arrays:
    made = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content
    return decompress(how, {COMPRESSED: made}, SHAPES)


def expected(how: Compression, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """What arrives, worked out number by number, without chance."""
    if how.method == "bfloat16":
        return torch.from_numpy(values).bfloat16().double().numpy()
    if how.method == "top-k":
        first = sorted(range(TOTAL), key=lambda i: -abs(values[i]))[: math.ceil(0.1 * TOTAL)]
        kept = torch.from_numpy(values).bfloat16().double().numpy()
        return np.array([kept[i] if i in first else 0.0 for i in range(TOTAL)])
    most = {"int8": 127, "int6": 31, "int5": 15, "int4": 7, "int3": 3}[how.method]
    found: list[float] = []
    for part in np.split(values.astype(np.float64), np.cumsum(SIZES)[:-1]):
        step = float(np.float32(max(abs(part)) / most))
        found += [step * round(v / step) if step else 0.0 for v in part]
    return np.array(found)


@each
def test_what_arrives_is_what_the_method_says(how: Compression) -> None:
    update, model = arrays(0, 0.1), arrays(1)
    change = {name: value - model[name] for name, value in update.items()}
    found = got(how, sent(how, update, model)[COMPRESSED])
    assert {name: value.shape for name, value in found.items()} == SHAPES
    assert list(found) == list(SHAPES)
    if how.rounding == "nearest":
        np.testing.assert_allclose(flat(found), expected(how, flat(change)), rtol=1e-6)
    np.testing.assert_array_equal(
        flat(moved(model, found)), (flat(model) + flat(found)).astype(np.float32)
    )


@each
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3.4e38], ids=str)
def test_extreme_numbers_stay_finite(how: Compression, value: float) -> None:
    update = {n: np.full(shape, value, np.float32) for n, shape in SHAPES.items()}
    found = flat(got(how, sent(how, update)[COMPRESSED]))
    assert np.isfinite(found).all() and (abs(found.astype(float)) <= 1.01 * value).all()


@each
def test_the_bytes_are_counted_before_there_are_any_and_are_the_same_again(
    how: Compression,
) -> None:
    numbers = {"int8": 51, "int6": 39, "int5": 32, "int4": 26, "int3": 20}
    whole = {name: 12 + size for name, size in numbers.items()}
    size = {"bfloat16": 102, "top-k": 6 * 6, **whole}[how.method]
    one, other = (sent(how, arrays(0))[COMPRESSED] for _ in range(2))
    assert one.nbytes == compressed_size(how, SHAPES) == size
    assert one.tobytes() == other.tobytes()


@each
def test_error_feedback_loses_nothing(how: Compression) -> None:
    """What arrived in all rounds and what is left at the end are the sum of all updates."""
    model, left = arrays(0), Arrays()
    whole = np.zeros(TOTAL)
    arrived = np.zeros(TOTAL)
    for round_ in range(40):
        update = moved(model, arrays(100 + round_, 0.01))
        whole += flat(update).astype(np.float64) - flat(model)
        made, left = compress(how, model, update, left, np.random.default_rng(round_))
        arrived += flat(got(how, made[COMPRESSED]))
    np.testing.assert_allclose(arrived + flat(left), whole, atol=1e-5)
    # And it is no more than a few rounds' worth, whatever the method leaves out of each.
    assert np.linalg.norm(flat(left)) < 20 * 0.01 * math.sqrt(TOTAL)


def test_stochastic_rounding_is_right_on_average() -> None:
    how = Compression(method="int4", rounding="stochastic", error_feedback=False)
    update = arrays(5)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    rng, found = np.random.default_rng(0), np.zeros(TOTAL)
    for _ in range(2000):
        found += flat(got(how, compress(how, zeros, update, {}, rng)[0][COMPRESSED]))
    step = np.repeat([np.abs(update[name]).max() / 7 for name in SHAPES], SIZES)
    # Five standard errors of a mean whose numbers are off by at most half a step.
    assert (abs(found / 2000 - flat(update)) <= 5 * 0.5 * step / math.sqrt(2000) + 1e-6).all()


@each
def test_numbers_that_are_not_finite_are_refused(how: Compression) -> None:
    update = arrays(0)
    update["conv.bias"][2] = np.nan
    with pytest.raises(ModelError, match="must be finite"):
        sent(how, update)


@each
def test_bytes_of_another_length_are_refused(how: Compression) -> None:
    right = sent(how, arrays(0))[COMPRESSED]
    for wrong in (
        right[:-1],
        np.append(right, np.uint8(0)),
        right[:0],
        right.astype(np.float32),
        right.reshape(1, -1),
    ):
        with pytest.raises(ProtocolError, match="compressed as its plan says"):
            got(how, wrong)
    for more in ({}, {COMPRESSED: right, "more": right}, {"other": right}):
        with pytest.raises(ProtocolError, match="compressed as its plan says"):
            decompress(how, more, SHAPES)


def places(*numbers: int, values: int = 6) -> bytes:
    return np.array(numbers, "<u4").tobytes() + bytes(2 * values)


@pytest.mark.parametrize(
    ("how", "content"),
    [
        (INT8, struct.pack("<3f", math.nan, 1, 1) + bytes(51)),
        (INT8, struct.pack("<3f", 1, math.inf, 1) + bytes(51)),
        (INT8, struct.pack("<3f", 1, 1, -1) + bytes(51)),
        (INT8, struct.pack("<3f", 1, 1, 1) + b"\x80" + bytes(50)),
        (INT4, struct.pack("<3f", 1, 1, 1) + b"\x08" + bytes(25)),
        (INT4, struct.pack("<3f", 1, 1, 1) + bytes(25) + b"\x10"),
        (INT6, struct.pack("<3f", 1, 1, 1) + b"\x20" + bytes(38)),
        (INT6, struct.pack("<3f", 1, 1, 1) + bytes(38) + b"\x80"),
        (TOPK, places(0, 1, 2, 3, 4, 4)),
        (TOPK, places(0, 1, 3, 2, 4, 5)),
        (TOPK, places(0, 1, 2, 3, 4, TOTAL)),
        (TOPK, places(0, 1, 2, 3, 4, 2**32 - 1)),
    ],
    ids=[
        "scale not a number",
        "scale infinite",
        "scale below 0",
        "int8 out of range",
        "int4 out of range",
        "int4 filling",
        "int6 out of range",
        "int6 filling",
        "place twice",
        "places that fall",
        "place beyond the end",
        "place far beyond the end",
    ],
)
def test_bytes_that_no_site_makes_are_refused(how: Compression, content: bytes) -> None:
    with pytest.raises(ProtocolError, match="compressed as its plan says"):
        got(how, content)


def test_numbers_that_overflow_arrive_as_infinite_and_are_left_to_the_check_of_values() -> None:
    found = got(INT8, struct.pack("<3f", 3e38, 0, 0) + b"\x7f" + bytes(50))
    assert np.isinf(flat(found)[0]) and not flat(found)[1:].any()
    found = got(BFLOAT16, b"\xc0\x7f" + bytes(100))
    assert np.isnan(flat(found)[0]) and np.isnan(flat(moved(arrays(0), found))[0])


@pytest.mark.parametrize("download", ["bfloat16", "int8", "int5", "int3"])
def test_a_model_travels_down_as_the_method_says(download: str) -> None:
    how, model = Compression(method="top-k", share=0.1, download=download), arrays(4)
    content = compress_model(how, model)[COMPRESSED]
    assert (
        content.nbytes
        == model_size(how, SHAPES)
        == compressed_size(Compression(method=download), SHAPES)
    )
    found = decompress_model(how, content, SHAPES)
    as_update = expected(Compression(method=download), flat(model))
    np.testing.assert_allclose(flat(found), as_update, rtol=1e-6)
    for wrong in (content[:-1], content.view(np.int8), content[None], np.zeros(0, np.float32)):
        with pytest.raises(ProtocolError, match="a model must be compressed as its plan says"):
            decompress_model(how, wrong, SHAPES)
