"""What the aggregator knows: sites, studies, rounds, events, tokens, and who did what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from sqlalchemy import Engine

from fedward.errors import ConfigError
from fedward.signing import sign_study
from server.config import ServerConfig
from server.registry.audit import AuditStore
from server.registry.database import open_database
from server.registry.sites import SiteStore
from server.registry.studies import StudyStore
from server.registry.tokens import TokenStore

__all__ = ["Registry", "open_registry", "read_signing_key"]

Sign = Callable[[str, str], dict[str, str]]


class Registry:
    """The stores over one database.

    Parameters
    ----------
    engine : Engine
        A database with the newest schema (see :func:`open_database`).
    sign : callable
        Study id and plan hash to the coordinator's public key and signature.
    """

    def __init__(self, engine: Engine, sign: Sign) -> None:
        self.engine = engine
        self.sites = SiteStore(engine)
        self.studies = StudyStore(engine, sign)
        self.tokens = TokenStore(engine)
        self.audit = AuditStore(engine)

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
    return Registry(
        open_database(config.database_url), lambda study, plan: sign_study(key, study, plan)
    )


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
            "the coordinator's signing key must be an Ed25519 key in PEM", value=path.name,
            fix="Restore it from a backup with keys", where="server.keys",
        )  # fmt: skip
    return key
