"""An order shows who asks; nothing of it can be exchanged."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedward.errors import ProtocolError
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import RoundOrder
from fedward.signing import fingerprint, sign_study, verify_study


@pytest.fixture
def signed(
    make_plan: Callable[..., Plan],
) -> tuple[Ed25519PrivateKey, dict[str, Any]]:
    plan = make_plan()
    key = Ed25519PrivateKey.generate()
    order = {"plan": canonical(plan), "plan_hash": plan_hash(plan), "round": 1}
    return key, order | sign_study(key, "lungs-2026", plan_hash(plan))


def test_the_fingerprint_is_that_of_the_raw_key(
    signed: tuple[Ed25519PrivateKey, dict[str, Any]],
) -> None:
    key, order = signed
    raw = key.public_key().public_bytes_raw()
    assert verify_study(RoundOrder.from_flat(order)) == hashlib.sha256(raw).hexdigest()
    assert fingerprint(raw) == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("what", ["study", "key", "signature", "no-study", "no-key", "words"])
def test_what_was_not_signed_is_refused(
    signed: tuple[Ed25519PrivateKey, dict[str, Any]], what: str
) -> None:
    _, order = signed
    other = Ed25519PrivateKey.generate()
    forged = sign_study(other, "lungs-2026", order["plan_hash"])
    change = {
        "study": {"study": "other-study"},
        "key": {"coordinator": forged["coordinator"]},
        "signature": {"signature": forged["signature"]},
        "no-study": {"study": ""},
        "no-key": {"coordinator": "", "signature": ""},
        "words": {"signature": "not base64 at all"},
    }[what]
    with pytest.raises(ProtocolError, match="signed"):
        verify_study(RoundOrder.from_flat(order | change))


def test_a_signature_for_another_plan_does_not_fit(
    signed: tuple[Ed25519PrivateKey, dict[str, Any]],
) -> None:
    key, order = signed
    other = sign_study(key, "lungs-2026", "0" * 64)
    with pytest.raises(ProtocolError):
        verify_study(RoundOrder.from_flat(order | other))
    assert len(base64.b64decode(other["signature"])) == 64
