"""Who asks for a study: the coordinator's signature over the study's id and plan.

The connector between aggregator and hospital is not trusted with the data; nor need it be with the
question who asks for them. Ed25519 (RFC 8032).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedward.errors import ProtocolError
from fedward.protocol import RoundOrder

_PURPOSE: Final = b"fedward study 1\n"


def fingerprint(public: bytes) -> str:
    """SHA-256 of a coordinator's 32-byte public key, as 64 hexadecimal digits."""
    return hashlib.sha256(public).hexdigest()


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 bytes of the public key."""
    return key.public_key().public_bytes_raw()


def sign_study(key: Ed25519PrivateKey, study: str, plan_hash: str) -> dict[str, str]:
    """What an order carries to show who asks: ``study``, ``coordinator`` and ``signature``."""
    return {
        "study": study,
        "coordinator": base64.b64encode(public_bytes(key)).decode(),
        "signature": base64.b64encode(key.sign(_signed(study, plan_hash))).decode(),
    }


def verify_study(order: RoundOrder) -> str:
    """The fingerprint of the coordinator that asks.

    Raises
    ------
    ProtocolError
        The order names no study, or its signature does not fit.
    """
    try:
        public = base64.b64decode(order.coordinator, validate=True)
        key = Ed25519PublicKey.from_public_bytes(public)
        signature = base64.b64decode(order.signature, validate=True)
        if not order.study:
            raise ValueError
        key.verify(signature, _signed(order.study, order.plan_hash))
    except (ValueError, binascii.Error, InvalidSignature):
        raise ProtocolError(
            "an order must be signed by its coordinator",
            fix="Ask the coordinator to submit the study again",
        ) from None
    return fingerprint(public)


def _signed(study: str, plan_hash: str) -> bytes:
    return _PURPOSE + study.encode() + b"\n" + plan_hash.encode()
