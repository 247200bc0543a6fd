"""An order shows who asks; nothing of it can be exchanged."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedward.errors import ProtocolError
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import OPTIONAL, RoundOrder
from fedward.signing import fingerprint, public_bytes, sign_order, signed_bytes, verify_order
from fedward.tensors import digest

MODEL = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def signed(make_plan: Callable[..., Plan], key: Ed25519PrivateKey) -> dict[str, Any]:
    plan = make_plan()
    order = RoundOrder(
        plan=canonical(plan),
        plan_hash=plan_hash(plan),
        round=1,
        study="lungs-2026",
        task="evaluate",
        arrays=digest(MODEL),
    )
    return sign_order(key, order).to_flat()


def test_the_fingerprint_is_that_of_the_raw_key(
    key: Ed25519PrivateKey, signed: dict[str, Any]
) -> None:
    raw = key.public_key().public_bytes_raw()
    known = hashlib.sha256(raw).hexdigest()
    assert verify_order(RoundOrder.from_flat(signed), "evaluate", MODEL) == known
    assert fingerprint(raw) == known


@pytest.mark.parametrize(
    "change",
    [
        {"study": "other-study"},
        {"study": ""},
        {"round": 2},
        {"part": "test"},
        {"task": "train"},
        {"arrays": "0" * 64},
        {"seed": 5},
        {"account": False},
        {"sites": 3},
        {"frozen": "0" * 64},
        {"coordinator": "", "signature": ""},
        {"signature": "not base64 at all"},
        {"signature": base64.b64encode(bytes(64)).decode()},
    ],
    ids=str,
)
def test_no_field_can_be_changed(signed: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="signed"):
        verify_order(RoundOrder.from_flat(signed | change), "evaluate", MODEL)


def test_another_key_is_another_coordinator(signed: dict[str, Any]) -> None:
    order = RoundOrder.from_flat(signed)
    other = sign_order(Ed25519PrivateKey.generate(), order)
    mixed = order.model_copy(update={"coordinator": other.coordinator})
    with pytest.raises(ProtocolError):
        verify_order(mixed, "evaluate", MODEL)
    assert verify_order(other, "evaluate", MODEL) != verify_order(order, "evaluate", MODEL)


def test_a_signature_for_another_plan_does_not_fit(
    signed: dict[str, Any], make_plan: Callable[..., Plan]
) -> None:
    other = make_plan(training={"rounds": 3})
    change = {"plan": canonical(other), "plan_hash": plan_hash(other)}
    with pytest.raises(ProtocolError):
        verify_order(RoundOrder.from_flat(signed | change), "evaluate", MODEL)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"a": MODEL["a"]},
        {**MODEL, "c": MODEL["b"]},
        {"a": MODEL["b"], "b": MODEL["a"]},
        {**MODEL, "a": MODEL["a"].reshape(3, 2)},
        {**MODEL, "a": MODEL["a"].astype(np.float64)},
        {**MODEL, "b": np.nextafter(MODEL["b"], np.float32(2))},
    ],
    ids=["none", "fewer", "more", "exchanged", "shape", "dtype", "last-digit"],
)
def test_another_model_is_refused(signed: dict[str, Any], model: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="model that its coordinator signed"):
        verify_order(RoundOrder.from_flat(signed), "evaluate", model)


def test_the_task_is_part_of_the_order(signed: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="task"):
        verify_order(RoundOrder.from_flat(signed), "train", MODEL)


def test_the_digest_does_not_depend_on_the_order_of_the_arrays() -> None:
    assert digest(dict(reversed(MODEL.items()))) == digest(MODEL)


class NextOrder(RoundOrder):
    """An order of a later release, with a field that a site may ignore and one that it may not."""

    hint: Annotated[int | None, OPTIONAL] = None
    limits: tuple[str, ...] | None = None


def sent_by_the_next_release(
    key: Ed25519PrivateKey, signed: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """What is on the wire."""
    fields = {k: v for k, v in signed.items() if k not in ("signature", "coordinator")}
    return dict(sign_order(key, NextOrder.model_validate(fields | more)).to_flat())


def test_an_order_of_the_next_release_is_read_where_its_new_field_is_optional(
    key: Ed25519PrivateKey, signed: dict[str, Any]
) -> None:
    flat = sent_by_the_next_release(key, signed, hint=3)
    assert flat["optional"] == ["hint"]
    order = RoundOrder.from_flat(flat)
    assert verify_order(order, "evaluate", MODEL) == fingerprint(public_bytes(key))
    assert signed_bytes(order) == signed_bytes(NextOrder.from_flat(flat))
    # Without the new field it sends what this release sends.
    assert sent_by_the_next_release(key, signed) == signed


def test_an_order_of_this_release_is_read_by_the_next(
    key: Ed25519PrivateKey, signed: dict[str, Any]
) -> None:
    assert verify_order(NextOrder.from_flat(signed), "evaluate", MODEL)


def test_a_new_field_that_is_not_optional_is_refused(
    key: Ed25519PrivateKey, signed: dict[str, Any]
) -> None:
    flat = sent_by_the_next_release(key, signed, hint=3, limits=("a",))
    assert flat["optional"] == ["hint"]
    with pytest.raises(ProtocolError, match="not known"):
        RoundOrder.from_flat(flat)


@pytest.mark.parametrize(
    "change",
    [
        {"optional": ["hint", "limits"], "limits": ["a"]},
        {"optional": ["mu"], "mu": 50.0},
        {"optional": ["hint"], "hint": 4},
        {"optional": ["hint"], "hint": [3]},
        {"optional": []},
        {"hint": None},
        {"optional": ["hint", "round"]},
    ],
    ids=str,
)
def test_a_connector_can_neither_add_an_optional_field_nor_change_or_remove_one(
    key: Ed25519PrivateKey, signed: dict[str, Any], change: dict[str, Any]
) -> None:
    for flat in (signed, sent_by_the_next_release(key, signed, hint=3)):
        changed = {k: v for k, v in (flat | change).items() if v is not None}
        if changed != flat:
            with pytest.raises(ProtocolError):
                verify_order(RoundOrder.from_flat(changed), "evaluate", MODEL)


@pytest.mark.parametrize("value", [b"x", "x" * 1001, ["x"] * 65, {"a": 1}, [[1]], None])
def test_what_is_optional_is_a_short_scalar_or_list(signed: dict[str, Any], value: Any) -> None:
    with pytest.raises(ProtocolError):
        RoundOrder.from_flat(signed | {"optional": ["hint"], "hint": value})


def test_the_bytes_that_are_signed_are_those_on_record() -> None:
    # A new field that is not None by default would change them, and no release could verify the
    # orders of another.
    order = RoundOrder.model_construct(plan="", plan_hash="0" * 64, round=1)
    assert signed_bytes(order) == (
        b'fedward order 1\n{"account":true,"arrays":"","coordinator":"","frozen":"",'
        b'"part":"validation","plan_hash":"' + b"0" * 64 + b'","round":1,"seed":0,"sites":0,'
        b'"study":"","task":"train","version":1}'
    )
