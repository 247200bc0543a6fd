"""The coordinator's Ed25519 signature (RFC 8032) over each order and each delivered model.

The connector between aggregator and hospital is not trusted with the data, and not with the
questions either. A signature covers every field of an order, the digest of the model that comes
with it included: a connector can send an order again, which gives the same answer again, and can
neither change one nor make one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from fedward.errors import ModelError, ProtocolError
from fedward.protocol import RoundOrder
from fedward.rule_codes import RuleCode
from fedward.tensors import digest

_ORDER: Final = b"fedward order 1\n"
_MODEL: Final = b"fedward model 1\n"  # no signature of one kind passes for the other
_COORDINATOR, _SIGNATURE = "coordinator", "signature"


def fingerprint(public: bytes) -> str:
    """SHA-256 of a coordinator's 32-byte public key, as 64 hexadecimal digits."""
    return hashlib.sha256(public).hexdigest()


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 bytes of the public key."""
    return key.public_key().public_bytes_raw()


def encoded_public_key(key: Ed25519PrivateKey) -> str:
    """Base64 of the public key, as orders carry it."""
    return base64.b64encode(public_bytes(key)).decode()


def sign_order(key: Ed25519PrivateKey, order: RoundOrder) -> RoundOrder:
    """The order with the coordinator's key and signature."""
    named = order.model_copy(update={"coordinator": encoded_public_key(key)})
    signature = base64.b64encode(key.sign(signed_bytes(named))).decode()
    return named.model_copy(update={"signature": signature})


def verify_order(order: RoundOrder, task: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Check that an order is what its coordinator signed.

    Parameters
    ----------
    order : RoundOrder
        What came.
    task : str
        What the sender wants to have done with it.
    arrays : mapping
        The model that came with it.

    Returns
    -------
    str
        The fingerprint of the coordinator.

    Raises
    ------
    ProtocolError
        The order names no study, its signature does not fit, or it was signed for another task or
        another model.
    """
    try:
        public = base64.b64decode(order.coordinator, validate=True)
        key = Ed25519PublicKey.from_public_bytes(public)
        signature = base64.b64decode(order.signature, validate=True)
        if not order.study:
            raise ValueError
        key.verify(signature, signed_bytes(order))
    except (ValueError, binascii.Error, InvalidSignature):
        raise ProtocolError(
            RuleCode.SIGNED,
            fix="Ask the coordinator to submit the study again",
        ) from None
    if order.task != task or order.arrays != (digest(arrays) if arrays else ""):
        raise ProtocolError(
            RuleCode.SIGNED_MODEL,
            fix="Ask the coordinator to send it again",
        )
    return fingerprint(public)


def sign_model(
    key: Ed25519PrivateKey, about: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]
) -> dict[str, str]:
    """What a delivered model's file says of itself, with the coordinator's key and signature.

    Parameters
    ----------
    key : Ed25519PrivateKey
        The coordinator's.
    about : mapping
        Names the study and the hash of its plan (:func:`fedward.integrity.about_model`).
    arrays : mapping
        The model.
    """
    named = {**about, _COORDINATOR: encoded_public_key(key)}
    signature = key.sign(_model_bytes(named, arrays))
    return {**named, _SIGNATURE: base64.b64encode(signature).decode()}


def verify_model(about: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Check that a model is the one that a coordinator delivered.

    Returns
    -------
    str
        The fingerprint of the coordinator.

    Raises
    ------
    ModelError
        There is no signature, or it is not over this study, plan and model.
    """
    try:
        public = base64.b64decode(about[_COORDINATOR], validate=True)
        signature = base64.b64decode(about[_SIGNATURE], validate=True)
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, _model_bytes(about, arrays))
    except (KeyError, ValueError, binascii.Error, InvalidSignature):
        raise ModelError(
            "a delivered model must be signed by its coordinator",
            value="no signature" if _SIGNATURE not in about else "another signature",
            fix="Have the coordinator deliver it again, with this release or a later one",
        ) from None
    return fingerprint(public)


def _model_bytes(about: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    content = {name: about[name] for name in ("study", "which", "plan_sha256", _COORDINATOR)}
    content["arrays"] = digest(arrays)
    return _MODEL + json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def signed_bytes(order: RoundOrder) -> bytes:
    """What the signature of an order is over: all its fields but the plan, which its hash stands
    for, and the signature, as a line of their kind and version and a line of canonical JSON."""
    content = {k: v for k, v in order.to_flat().items() if k not in ("plan", "signature")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _ORDER + text.encode()
