"""What the aggregator knows: sites, studies, rounds, events, tokens, and who did what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from numpy.typing import NDArray
from sqlalchemy import Engine

from fedward.errors import ConfigError
from fedward.protocol import RoundOrder
from fedward.signing import encoded_public_key, sign_model, sign_order
from fedward_server.config import ServerConfig
from fedward_server.registry.audit import AuditStore
from fedward_server.registry.database import open_database
from fedward_server.registry.sites import SiteStore
from fedward_server.registry.studies import StudyStore
from fedward_server.registry.tokens import TokenStore

__all__ = ["Registry", "open_registry", "read_signing_key"]


class Registry:
    """The stores over one database.

    Parameters
    ----------
    engine : Engine
        A database with the newest schema (see :func:`open_database`).
    key : Ed25519PrivateKey
        The coordinator's, with which studies and orders are signed.
    """

    def __init__(self, engine: Engine, key: Ed25519PrivateKey) -> None:
        self.engine, self._key = engine, key
        self.sites = SiteStore(engine)
        self.studies = StudyStore(engine, encoded_public_key(key))
        self.tokens = TokenStore(engine)
        self.audit = AuditStore(engine)

    def sign(self, order: RoundOrder) -> RoundOrder:
        """The order as hospitals accept it."""
        return sign_order(self._key, order)

    def sign_model(
        self, about: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]
    ) -> dict[str, str]:
        """What a delivered model's file says, as hospitals accept it from whoever brings it."""
        return sign_model(self._key, about, arrays)

    def close(self) -> None:
        """Let go of the database."""
        self.engine.dispose()


def open_registry(config: ServerConfig) -> Registry:
    """The registry of a configuration, brought to the newest schema.

    Raises
    ------
    ConfigError, ServiceError
        The database or the signing key cannot be used, ever or now.
    """
    key = read_signing_key(config.coordinator_key)
    return Registry(open_database(config.database_url), key)


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """The coordinator's key.

    Raises
    ------
    ConfigError
        It is missing or is no Ed25519 key.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            "the coordinator's signing key must be an Ed25519 key in PEM",
            value=path.name,
            fix="Restore it from a backup with keys",
            where="server.keys",
        )
    return key
